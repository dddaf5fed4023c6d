"""From the files that users have to modules: generator, VAE, text encoder. Weights stay memory-mapped on the CPU."""

import logging
from pathlib import Path

import torch
from tokenizers import Tokenizer

from utils.checkpoint import (
    GET,
    cached,
    fill,
    fingerprint,
    folder_files,
    merge_loras,
    merged_path,
    pick_generator,
    read,
    read_folder,
    read_json,
)
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError
from utils.key_names import (
    State,
    decoder_of_vae,
    generator_from_diffusers,
    generator_names,
    text_encoder_from_wan,
    tied_embedding,
    vae_from_wan,
)
from utils.paths import REPOSITORY, find_file, locate
from wan.model import CausalWan, WanConfig
from wan.sizes import from_sizes
from wan.text_encoder import TextEncoder
from wan.tiny_decoder import TinyDecoder
from wan.umt5 import UMT5Config, UMT5Encoder
from wan.vae import WanVAE
from wan.vae_decoder import VAEConfig, VAEDecoder

log = logging.getLogger(__name__)


class BaseModel:
    """The folder of a Wan 2.1 base model, native or Diffusers: where its parts are and how large they are.

    A native folder may hold `vae_config.json` and `t5_config.json` (in AutoencoderKLWan's and UMT5Config's words) for
    a model of other sizes than the published one.
    """

    def __init__(self, config: Config):
        folder = locate(str(Path(config.wan_folder) / config.model_name)) or locate(config.model_name)
        if folder is None or not folder.is_dir():
            raise UserError(f"model_name={config.model_name}: no such folder in {config.wan_folder}/ "
                            f"(looked in {Path.cwd()} and {REPOSITORY}); {GET}")
        self.folder = folder
        self.is_diffusers = (folder / "transformer").is_dir()

    def _file(self, name: str) -> Path:
        return find_file(str(self.folder / name), "base model", GET)

    def _sizes(self, name: str, published: dict) -> dict:
        path = self.folder / name
        return read_json(path) if path.exists() else published

    def files(self, config: Config) -> list[Path]:
        """The files of this folder that a video of `config` is made with."""
        names = ["text_encoder", "vae", "transformer"] if self.is_diffusers \
            else ["models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "diffusion_pytorch_model.safetensors"]
        needed = [names[0], *([names[1]] if config.vae_ckpt is None else []),
                  *([names[2]] if config.generator_ckpt is None else [])]
        if self.is_diffusers:
            return [file for name in needed for file in folder_files(self.folder / name)]
        return [self._file(name) for name in needed]

    def generator_config(self) -> WanConfig:
        if not self.is_diffusers:
            sizes = read_json(self._file("config.json"))
        else:
            sizes = read_json(self._file("transformer/config.json"))
            heads = sizes.get("num_attention_heads", WanConfig.num_heads)
            sizes |= {"num_heads": heads, "dim": heads * sizes.get("attention_head_dim", 128),
                      "in_dim": sizes.get("in_channels", 16), "out_dim": sizes.get("out_channels", 16)}
        sizes.pop("patch_size", None)  # a list there; it is always the same
        return from_sizes(WanConfig, sizes)

    def generator_state(self) -> tuple[State, list[Path]]:
        """The base model's own transformer, in native names, and the files it is in."""
        if self.is_diffusers:
            folder = self.folder / "transformer"
            return generator_from_diffusers(read_folder(folder)), folder_files(folder)
        path = self._file("diffusion_pytorch_model.safetensors")
        return generator_names(read(path)), [path]

    def vae_state(self, path: str | None) -> tuple[VAEDecoder, State, str]:
        """The empty decoder of the VAE, its weights in diffusers' names, and where they are from."""
        if path is None and self.is_diffusers:
            source, config = self.folder / "vae", from_sizes(VAEConfig, read_json(self._file("vae/config.json")))
            state = read_folder(source)
        else:
            source = self._file("Wan2.1_VAE.pth") if path is None else find_file(path, "vae_ckpt", GET)
            config = from_sizes(VAEConfig, self._sizes("vae_config.json", {}))
            state = vae_from_wan(read(source), config.num_res_blocks)
        with torch.device("meta"):
            model = VAEDecoder(config)
        return model, decoder_of_vae(state), str(source)

    def text_state(self) -> tuple[UMT5Encoder, State, str]:
        """An empty text encoder, its weights in transformers' names, and where they are from."""
        if self.is_diffusers:
            source = self.folder / "text_encoder"
            sizes, state = read_json(self._file("text_encoder/config.json")), tied_embedding(read_folder(source))
        else:
            source = self._file("models_t5_umt5-xxl-enc-bf16.pth")
            sizes, state = self._sizes("t5_config.json", {}), text_encoder_from_wan(read(source))
        kind = sizes.get("feed_forward_proj", "gated-gelu")
        if kind != "gated-gelu":
            raise UserError(f"{source}: a text encoder with feed_forward_proj={kind}; UMT5's is gated-gelu")
        with torch.device("meta"):
            model = UMT5Encoder(from_sizes(UMT5Config, sizes))
        return model, state, str(source)

    def tokenizer(self) -> Tokenizer:
        folder = self.folder / ("tokenizer" if self.is_diffusers else "google/umt5-xxl")
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, the tokenizer should be there; {GET}")
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library has no type of its own for it
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{folder}: no tokenizer.json that can be loaded ({reason}); {GET}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def fingerprints(config: Config) -> dict[str, str]:
    """{file: mark of its contents} of every weight file of a config. Raises UserError where one is missing."""
    given = [("generator_ckpt", config.generator_ckpt), ("vae_ckpt", config.vae_ckpt),
             *(("lora_ckpt", lora.path) for lora in config.loras)]
    files = {path: find_file(path, what, GET) for what, path in given if path is not None}
    base = BaseModel(config)
    files |= {f"{config.model_name}/{file.relative_to(base.folder).as_posix()}": file for file in base.files(config)}
    return {name: fingerprint(file) for name, file in files.items()}


def check_ema(config: Config) -> None:
    """Raises UserError where `use_ema` asks for what `generator_ckpt` does not have. Its tensors are not read."""
    if config.use_ema and config.generator_ckpt is not None:
        path = find_file(config.generator_ckpt, "generator_ckpt", GET)
        pick_generator(read(path), config.use_ema, path)


def load_generator(config: Config, base: BaseModel, dtype: torch.dtype) -> CausalWan:
    """The generator on the CPU, LoRAs merged. Raises UserError for a file that is missing, broken or does not fit."""
    with torch.device("meta"):
        model = CausalWan(base.generator_config())
    if config.generator_ckpt is not None:
        path = find_file(config.generator_ckpt, "generator_ckpt", GET)
        files = [path]
        read_base = lambda: pick_generator(read(path), config.use_ema, path)
    else:
        state, files = base.generator_state()
        read_base = lambda: state
    source = str(files[0])

    def make() -> State:
        state = read_base()
        fill(model, state, source)  # before the LoRAs, so that a wrong file is named for what it is
        return merge_loras(state, config.loras, dtype, config.adapter.verbose)

    lora_files = [find_file(lora.path, "lora_ckpt", GET) for lora in config.loras]
    if config.cache_merged and (lora_files or dtype != torch.float32):
        recipe = {"dtype": str(dtype), "use_ema": config.use_ema,
                  "loras": [(lora.weight, lora.rank, lora.alpha) for lora in config.loras]}
        merged = cached(merged_path(files + lora_files, recipe), make)
    else:
        merged = make()
    return fill(model, merged, source)


def load_decoder(config: Config, base: BaseModel, dtype: torch.dtype) -> WanVAE | TinyDecoder:
    """The VAE on the CPU, or the tiny decoder in its place."""
    if config.vae == "taehv":
        path = find_file(config.vae_ckpt, "vae_ckpt", "it is published as taew2_1.pth in madebyollin/taehv")
        state = {key: value for key, value in read(path).items() if not key.startswith("encoder.")}
        try:
            with torch.device("meta"):
                model = TinyDecoder.like(state)
        except KeyError as error:
            raise UserError(f"{path}: not a tiny decoder for Wan 2.1, it has no {error}") from None
        return fill(model, state, str(path), dtype)
    model, state, source = base.vae_state(config.vae_ckpt)
    return WanVAE(fill(model, state, source, dtype))


def load_text_encoder(config: Config, base: BaseModel, max_tokens: int) -> TextEncoder:
    """The text encoder and its tokenizer on the CPU."""
    model, state, source = base.text_state()
    return TextEncoder(fill(model, state, source, DTYPES[config.text_encoder_dtype]), base.tokenizer(), max_tokens)
