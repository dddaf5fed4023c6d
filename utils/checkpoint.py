"""Checkpoint files: read without running code, checked against the model, LoRAs merged, the merged file cached."""

import hashlib
import json
import logging
import os
import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.config import LoraFile
from utils.errors import UserError
from utils.key_names import State, generator_names, lora_modules
from utils.paths import find_file

log = logging.getLogger(__name__)

GET = "get it with: bash scripts/download.sh (or see the demo without it: bash scripts/inference.sh)"
CACHE_FORMAT = 1  # part of the cached file's key: raise it when merging changes


def read(path: Path) -> dict:
    """Contents of a .safetensors or a torch file, memory-mapped.

    Raises UserError for a file that is truncated or no checkpoint, and for a pickle that asks to run code: that is
    refused, never run.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a mapping
        return _load_torch(path)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]*\w)", str(error))
        if asked is None:  # a web page or a Git LFS pointer in the file's place, or a pickle that torch can't follow
            raise UserError(f"{path}: not a checkpoint of plain tensors, {path.stat().st_size:,} bytes; "
                            f"fetch it again, from a source that you trust") from None
        raise UserError(f"{path}: refused, this file holds more than tensors and loading it could run code (it asks "
                        f"for {asked[1]}); get it from a source that you trust, as .safetensors or as plain tensors"
                        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]  # torch's unpickler fails in any way over bytes that are no pickle
        raise UserError(f"{path}: not a whole checkpoint, {path.stat().st_size:,} bytes ({reason}); "
                        f"it may be cut short, fetch it again") from None


def _load_torch(path: Path) -> dict:
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what it can't read it refuses
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)  # before torch 1.6: no zip
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds a {type(contents).__name__}, not a dictionary of tensors")
    return contents


def folder_files(folder: Path) -> list[Path]:
    """The safetensors files of a Diffusers sub-folder: one, or several with an index. Raises UserError where one is
    missing."""
    files = sorted(file for file in folder.glob("*.safetensors") if ".merged-" not in file.name)  # those `cached` made
    if not files:
        raise UserError(f"{folder}: no .safetensors file in it; {GET}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        named = set(read_json(indices[0]).get("weight_map", {}).values())
        missing = sorted(named - {file.name for file in files})
        if missing:
            raise UserError(f"{folder / missing[0]}: no such file, but {indices[0].name} names it; {GET}")
        files = [file for file in files if file.name in named]
    return files


def read_folder(folder: Path) -> State:
    """All tensors of a Diffusers sub-folder."""
    state: State = {}
    for file in folder_files(folder):
        state.update(read(file))
    return state


def read_json(path: Path) -> dict:
    """A JSON object. Raises UserError where it is not one."""
    try:
        contents = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(contents).__name__}")
    return contents


def fill(model: nn.Module, state: State, source: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts `state` into a model made on the meta device. Raises UserError unless names and shapes are its own."""
    wanted = model.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(names)} {what}, such as {names[0]}"
                 for names, what in ((missing, "parameters missing"), (extra, "unknown")) if names]
        raise UserError(f"{source}: does not fit the model ({'; '.join(parts)}); is it the right file for this model?")
    for name, have in state.items():
        shape = list(have.shape) if isinstance(have, Tensor) else type(have).__name__
        if shape != list(wanted[name].shape):
            raise UserError(f"{source}: {name} has shape {shape}, the model needs {list(wanted[name].shape)}; "
                            f"is it the right file for this model?")
    if dtype is not None:
        state = {name: value.to(dtype) for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def pick_generator(contents: dict, use_ema: bool, path: Path) -> State:
    """The generator of a LongLive checkpoint: `generator`, `generator_ema`, `model`, or the whole file."""
    wanted = ["generator_ema"] if use_ema else ["generator", "model"]
    for key in wanted:
        if isinstance(contents.get(key), dict):
            return generator_names(contents[key])
    if not use_ema and contents and all(isinstance(value, Tensor) for value in contents.values()):
        return generator_names(contents)
    raise UserError(f"{path}: no {' or '.join(wanted)} in it, it has {', '.join(map(str, list(contents)[:5]))}"
                    + ("; set use_ema: false" if use_ema else ""))


def merge_loras(state: State, loras: list[LoraFile], dtype: torch.dtype = torch.float32,
                verbose: bool = False) -> State:
    """W + Σ weight·alpha/rank·B·A for every module that a LoRA names, added up in float32, returned in `dtype`.

    Raises UserError where a LoRA names a module that the generator lacks, or has another rank than was said.
    """
    changes: dict[str, list[tuple[float, Tensor, Tensor]]] = defaultdict(list)
    for lora in loras:
        path, modules = _read_lora(lora, state)
        for name, parts in modules.items():
            changes[f"{name}.weight"].append((lora.weight * lora.alpha / lora.rank, parts["A"], parts["B"]))
            if verbose:
                log.info("  %s", name)
        log.info("LoRA %s: %d of %d modules applied, weight %g", path, len(modules), len(modules), lora.weight)

    def merged(name: str, value: Tensor) -> Tensor:
        for scale, a, b in changes.get(name, []):
            value = value.float() + scale * (b.float() @ a.float())
        return value.to(dtype)

    return {name: merged(name, value) for name, value in state.items()}


def _read_lora(lora: LoraFile, state: State) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A LoRA's file and its modules, all of which fit the generator `state`."""
    path = find_file(lora.path, "lora_ckpt", GET)
    contents = read(path)
    held = contents.get("generator_lora", contents)
    modules = lora_modules(held) if isinstance(held, dict) else {}
    if not modules:
        raise UserError(f"{path}: no LoRA in it; is it the right file?")
    unmatched = [name for name, parts in modules.items() if f"{name}.weight" not in state or set(parts) != {"A", "B"}
                 or not all(isinstance(part, Tensor) and part.dim() == 2 for part in parts.values())]
    if unmatched:
        raise UserError(f"{path}: {len(unmatched)} of {len(modules)} LoRA modules match nothing in the generator, "
                        f"such as {unmatched[0]}; is it a LoRA for this model?")
    for name, parts in modules.items():
        a, b, wanted = parts["A"].shape, parts["B"].shape, state[f"{name}.weight"].shape
        if a[0] != lora.rank:
            raise UserError(f"{path}: has rank {a[0]}, but adapter.rank={lora.rank}; set adapter.rank={a[0]} and "
                            f"adapter.alpha to what it was trained with")
        if (b[0], a[1]) != tuple(wanted) or b[1] != a[0]:
            raise UserError(f"{path}: {name} is {b[0]}×{a[1]}, the generator's is {'×'.join(map(str, wanted))}; "
                            f"is it a LoRA for this model?")
    return path, modules


def fingerprint(path: Path, probes: int = 64, width: int = 1 << 16) -> str:
    """A short mark of a file's contents: its size and `probes` stretches of it. A torch file ends with the checksums
    of all that is in it, so any change to one shows."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for probe in range(probes + 1):
            file.seek(max(0, size - width) * probe // probes)
            digest.update(file.read(width))
    return digest.hexdigest()[:16]


def merged_path(sources: list[Path], recipe: dict) -> Path:
    """Where the merged generator of these source files and this recipe is cached: beside the first of them."""
    facts = [(str(path.resolve()), path.stat().st_mtime_ns, fingerprint(path)) for path in sources]
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, facts, recipe], sort_keys=True).encode()).hexdigest()[:12]
    return sources[0].with_name(f"{sources[0].stem}.merged-{key}.safetensors")


def cached(path: Path, make: Callable[[], State]) -> State:
    """The state in the safetensors file `path`; made, and written there for the next start, where it does not exist."""
    if path.exists():
        try:
            state = read(path)
        except UserError:
            log.warning("%s is not whole; merging again", path)
        else:
            log.info("Generator: %s (merged before)", path)
            return state
    state = make()
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)
        temporary.replace(path)
        log.info("Wrote %s; the next start reads it and merges nothing", path)
    except (OSError, SafetensorError) as error:
        log.warning("Could not keep the merged generator beside its sources: %s", " ".join(str(error).split()))
    finally:
        temporary.unlink(missing_ok=True)  # gigabytes, also where the user interrupts
    return state
