from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.noise import NoiseSource
from pipeline.sampler import denoise_block, timesteps
from utils.config import Config
from utils.device import download, upload
from utils.timing import Stopwatch
from wan.geometry import PIXELS
from wan.graphs import Captures, GraphedWan
from wan.model import CausalWan
from wan.rope import RotaryEmbedding

GRAPHS_ON = ("cuda",)  # devices on which passes can be captured
REFRESHES = ("recache", "keep", "reset")  # what a new prompt does to the self-attention cache


class Session:
    """One video in the making: it has the K/V cache, the prompt, the latest latents and the decoder's state.

        session.set_prompt("a red ball")
        frames = session.step()          # uint8 [T, H, W, 3]; T = 4F-3 for the first block, then 4F

    Each step makes one block of F latents. The prompt may be set anew between any two steps.

    encode: a prompt → its embeddings [1, n, text_dim]. decode: the block's latents [1, F, 16, h, w] → frames
    [1, T, 3, H, W] in [-1, 1], with its own state for this video. captures: what its CUDA graphs share with those of
    other videos of the generator.
    """

    def __init__(self, config: Config, generator: CausalWan, encode: Callable[[str], Tensor],
                 decode: Callable[[Tensor], Tensor], noise: NoiseSource, captures: Captures | None = None):
        self.config, self.generator, self.encode, self.decode, self.noise = config, generator, encode, decode, noise
        # Timesteps of the denoising steps, 1000 for noise.
        self.steps = timesteps(config.denoising_step_list, config.model_kwargs.timestep_shift,
                               config.warp_denoising_step)
        weight = generator.patch_embedding.weight
        self.device = weight.device
        _, ph, pw = generator.config.patch_size
        rows, columns = config.height // PIXELS // ph, config.width // PIXELS // pw
        self.rope = RotaryEmbedding(generator.config.head_dim, rows, columns, self.device)
        self.cache = generator.cache_type(
            layers=generator.config.num_layers, batch=noise.batch, tokens=rows * columns,
            heads=generator.config.num_heads, head_dim=generator.config.head_dim, window=config.window,
            sink=config.model_kwargs.sink_size, dtype=weight.dtype, device=self.device,
            rope=self.rope if config.model_kwargs.use_infinite_attention else None,
        )
        self.watch = Stopwatch(self.device)
        self.block = 0  # index of the next block
        self.prompt: str | None = None  # the one that the cache was made under; the last block's
        self._asked: str | None = None  # the next block's
        self._refresh = REFRESHES[0]  # how the cache goes over to it
        self._text: list[tuple[Tensor, Tensor]] = []  # cross-attention keys and values of `prompt`
        self._captures = captures or Captures()
        self._graphed: GraphedWan | None = None  # replays passes as CUDA graphs
        self._latents: list[Tensor] = []  # clean latents of the latest blocks, as many as a re-cache needs

    @property
    def position(self) -> int:
        """Index of the next block's first latent."""
        return self.block * self.config.num_frame_per_block

    def set_prompt(self, prompt: str, refresh: str = "recache") -> None:
        """The prompt from the next block on. Costs nothing where it is the present one.

        refresh: what becomes of the self-attention K/V. "recache": those of the latest latents are rebuilt under the
        new prompt, and the sink's as the config's `global_sink` says. "reset": the same, but the oldest of the latest
        latents become the sink. "keep": they stay, and only cross-attention sees the new prompt.
        Raises ValueError for any other.
        """
        if refresh not in REFRESHES:
            raise ValueError(f"refresh={refresh!r} must be one of {', '.join(REFRESHES)}")
        self._asked, self._refresh = prompt, refresh

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Makes the next block. Returns its frames, uint8 [T, H, W, 3] on the host.

        Raises ValueError where no prompt was set.
        """
        latents = self.step_latents()
        with self.watch.stage("decode"):
            frames = self.decode(latents)[0].float().mul(127.5).add(127.5).round().to(torch.uint8)
            frames = frames.permute(0, 2, 3, 1).contiguous()
        frames = download(frames)
        self.watch.read()  # the device is done with this block, so its events can go
        return frames

    @torch.inference_mode()
    def step_latents(self) -> Tensor:
        """Makes the next block without decoding it. Returns its clean latents, float32 [1, F, 16, h, w]."""
        self._refresh_cache()
        with self.watch.stage("denoise"):
            block, position = self.block, self.position
            self.cache.begin(position, self.config.num_frame_per_block)
            latents = denoise_block(
                lambda x, t: self._forward(x, t, position), self.noise.start(block), self.steps,
                lambda i: self.noise.renoise(block, i),
            )
        self._latents.append(latents)
        if self.config.window is not None:
            del self._latents[: -(self.config.window // self.config.num_frame_per_block)]
        self.block += 1
        return latents

    def _refresh_cache(self) -> None:
        """Brings the cache up to date with the last block's clean latents and with the prompt.

        Done when the next block begins: the last block of a video then needs no clean pass, and neither does one that
        is followed by a re-cache, which writes its keys and values too.
        """
        if self._asked is None:
            raise ValueError("no prompt: call set_prompt before the first step")
        switch = self._asked != self.prompt
        recache = switch and self._refresh != "keep"
        if self.block > 0 and not recache:
            with self.watch.stage("clean pass"):  # under the prompt that the block was made with
                self._clean_pass(self._latents[-1])
        if switch:
            with self.watch.stage("text"):
                self._set_text(self.generator.encode_text(upload(self.encode(self._asked), self.device)))
                self.prompt = self._asked
        if self.block > 0 and recache:
            with self.watch.stage("re-cache"):
                self._recache(self.config.global_sink and self._refresh != "reset")

    def _set_text(self, text: list[tuple[Tensor, Tensor]]) -> None:
        """In place where passes are captured, as those read the memory of the first prompt's."""
        if self._graphed is not None:
            for present, new in zip(self._text, text, strict=True):
                for old, value in zip(present, new, strict=True):
                    old.copy_(value)
            return
        self._text = text
        if self.config.cuda_graphs and self.device.type in GRAPHS_ON:
            self._graphed = GraphedWan(self.generator, self.cache, text, self._captures)

    def _recache(self, global_sink: bool) -> None:
        """Rebuilds the K/V of the latest latents under the new prompt, in one pass at t = context_noise.

        Until latents have left the window it holds the whole video, and all of it is rebuilt. Later, with
        `global_sink`, the sink keeps its old K/V and its room: of a window of 12 with a sink of 3 the latest 9 latents
        are rebuilt. Without it the latest 12 are, and the oldest of them are the new sink.
        """
        latents = torch.cat(self._latents, 1)
        keep_sink = global_sink and self.config.window is not None and self.position > self.config.window
        if keep_sink:
            latents = latents[:, self.config.model_kwargs.sink_size:]
        self.cache.rewind(keep_sink)
        if self._graphed is not None and not keep_sink:
            self._graphed.forget()
        self.cache.begin(self.position - latents.shape[1], latents.shape[1])
        self._clean_pass(latents)

    def _clean_pass(self, latents: Tensor) -> None:
        """Writes the K/V of clean latents, the last ones made, to the slots that the last `cache.begin` picked for
        them: the block's own when it was denoised, where this replaces the K/V of its last denoising step."""
        self._forward(latents, self.config.context_noise, self.position - latents.shape[1], want_flow=False)

    def _forward(self, latents: Tensor, t: float, position: int, want_flow: bool = True) -> Tensor | None:
        if self._graphed is not None and latents.shape[1] == self.config.num_frame_per_block:
            return self._graphed(latents, t, position, self.rope, want_flow)
        return self.generator(latents, t, position, self.rope, self.cache, self._text, want_flow)
