"""Engines of the real shapes with random weights: speed and memory do not depend on the values."""

import copy

import torch
from torch import Tensor, nn

from demo.random_weights import SIZES, Sizes, draw
from pipeline.engine import Engine
from pipeline.precision import check_precision, decoder_in_precision, in_precision
from utils.checkpoint import fill
from utils.config import Config
from utils.device import keep_freed_memory, pick_device, pick_dtype, same_on_any_thread_count
from wan.model import CausalWan
from wan.sizes import from_sizes
from wan.tiny_decoder import TinyDecoder
from wan.vae import WanVAE
from wan.vae_decoder import VAEConfig, VAEDecoder

PROMPT_TOKENS = 120
TAEW2_1 = (16, [256, 128, 64, 64])  # latent channels and widths of the published tiny decoder


class RandomText:
    """Stands in for the text encoder: embeddings of the right shape, the same for the same prompt."""

    max_tokens = 512

    def __init__(self, dim: int, max_tokens: int):
        self.dim, self.tokens = dim, min(PROMPT_TOKENS, max_tokens)

    def overflow(self, prompt: str) -> tuple[int, str]:
        return self.tokens, ""

    def __call__(self, prompt: str) -> Tensor:
        return torch.randn(1, self.tokens, self.dim, generator=torch.Generator().manual_seed(len(prompt)))


class WeightlessEngine(Engine):
    """An engine whose text encoder is a `RandomText`, so that nothing is loaded."""

    def __init__(self, config: Config, generator: CausalWan, decoder: WanVAE | TinyDecoder, device: torch.device):
        text = RandomText(generator.config.text_dim, generator.config.text_len)
        super().__init__(config, generator, decoder, lambda: text, device)

    @property
    def text_encoder(self) -> RandomText:
        return self._load_text()


def _empty(config: Config, sizes: Sizes | str) -> tuple[CausalWan, VAEDecoder | TinyDecoder]:
    """Generator and decoder on the meta device."""
    sizes = SIZES[sizes] if isinstance(sizes, str) else sizes
    with torch.device("meta"):
        decoder = TinyDecoder(*TAEW2_1) if config.vae == "taehv" else VAEDecoder(from_sizes(VAEConfig, sizes.vae))
        return CausalWan(sizes.generator), decoder


def _drawn(model: nn.Module, dtype: torch.dtype, random: torch.Generator) -> nn.Module:
    """A model of the meta device, with weights; they stay where they are drawn."""
    state = {name: value.to(dtype) for name, value in draw(model, str(random.device), random)}
    return fill(model, state, "random weights")


def _as_decoder(model: nn.Module) -> WanVAE | TinyDecoder:
    return model if isinstance(model, TinyDecoder) else WanVAE(model)


def random_engine(config: Config, sizes: Sizes | str) -> Engine:
    """An engine whose weights are drawn, not loaded. sizes: or a name in SIZES."""
    same_on_any_thread_count()
    keep_freed_memory()
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = pick_dtype(config.dtype, device)
    check_precision(config.precision, device)
    random = torch.Generator(device).manual_seed(0)
    generator, decoder = (_drawn(model, dtype, random) for model in _empty(config, sizes))
    generator = in_precision(generator, config.precision, device)
    decoder = decoder_in_precision(_as_decoder(decoder), config.precision, device)
    return WeightlessEngine(config, generator, decoder, device)


def meta_engine(config: Config, sizes: Sizes | str) -> Engine:
    """An engine that has shapes and no values. Whatever it is asked for it makes in no time, by the plain version of
    every fused operation."""
    # Not float32, for which some operations take a path of the CPU's.
    generator, decoder = (model.bfloat16().eval().requires_grad_(False) for model in _empty(config, sizes))
    return WeightlessEngine(config, generator, _as_decoder(decoder), torch.device("meta"))


def with_config(engine: Engine, config: Config, sizes: Sizes | str) -> Engine:
    """The same weights under another config. A decoder of another kind is drawn; dtype and precision stay."""
    other = copy.copy(engine)
    other.config = config
    if config.vae != engine.config.vae:
        random = torch.Generator(engine.device).manual_seed(0)
        decoder = _drawn(_empty(config, sizes)[1], pick_dtype(config.dtype, engine.device), random)
        other.decoder = decoder_in_precision(_as_decoder(decoder), engine.config.precision, engine.device)
    return other
