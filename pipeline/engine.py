import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.loading import BaseModel, load_decoder, load_generator, load_text_encoder
from pipeline.noise import NoiseSource
from pipeline.precision import check_precision, decoder_in_precision, in_precision
from pipeline.session import Session
from utils.config import Config, load_config
from utils.device import keep_freed_memory, memory_free, pick_device, pick_dtype, same_on_any_thread_count
from utils.errors import UserError
from utils.prompts import shorten
from wan.attention import chosen
from wan.geometry import PIXELS
from wan.graphs import Captures
from wan.model import CausalWan
from wan.text_encoder import TextEncoder
from wan.tiny_decoder import TinyDecoder
from wan.vae import WanVAE

log = logging.getLogger(__name__)

HEADROOM = 1 << 30  # bytes of GPU memory left free beside the text encoder, for its activations


class Engine:
    """The weights: generator, decoder, text encoder. Makes Sessions, each of which is one video.

    The generator and the decoder go to the device with the first session, blocks in FP8 when they are made; the text
    encoder is loaded when a prompt first needs it, and leaves with `release_text_encoder`.
    """

    def __init__(self, config: Config, generator: CausalWan, decoder: WanVAE | TinyDecoder,
                 load_text: Callable[[], TextEncoder], device: torch.device):
        self.config, self.generator, self.decoder, self.device = config, generator, decoder, device
        self._load_text = load_text
        self._text_encoder: TextEncoder | None = None
        self._embeds: dict[str, Tensor] = {}
        self._captures = Captures()
        self.text_seconds = 0.0  # spent loading the text encoder and encoding prompts

    @classmethod
    def from_config(cls, config: Config | str | Path, local_rank: int = 0,
                    progress: Callable[[str], None] = lambda part: None) -> "Engine":
        """The engine of a config, or of a YAML file's path. local_rank: which GPU where the config leaves it open.
        progress: told each part that is about to be loaded.

        Raises UserError for a bad config, or a file that is missing, broken or does not fit.
        """
        same_on_any_thread_count()
        keep_freed_memory()
        if not isinstance(config, Config):
            config = load_config(config)
        device = pick_device(config.device, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dtype = pick_dtype(config.dtype, device)
        check_precision(config.precision, device)  # before anything large is read
        base = BaseModel(config)
        progress("generator")
        generator = in_precision(load_generator(config, base, dtype), config.precision, device)
        progress("decoder")
        decoder = decoder_in_precision(load_decoder(config, base, dtype), config.precision, device)
        return cls(config, generator, decoder,
                   lambda: load_text_encoder(config, base, generator.config.text_len), device)

    @property
    def text_encoder(self) -> TextEncoder:
        """The text encoder, loaded on first use, on the device that the config or the free memory says."""
        if self._text_encoder is None:
            encoder = self._load_text()
            device = self._place(encoder.model)
            encoder.model.to(device)
            size = _size(encoder.model)
            told = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
            log.info("Text encoder: %s on %s", told, device)
            self._text_encoder = encoder
        return self._text_encoder

    def _place(self, model: nn.Module) -> torch.device:
        if self.config.text_encoder_device != "auto":
            return pick_device(self.config.text_encoder_device, self.device.index or 0)
        fits = self.device.type == "cuda" and memory_free(self.device) > _size(model) + HEADROOM
        return self.device if fits else torch.device("cpu")

    @property
    def attention(self) -> str:
        """By what attention in the generator's dtype is computed on this device: a back end of PyTorch's or our own."""
        return chosen(self.device, self.generator.patch_embedding.weight.dtype, self.generator.config.head_dim)

    def encode(self, prompt: str) -> Tensor:
        """Embeddings [1, n, text_dim] of a prompt, on the host; remembered. Logs what a prompt too long loses."""
        if prompt not in self._embeds:
            start = time.perf_counter()
            count, cut = self.text_encoder.overflow(prompt)
            if cut:
                log.warning("Prompt %r has %d tokens, the first %d are used; cut off: %r",
                            shorten(prompt, 40), count, self.text_encoder.max_tokens, shorten(cut, 80))
            embeds = self.text_encoder(prompt)
            if embeds.shape[-1] != self.generator.config.text_dim:
                raise UserError(f"the text encoder gives {embeds.shape[-1]} numbers a token, the generator needs "
                                f"{self.generator.config.text_dim}; they are not of the same model")
            self._embeds[prompt] = embeds.cpu()
            self.text_seconds += time.perf_counter() - start
        return self._embeds[prompt]

    def release_text_encoder(self) -> None:
        """Frees the text encoder's memory. Prompts encoded before stay known; a new one loads it again."""
        self._text_encoder = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_prompts(self, keep: int) -> None:
        """Forgets the embeddings of all prompts but the `keep` that came last; asked for again, they are made again."""
        for prompt in list(self._embeds)[: max(0, len(self._embeds) - keep)]:
            self._embeds.pop(prompt, None)

    def session(self, seed: int | None = None, sample: int = 0, config: Config | None = None) -> Session:
        """A new video. The same seed and sample give the same video, whatever else is made before or beside it.

        config: settings of this video in place of the engine's; weights, device and dtype are the engine's anyway.
        """
        self.generator.to(self.device)
        self.decoder.to(self.device)
        config = config or self.config
        noise = NoiseSource(
            config.seed if seed is None else seed,
            (config.num_frame_per_block, self.generator.config.in_dim, config.height // PIXELS, config.width // PIXELS),
            sample, self.device,
        )
        return Session(config, self.generator, self.encode, self.decoder.stream(), noise, self._captures)


def _size(model: nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
