"""What a stage of training keeps: its step, weights and optimiser in a file to go on from, and its loss curve."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class Progress:
    """Prints a line now and then, remembers the curve, and saves all that is needed to go on after a stop.

    state: named modules and optimisers. quiet: one of several that train together, which neither prints nor saves. The
    curve goes to `curves/STAGE.json`.
    """

    def __init__(self, folder: Path, stage: str, steps: int, state: dict[str, nn.Module | torch.optim.Optimizer],
                 save_every: float = 60.0, quiet: bool = False):
        self.folder, self.stage, self.steps, self.state, self.quiet = folder, stage, steps, state, quiet
        self.save_every = save_every
        self.file = folder / f"{stage}.state.pt"
        self.curve: list[dict] = []
        self.step = 0
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._start = self._saved = time.perf_counter()
        if self.file.exists():
            kept = torch.load(self.file, map_location="cpu", weights_only=True)
            for name, thing in state.items():
                rates = [group["lr"] for group in getattr(thing, "param_groups", ())]
                thing.load_state_dict(kept[name])
                for group, rate in zip(getattr(thing, "param_groups", ()), rates, strict=True):
                    group["lr"] = rate  # a tensor stays where it is; set_rate fills it
            self.step, self.curve = kept["step"], kept["curve"]
            print(f"{stage}: goes on at step {self.step} of {steps}", flush=True)

    def __iter__(self):
        """The steps that are left."""
        first = self.step
        while self.step < self.steps:
            yield self.step
            self.step += 1
            now = time.perf_counter()
            if self.step % max(1, self.steps // 100) == 0 or self.step == self.steps:
                self._report((now - self._start) / (self.step - first))
            if not self.quiet and (now - self._saved > self.save_every or self.step == self.steps):
                self.save()

    def log(self, **values: Tensor) -> None:
        """Losses of a step; their means are printed and kept. Does not wait for the device."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._count += 1

    def _report(self, seconds: float) -> None:
        means = {name: round(float(value) / self._count, 5) for name, value in self._sums.items()}
        self._sums, self._count = {}, 0
        self.curve.append({"step": self.step, **means})
        losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        if self.quiet:
            return
        print(f"{self.stage} {self.step}/{self.steps}  {1000 * seconds:.0f} ms  {losses}", flush=True)

    def save(self) -> None:
        self._saved = time.perf_counter()
        contents = {name: thing.state_dict() for name, thing in self.state.items()}
        part = self.file.with_suffix(".part")
        torch.save({**contents, "step": self.step, "curve": self.curve}, part)
        part.replace(self.file)
        curves = self.folder / "curves"
        curves.mkdir(exist_ok=True)
        (curves / f"{self.stage}.json").write_text(json.dumps(self.curve) + "\n", "utf-8")


class Average(nn.Module):
    """Running mean of a module's weights (Polyak averaging)."""

    def __init__(self, module: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        self.names = [name for name, _ in module.named_parameters()]
        for name, value in module.named_parameters():
            self.register_buffer(name.replace(".", "|"), value.detach().clone())

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine = [getattr(self, name.replace(".", "|")) for name in self.names]
        torch._foreach_lerp_(mine, [value.detach() for value in module.parameters()], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, value in module.named_parameters():
            value.copy_(getattr(self, name.replace(".", "|")))


class Repeated:
    """A piece of a training step that does the same work each time on the same tensors: on a GPU its thousands of small
    kernels are recorded once as a CUDA graph and started together. Random numbers are drawn anew each time.

    The first `warm` calls run as they are: what is set up lazily must not be recorded. pool: memory shared with other
    recordings, of which no two may be needed at a time.
    """

    def __init__(self, work: Callable[[], dict[str, Tensor]], device: str, warm: int = 3, pool=None):
        self.work, self.device, self.warm, self.pool = work, device, warm, pool
        self.calls, self.graph, self.result = 0, None, {}

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        if self.device == "cpu":
            return self.work()
        if self.calls <= self.warm:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.result = self.work()
            torch.cuda.current_stream().wait_stream(side)
            return self.result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, self.pool, capture_error_mode="thread_local"):
                self.result = self.work()
        self.graph.replay()
        return self.result


def cosine(step: int, steps: int, peak: float, warm: int, last: float = 0.02) -> float:
    """Learning rate of a step: up in `warm` steps, then down to `last` of the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
