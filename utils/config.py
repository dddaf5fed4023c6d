"""Every setting, with its default and its check. Keys and meanings are LongLive's, and below them our own."""

import dataclasses
import difflib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import MappingNode, YAMLError, compose

from utils.device import DTYPES
from utils.errors import UserError
from utils.paths import find_file, read_text
from wan.geometry import PIXELS, whole_blocks

# Keys that say where and how fast a video is made, not which video it is.
PLACEMENT = {
    "data_path", "output_folder", "inference_iter", "num_samples", "save_with_index", "device", "text_encoder_device",
    "cache_merged", "cuda_graphs", "num_output_frames", "switch_frame_indices", "seed", "adapter",
}


@dataclass(frozen=True)
class ModelKwargs:
    local_attn_size: int = 12  # window: latents attended to, the present block included; -1 keeps everything
    timestep_shift: float = 5.0
    sink_size: int = 3  # latents at the start of the window that are never evicted
    use_infinite_attention: bool = False  # relative RoPE: positions count within the window, for endless videos


@dataclass(frozen=True)
class Adapter:
    type: str = "lora"
    rank: int = 256
    alpha: float = 256
    dropout: float = 0.0  # of training; nothing is dropped when a video is made
    dtype: str = "bfloat16"  # of training; LoRAs are merged in float32
    verbose: bool = False  # list every module that a LoRA changes


NESTED = {"model_kwargs": ModelKwargs, "adapter": Adapter}


@dataclass(frozen=True)
class LoraFile:
    """An entry of `lora_ckpt`: W + weight·alpha/rank·B·A."""

    path: str
    weight: float = 1.0
    rank: int | None = None  # adapter.rank where None
    alpha: float | None = None  # adapter.alpha where None


@dataclass(frozen=True)
class Config:
    # LongLive's keys
    denoising_step_list: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])
    warp_denoising_step: bool = True  # the list indexes the shifted schedule; false: it is timesteps themselves
    num_frame_per_block: int = 3  # latents made together
    model_name: str = "Wan2.1-T2V-1.3B"  # folder of the base model, inside wan_folder or by itself
    model_kwargs: ModelKwargs = field(default_factory=ModelKwargs)
    data_path: str | None = None  # prompt file, or JSONL of timelines
    output_folder: str = "videos/long"
    inference_iter: int = -1  # take only the first N prompts; -1 takes all
    num_output_frames: int = 120  # length in latents
    use_ema: bool = False  # take generator_ema of generator_ckpt
    seed: int = 0
    num_samples: int = 1  # videos of each prompt
    save_with_index: bool = True  # name videos by their place in the prompt file; false: by their prompt
    switch_frame_indices: Any = None  # latents at which the next prompt begins: a list, or "40, 80"
    global_sink: bool = True  # a prompt switch keeps the sink's K/V
    context_noise: float = 0.0  # timestep of the pass that writes the final K/V
    generator_ckpt: str | None = None  # None: the base model's own weights
    lora_ckpt: Any = None  # a path, or a list of paths and {path, weight, rank, alpha}
    adapter: Adapter = field(default_factory=Adapter)
    # Keys of ours
    wan_folder: str = "wan_models"
    height: int = 480
    width: int = 832
    fps: int = 16
    device: str = "auto"  # auto, cpu, cuda, cuda:N
    dtype: str = "auto"  # of generator and VAE. auto: bfloat16 on a GPU, float32 on a CPU
    precision: str = "full"  # of generator, K/V cache and VAE. full: dtype; fp8: 8 bits, where the GPU has it
    text_encoder_device: str = "auto"  # auto: the GPU if the text encoder fits there, else the CPU
    text_encoder_dtype: str = "bfloat16"
    vae: str = "wan"  # wan, or taehv: the tiny decoder
    vae_ckpt: str | None = None  # None: the base model's own; needed for taehv
    cuda_graphs: bool = True  # on a GPU: replay passes as CUDA graphs
    cache_merged: bool = True  # keep the merged generator beside its sources for the next start
    crf: int = 18  # H.264 quality: 0 is lossless, 51 the worst

    @property
    def window(self) -> int | None:
        """Latents that the K/V cache holds; None keeps everything."""
        return None if self.model_kwargs.local_attn_size == -1 else self.model_kwargs.local_attn_size

    @property
    def loras(self) -> list[LoraFile]:
        """`lora_ckpt` as a list, complete with rank and alpha."""
        entries = self.lora_ckpt if isinstance(self.lora_ckpt, list) else [self.lora_ckpt]
        loras = [LoraFile(**e) if isinstance(e, dict) else LoraFile(e) for e in entries if e is not None]
        return [dataclasses.replace(lora, rank=lora.rank or self.adapter.rank,
                                    alpha=self.adapter.alpha if lora.alpha is None else lora.alpha) for lora in loras]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a video looks like."""
        kept = {key: value for key, value in self.to_dict().items() if key not in PLACEMENT}
        if self.precision == "full":  # which goes without saying: older videos do not say it
            del kept["precision"]
        return kept | {"lora_ckpt": [dataclasses.asdict(lora) for lora in self.loras]}

    def __post_init__(self):
        object.__setattr__(self, "switch_frame_indices", _indices(self.switch_frame_indices))
        _check_values(self)
        _check_blocks(self)
        _check_loras(self.lora_ckpt)


def load_config(path: str | Path | None = None, overrides: list[str] | None = None, *,
                round_length: bool = False) -> Config:
    """The config of a YAML file (None: only the defaults) with `key=value` overrides, as `model_kwargs.sink_size=6`.
    The .json beside a video has its whole config too. round_length: `num_output_frames` is not used, and need not be a
    multiple of the block.

    Raises UserError for a file that is missing or no YAML, an unknown key (with the nearest known one) or a value of
    the wrong type or range.
    """
    schema = OmegaConf.structured(Config)
    for node in (schema, schema.model_kwargs, schema.adapter):
        OmegaConf.set_readonly(node, False)
    where = "the command line"
    try:
        if path is not None:
            where = str(path)
            text = read_text(find_file(str(path), "config"))
            if not isinstance(compose(text), MappingNode | None):  # OmegaConf would take a word for a key
                raise UserError(f"{where}: a config is a YAML mapping of key: value, this is not one")
            loaded = OmegaConf.create(text)
            if "request" in loaded and "config" in loaded:
                loaded = loaded.config
            schema = OmegaConf.merge(schema, _nested(loaded, where))
        where = "the command line"
        schema = OmegaConf.merge(schema, _nested(OmegaConf.from_dotlist(_checked_dotlist(overrides or [])), where))
        where = str(path or where)
        if round_length:
            schema.num_output_frames = whole_blocks(schema.num_output_frames, max(1, schema.num_frame_per_block))
        return OmegaConf.to_object(schema)
    except ConfigKeyError as error:
        raise UserError(f"{where}: {_unknown_key(str(error.full_key or error.key))}") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {error.full_key or 'value'}: {reason}") from None
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not valid YAML: {reason}") from None


def _nested(loaded: DictConfig, where: str) -> DictConfig:
    """What was loaded. Raises UserError where a key that holds others, or a list, is something else: OmegaConf's own
    words for that name its classes."""
    for key, kind in NESTED.items():
        if not isinstance(loaded.get(key, {}), (dict, DictConfig)):
            raise UserError(f"{where}: {key} holds keys of its own, such as {key}.{dataclasses.fields(kind)[0].name}; "
                            f"it can't be {loaded[key]}")
    steps = loaded.get("denoising_step_list", [])
    if not isinstance(steps, (list, ListConfig)):
        raise UserError(f"{where}: denoising_step_list={steps} must be a list, such as [1000, 750, 500, 250]")
    return loaded


def _checked_dotlist(overrides: list[str]) -> list[str]:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not key=value, for example seed=1 or model_kwargs.sink_size=6")
    return overrides


def known_keys() -> list[str]:
    """Every key, nested ones with a dot."""
    keys = []
    for item in dataclasses.fields(Config):
        nested = NESTED.get(item.name)
        keys += [f"{item.name}.{f.name}" for f in dataclasses.fields(nested)] if nested else [item.name]
    return keys


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean X?` for the known word that is most like `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _unknown_key(key: str) -> str:
    keys = known_keys()
    leaf = key.rsplit(".", 1)[-1]
    inside = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]
    hint = f"; did you mean {inside[0]}?" if inside else nearest(key, keys) or nearest(leaf, keys)
    return f"unknown key {key}{hint or ', see configs/inference.yaml for all keys'}"


def _indices(value: Any) -> list[int] | None:
    """`switch_frame_indices` as a list: from a list, one number, or text such as "40, 80"."""
    if value is None:
        return None
    if isinstance(value, str):
        value = [part for part in value.replace(",", " ").split() if part]
    elif not isinstance(value, (list, tuple)):
        value = [value]
    try:
        indices = [int(str(part)) for part in value]
    except ValueError:
        raise UserError(f"switch_frame_indices={value} must be whole numbers of latents, such as [42, 81]") from None
    if any(after <= before for before, after in itertools.pairwise([0, *indices])):
        raise UserError(f"switch_frame_indices={indices} must rise from above 0, such as [42, 81]")
    return indices


def _check_values(c: Config) -> None:
    def need(ok: bool, key: str, value: Any, wanted: str) -> None:
        if not ok:
            raise UserError(f"{key}={value} must be {wanted}")

    steps = c.denoising_step_list
    falling = bool(steps) and all(a > b for a, b in itertools.pairwise(steps))
    need(falling and min(steps) > 0 and max(steps) <= 1000, "denoising_step_list", steps,
         "falling steps from at most 1000 to above 0, such as [1000, 750, 500, 250]")
    need(c.num_frame_per_block >= 1, "num_frame_per_block", c.num_frame_per_block, "at least 1 latent")
    need(c.num_output_frames >= 1, "num_output_frames", c.num_output_frames, "at least 1 latent")
    need(c.num_samples >= 1, "num_samples", c.num_samples, "at least 1")
    need(c.inference_iter == -1 or c.inference_iter >= 1, "inference_iter", c.inference_iter, "-1 (all) or at least 1")
    need(0 <= c.seed < 2**63, "seed", c.seed, "from 0 to 2^63-1")
    need(0 <= c.context_noise <= 1000, "context_noise", c.context_noise, "a timestep from 0 to 1000")
    shift = c.model_kwargs.timestep_shift
    need(0 < shift < float("inf"), "model_kwargs.timestep_shift", shift, "a number above 0")
    need(c.adapter.type == "lora", "adapter.type", c.adapter.type, "lora")
    need(c.adapter.rank >= 1, "adapter.rank", c.adapter.rank, "at least 1")
    need(c.fps >= 1, "fps", c.fps, "at least 1")
    need(0 <= c.crf <= 51, "crf", c.crf, "from 0 (lossless) to 51")
    for key, side in (("height", c.height), ("width", c.width)):
        low = max(2 * PIXELS, side // (2 * PIXELS) * 2 * PIXELS)
        need(side >= 2 * PIXELS and side % (2 * PIXELS) == 0, key, side,
             f"a multiple of {2 * PIXELS}; use {low} or {low + 2 * PIXELS}")
    need(c.dtype in ["auto", *DTYPES], "dtype", c.dtype, f"one of auto, {', '.join(DTYPES)}")
    need(c.precision in ("full", "fp8"), "precision", c.precision, "full or fp8")
    need(c.precision == "full" or c.dtype in ("auto", "bfloat16"), "dtype", c.dtype,
         "auto or bfloat16 where precision is fp8")
    need(c.text_encoder_dtype in DTYPES, "text_encoder_dtype", c.text_encoder_dtype, f"one of {', '.join(DTYPES)}")
    need(c.vae in ("wan", "taehv"), "vae", c.vae, "wan or taehv")
    need(c.vae == "wan" or c.vae_ckpt is not None, "vae_ckpt", c.vae_ckpt,
         "the path of taew2_1.pth where vae is taehv")


def _check_blocks(c: Config) -> None:
    """Everything that is counted in latents must fit whole blocks."""
    block, window, sink = c.num_frame_per_block, c.model_kwargs.local_attn_size, c.model_kwargs.sink_size
    if c.num_output_frames % block:
        low = c.num_output_frames // block * block
        choice = f"{low} or {low + block}" if low else f"{block}"
        raise UserError(f"num_output_frames={c.num_output_frames} is not a multiple of num_frame_per_block={block}; "
                        f"use {choice} (--num-output-frames and --seconds round up and trim)")
    if window != -1 and window < block:
        raise UserError(f"model_kwargs.local_attn_size={window} must be at least num_frame_per_block={block}, "
                        f"or -1 to keep everything")
    if sink < 0 or sink % block:
        raise UserError(f"model_kwargs.sink_size={sink} is not a multiple of num_frame_per_block={block}; "
                        f"use {max(sink, 0) // block * block} or {(max(sink, 0) // block + 1) * block}")
    if window != -1 and (window <= sink or (window - sink) % block):
        low = max((window - sink) // block, 1) * block + sink
        raise UserError(f"model_kwargs.local_attn_size={window} minus sink_size={sink} must be a positive multiple of "
                        f"num_frame_per_block={block}; use {low} or {low + block}")


def _check_loras(value: Any) -> None:
    known = [f.name for f in dataclasses.fields(LoraFile)]
    wanted = "lora_ckpt must be a path, or a list of paths and {path: …, weight: 1.0}"
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, dict):
            for key in entry:
                if key not in known:
                    raise UserError(f"lora_ckpt: unknown key {key}{nearest(str(key), known)}")
            numbers = [entry.get(key, 1.0) for key in ("weight", "rank", "alpha")]
            if not isinstance(entry.get("path"), str) or not all(isinstance(n, (int, float)) for n in numbers):
                raise UserError(f"{wanted}, got {entry}")
            if entry.get("rank", 1) < 1:
                raise UserError(f"lora_ckpt: rank={entry['rank']} must be at least 1")
        elif entry is not None and not isinstance(entry, str):
            raise UserError(f"{wanted}, got {entry}")
