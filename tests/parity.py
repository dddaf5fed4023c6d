"""Runs every recorded case in a folder of the golden format: `python -m tests.parity FOLDER [--device cuda]`.

Prints a line per case, `name  max_abs_err  ok|FAIL`, and exits with 1 where one is over the tolerance.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from pipeline.session import Session
from tests.diffusers_vae import DiffusersVAE, empty
from utils.checkpoint import fill, merge_loras, pick_generator, read, read_json
from utils.config import Config, LoraFile, ModelKwargs
from utils.key_names import lora_modules, text_encoder_from_wan, vae_from_wan
from wan.geometry import PIXELS
from wan.model import CausalWan, WanConfig
from wan.sizes import from_sizes
from wan.tiny_decoder import TinyDecoder
from wan.umt5 import UMT5Config, UMT5Encoder
from wan.vae import WanVAE

TOLERANCE = 1e-4
CPU = torch.device("cpu")
Result = tuple[str, float]


def error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or a value is not finite."""
    if got.shape != expected.shape or not torch.isfinite(got).all():
        return float("inf")
    return (got.float() - expected.float()).abs().max().item()


def tensors(path: Path, device: torch.device = CPU) -> tuple[dict[str, Tensor], dict | None]:
    """Tensors of a case and, for a generator's, its settings."""
    with safe_open(path, "pt", device=str(device)) as file:
        case = (file.metadata() or {}).get("case")
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(case) if case else None  # noqa: SIM118


class RecordedNoise:
    """Noise of one video of a recorded batch, with NoiseSource's two verbs."""

    batch = 1

    def __init__(self, case: dict[str, Tensor], sample: int, block: int):
        self.noise = case["noise"][sample : sample + 1].split(block, dim=1)
        self.again = case["renoise"][:, :, sample : sample + 1]

    def start(self, block: int) -> Tensor:
        return self.noise[block]

    def renoise(self, block: int, step: int) -> Tensor:
        return self.again[block, step]


def settings(case: dict) -> Config:
    """The config that a recorded generator case was made with."""
    rows, columns = case["grid"]
    return Config(
        denoising_step_list=case["steps"], num_frame_per_block=case["block"], num_output_frames=case["frames"],
        model_kwargs=ModelKwargs(local_attn_size=case["local"], sink_size=case["sink"],
                                 use_infinite_attention=case.get("infinity", False)),
        global_sink=case.get("global_sink", True), context_noise=case.get("context_noise", 0),
        height=rows * PIXELS, width=columns * PIXELS,
    )


def load_generator(folder: Path, with_lora: bool) -> CausalWan:
    with torch.device("meta"):
        model = CausalWan(WanConfig(**read_json(folder / "generator_config.json")))
    path = folder / "longlive_base.pt"
    state = pick_generator(read(path), False, path)
    if with_lora:
        path = folder / "lora.pt"
        rank = len(next(iter(lora_modules(read(path)["generator_lora"]).values()))["A"])
        state = merge_loras(state, [LoraFile(str(path), rank=rank, alpha=rank)])
    return fill(model, state, str(path), torch.float32)


def roll_out(config: Config, generator: CausalWan, case: dict, recorded: dict[str, Tensor], sample: int) -> Tensor:
    """Latents [1, T, 16, h, w] of one video of a recorded batch."""
    embeds = dict(zip(case["prompts"], recorded["prompt_embeds"][:, sample : sample + 1], strict=True))
    noise = RecordedNoise(recorded, sample, config.num_frame_per_block)
    session = Session(config, generator, embeds.__getitem__, lambda latents: latents, noise)
    switches = list(zip([0, *case.get("switch", [])], case["prompts"], strict=True))
    blocks = []
    for position in range(0, case["frames"], config.num_frame_per_block):
        session.set_prompt([prompt for switch, prompt in switches if switch <= position][-1])
        blocks.append(session.step_latents())
    return torch.cat(blocks, 1)


def generator_case(folder: Path, name: str, recorded: dict[str, Tensor], case: dict) -> Iterator[Result]:
    config = settings(case)
    generator = load_generator(folder, case.get("lora", False)).to(recorded["noise"].device)
    latents = [roll_out(config, generator, case, recorded, sample) for sample in range(case["batch"])]
    yield name, error(torch.cat(latents), recorded["latents"])


def text_case(folder: Path, name: str, recorded: dict[str, Tensor]) -> Iterator[Result]:
    with torch.device("meta"):
        model = UMT5Encoder(from_sizes(UMT5Config, read_json(folder / "t5_config.json")))
    path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
    fill(model, text_encoder_from_wan(read(path)), str(path), torch.float32).to(recorded["input_ids"].device)
    rows = []
    for ids, count in zip(recorded["input_ids"], recorded["attention_mask"].sum(1), strict=True):
        embeds = model(ids[None, :count])[0]
        rows.append(F.pad(embeds, (0, 0, 0, len(ids) - len(embeds))))
    yield name, error(torch.stack(rows), recorded["prompt_embeds"])


def stream(decoder: WanVAE | TinyDecoder, latents: Tensor) -> Tensor:
    """Decodes in blocks of uneven sizes."""
    decode = decoder.stream()
    sizes = [1, 3, 2] * len(latents[0])
    blocks, start = [], 0
    while start < latents.shape[1]:
        blocks.append(decode(latents[:, start : start + sizes[0]]))
        start += sizes.pop(0)
    return torch.cat(blocks, 1)


def vae_case(folder: Path, name: str, recorded: dict[str, Tensor]) -> Iterator[Result]:
    model = empty(read_json(folder / "vae_config.json"))
    path = folder / "Wan2.1_VAE.pth"
    vae = DiffusersVAE(fill(model, vae_from_wan(read(path), model.config.num_res_blocks), str(path), torch.float32))
    vae.to(recorded["latents"].device)
    yield f"{name}.decode", error(vae.decode(recorded["latents"]), recorded["video"])
    yield f"{name}.stream", error(stream(vae, recorded["latents"]), recorded["video"])
    yield f"{name}.encode", error(vae.encode(recorded["pixels"]), recorded["encoded"])


def tiny_case(folder: Path, name: str, recorded: dict[str, Tensor]) -> Iterator[Result]:
    path = folder / "taew2_1.pth"
    state = {key: value for key, value in read(path).items() if not key.startswith("encoder.")}
    with torch.device("meta"):
        model = TinyDecoder.like(state)
    decoder = fill(model, state, str(path), torch.float32).to(recorded["latents"].device)
    yield f"{name}.decode", error((decoder.decode(recorded["latents"]) + 1) / 2, recorded["video"])
    yield f"{name}.stream", error((stream(decoder, recorded["latents"]) + 1) / 2, recorded["video"])


def run(folder: Path, device: torch.device = CPU) -> Iterator[Result]:
    """(name, max_abs_err) of every case in the folder."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions in whole float32, as the cases were recorded
    for path in sorted(folder.glob("*.safetensors")):
        recorded, case = tensors(path, device)
        if case is not None:
            yield from generator_case(folder, path.stem, recorded, case)
        elif "input_ids" in recorded:
            yield from text_case(folder, path.stem, recorded)
        elif "encoded" in recorded:
            yield from vae_case(folder, path.stem, recorded)
        else:
            yield from tiny_case(folder, path.stem, recorded)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", type=torch.device, default=CPU)
    args = parser.parse_args()
    folder, results = args.folder, []
    for name, err in run(folder, args.device):
        results.append(err <= TOLERANCE)
        print(f"{name:28} {err:.2e}  {'ok' if results[-1] else 'FAIL'}", flush=True)
    if not results:
        print(f"{folder}: no cases found")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
