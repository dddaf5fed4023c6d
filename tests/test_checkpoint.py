"""Checkpoint files: read without running code and without copying; what was merged is kept."""

import builtins
import dataclasses
import io
import logging
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import utils.checkpoint
from pipeline.loading import BaseModel, load_generator, load_text_encoder
from tests.conftest import assert_same
from utils.checkpoint import fill, fingerprint, read
from utils.config import Config
from utils.errors import UserError

State = dict[str, Tensor]
RANK = 4


@pytest.fixture
def config(tiny_folder, tmp_path) -> Config:
    """A config whose generator and LoRA are the test's own, so that it finds nothing that was merged before."""
    for name in ("longlive_base.pt", "lora.pt"):
        shutil.copy(tiny_folder / "tiny/models" / name, tmp_path / name)
    state = torch.load(tmp_path / "longlive_base.pt")["generator"]
    torch.save({"generator": state, "generator_ema": {name: value + 1 for name, value in state.items()}},
               tmp_path / "longlive_base.pt")
    return dataclasses.replace(
        Config(wan_folder=str(tiny_folder), model_name="tiny", generator_ckpt=str(tmp_path / "longlive_base.pt")),
        lora_ckpt=[{"path": str(tmp_path / "lora.pt"), "rank": RANK, "alpha": 4.0}])


def load(config: Config, dtype: torch.dtype = torch.float32) -> State:
    return load_generator(config, BaseModel(config), dtype).state_dict()


def merged_files(tmp_path: Path) -> list[Path]:
    return sorted(tmp_path.glob("*.merged-*.safetensors"))


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The checkpoint files that were read."""
    paths = []

    def spy(path: Path) -> dict:
        paths.append(path)
        return read(path)

    for module in ("utils.checkpoint", "pipeline.loading"):
        monkeypatch.setattr(f"{module}.read", spy)
    return paths


def test_second_load_reads_the_merged_file_and_nothing_else(config, tmp_path, opened, caplog):
    caplog.set_level(logging.INFO)
    first = load(config)
    assert "20 of 20 modules applied" in caplog.text and len(opened) == 2
    (merged,) = merged_files(tmp_path)
    assert f"Wrote {merged}" in caplog.text
    opened.clear()
    caplog.clear()
    assert_same(load(config), first, 0)
    assert opened == [merged]
    assert f"Generator: {merged} (merged before)" in caplog.text and "applied" not in caplog.text


def edit(path: Path) -> None:
    """Another value of one weight; the file's time stays."""
    before = path.stat()
    contents = torch.load(path)
    next(iter(contents.values()))[next(iter(next(iter(contents.values()))))].view(-1)[0] += 1
    torch.save(contents, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def lora(config: Config, **changes) -> Config:
    return dataclasses.replace(config, lora_ckpt=[config.lora_ckpt[0] | changes])


@pytest.mark.parametrize("change", [
    lambda config: edit(Path(config.generator_ckpt)), lambda config: edit(Path(config.lora_ckpt[0]["path"])),
    lambda config: lora(config, weight=0.5), lambda config: lora(config, alpha=8.0),
    lambda config: dataclasses.replace(config, use_ema=True),
    lambda config: dataclasses.replace(config, lora_ckpt=config.lora_ckpt * 2),
], ids=["base file", "LoRA file", "weight", "alpha", "ema", "one LoRA more"])
def test_any_change_merges_anew(config, tmp_path, change):
    before = {name: value.clone() for name, value in load(config).items()}  # not mappings of what changes now
    changed = change(config) or config
    after = load(changed)
    assert len(merged_files(tmp_path)) == 2
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert_same(after, load(dataclasses.replace(changed, cache_merged=False)), 0)


def test_file_written_again_merges_anew(config, tmp_path):
    load(config)
    os.utime(config.generator_ckpt, (1, 1))
    load(config)
    assert len(merged_files(tmp_path)) == 2


def test_each_dtype_has_its_own_merged_file(config, tmp_path):
    single, half = load(config), load(config, torch.bfloat16)
    assert len(merged_files(tmp_path)) == 2
    assert_same(half, {name: value.bfloat16() for name, value in single.items()}, 0)  # merged in float32, then rounded
    assert_same(load(config, torch.bfloat16), half, 0)


def test_nothing_is_kept_where_that_is_switched_off(config, tmp_path):
    first = load(config)
    for merged in merged_files(tmp_path):
        merged.unlink()
    assert_same(load(dataclasses.replace(config, cache_merged=False)), first, 0)
    assert merged_files(tmp_path) == []


@pytest.mark.parametrize("left", [0, 7, 3000])
def test_truncated_merged_file_is_made_anew(config, tmp_path, caplog, opened, left):
    first = load(config)
    (merged,) = merged_files(tmp_path)
    whole = merged.read_bytes()
    merged.write_bytes(whole[:left])
    assert_same(load(config), first, 0)
    assert "is not whole; merging again" in caplog.text and merged.read_bytes() == whole
    opened.clear()
    load(config)
    assert opened == [merged]


@pytest.mark.parametrize("error", [
    SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
    OSError(30, "Read-only file system"), OSError(28, "No space left on device"),
])
def test_folder_that_can_not_be_written_only_warns(config, tmp_path, monkeypatch, caplog, error):
    def fail(state: State, path: Path) -> None:
        path.write_bytes(b"the first part")
        raise error

    expected = load(dataclasses.replace(config, cache_merged=False))
    monkeypatch.setattr(utils.checkpoint, "save_file", fail)
    assert_same(load(config), expected, 0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Could not keep the merged generator" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longlive_base.pt", "lora.pt"]


def test_interrupted_write_leaves_nothing(config, tmp_path, monkeypatch):
    def interrupt(state: State, path: Path) -> None:
        path.write_bytes(b"the first part")
        raise KeyboardInterrupt

    monkeypatch.setattr(utils.checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["longlive_base.pt", "lora.pt"]


# Reading


class Payload:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return builtins.open, (str(self.marker), "w")


def write_zip(contents: dict, path: Path) -> None:
    torch.save(contents, path)


def write_legacy(contents: dict, path: Path) -> None:
    torch.save(contents, path, _use_new_zipfile_serialization=False)


def write_pickle(contents: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(contents))


def write_tar(contents: dict, path: Path) -> None:
    """The format of PyTorch before 0.1.10."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(contents)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_hand_made_zip(contents: dict, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(contents))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["base.pt", "base.safetensors"])
@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle, write_tar, write_hand_made_zip])
def test_code_in_a_file_is_never_run(tmp_path, write, name):
    path, marker = tmp_path / name, tmp_path / "marker"
    write({"generator": {"model.a": torch.zeros(3), "model.b": Payload(marker)}}, path)
    with pytest.raises(UserError, match=re.escape(name)):
        read(path)
    assert not marker.exists()


def test_refusal_says_what_the_file_asks_for(tmp_path):
    marker = tmp_path / "marker"
    write_zip({"generator": Payload(marker)}, tmp_path / "base.pt")
    with pytest.raises(UserError, match=r"base\.pt: refused, .*could run code \(it asks for \w*io\.open\); get it"):
        read(tmp_path / "base.pt")
    torch.load(tmp_path / "base.pt", weights_only=False)["generator"].close()
    assert marker.exists()  # the payload of these tests does something


def test_code_is_not_run_where_the_environment_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    write_zip({"generator": Payload(tmp_path / "marker")}, tmp_path / "base.pt")
    with pytest.raises(UserError, match="refused"):
        read(tmp_path / "base.pt")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["base.pt", "base.safetensors"])
@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2], lambda data: data[:-100], lambda data: data[:3], lambda data: b"",
    lambda data: b"<!DOCTYPE html><html>not found</html>", lambda data: b"version https://git-lfs.github.com/spec/v1\n",
], ids=["half", "end missing", "3 bytes", "empty", "web page", "Git LFS pointer"])
def test_file_that_is_no_checkpoint_is_named_with_its_size(tmp_path, base, name, damage):
    path = tmp_path / name
    save_file(base, path) if path.suffix == ".safetensors" else torch.save({"generator": base}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as error:
        read(path)
    assert re.search(rf"{name}: not a .*checkpoint.*, {path.stat().st_size:,} bytes.*fetch it again", str(error.value))
    assert "\n" not in str(error.value)


def test_file_of_something_else_says_what_it_holds(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: holds a list, not a dictionary of tensors"):
        read(tmp_path / "list.pt")


def test_files_of_old_torch_can_be_read(tmp_path, base):
    write_legacy({"generator": base}, tmp_path / "old.pth")
    assert_same(read(tmp_path / "old.pth")["generator"], base, 0)


def file_behind(tensor: Tensor) -> str | None:
    """The file that a tensor's memory is a mapping of."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        first, end = (int(part, 16) for part in fields[0].split("-"))
        if first <= address < end:
            return fields[5] if len(fields) > 5 and fields[5].startswith("/") else None
    raise AssertionError("no mapping holds the tensor")


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize("name", ["base.pt", "base.safetensors"])
def test_reading_maps_the_file(tmp_path, name):
    path, tensor = tmp_path / name, torch.ones(1 << 20)
    save_file({"a": tensor}, path) if path.suffix == ".safetensors" else torch.save({"a": tensor}, path)
    assert file_behind(tensor) is None
    contents = read(path)
    assert file_behind(contents["a"]) == str(path) and torch.equal(contents["a"], tensor)


@needs_proc
def test_loaded_models_are_mappings_of_their_files(config, tmp_path, tiny_folder):
    plain = dataclasses.replace(config, lora_ckpt=None)
    assert {file_behind(value) for value in load(plain).values()} == {config.generator_ckpt}
    load(config, torch.bfloat16)
    (merged,) = merged_files(tmp_path)
    assert {file_behind(value) for value in load(config, torch.bfloat16).values()} == {str(merged)}
    config = dataclasses.replace(config, text_encoder_dtype="float32")
    text = load_text_encoder(config, BaseModel(config), 512).model
    assert {file_behind(value) for value in text.state_dict().values()} == {
        str(tiny_folder / "tiny/text_encoder/model.safetensors")}


# Filling


def small() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def small_state() -> State:
    return {name: torch.randn(value.shape) for name, value in small().state_dict().items()}


def test_filled_model_has_the_values_and_needs_no_gradients():
    state = small_state()
    model = fill(small(), state, "file.pt")
    assert_same(model.state_dict(), state, 0)
    assert not model.training and not any(value.requires_grad for value in model.parameters())
    half = fill(small(), state, "file.pt", torch.bfloat16)
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("0.weight"), r"1 parameters missing, such as 0\.weight"),
    (lambda state: state.update(extra=torch.zeros(1)), r"1 unknown, such as extra"),
    (lambda state: state.update({"0.weight": torch.zeros(2, 4)}), r"0\.weight has shape \[2, 4\], .* needs \[2, 3\]"),
    (lambda state: state.update({"2.a": state.pop("1.bias"), "2.b": state.pop("1.weight")}),
     r"2 parameters missing, such as 1\.bias; 2 unknown, such as 2\.a"),
])
def test_state_that_does_not_fit_names_file_parameter_and_shapes(change, message):
    state = small_state()
    change(state)
    with pytest.raises(UserError, match=r"file\.pt: .*" + message):
        fill(small(), state, "file.pt")


# Fingerprints


def large(tensors: int = 300, size: int = 10_000) -> State:
    """More than the stretches of a file that a fingerprint looks at."""
    return {f"blocks.{i}.weight": torch.full((size,), float(i)) for i in range(tensors)}


def test_any_change_of_a_torch_file_changes_its_fingerprint(tmp_path):
    path, state = tmp_path / "base.pt", large()
    torch.save({"generator": state}, path)
    marks = [fingerprint(path)]
    for name in list(state)[::23]:
        state[name][5_000] += 0.001
        torch.save({"generator": state}, path)
        marks.append(fingerprint(path))
    torch.save({"generator": {name.replace("blocks.7.", "blocks.x."): value for name, value in state.items()}}, path)
    marks.append(fingerprint(path))
    torch.save({"generator": {name: value.bfloat16() for name, value in state.items()}}, path)
    marks.append(fingerprint(path))
    path.write_bytes(path.read_bytes()[:-1])
    marks.append(fingerprint(path))
    assert len(set(marks)) == len(marks) == 18


def test_fingerprint_is_of_contents_alone(tmp_path):
    path, other = tmp_path / "base.pt", tmp_path / "elsewhere" / "copy.pt"
    torch.save({"generator": large(3)}, path)
    mark = fingerprint(path)
    other.parent.mkdir()
    shutil.copy(path, other)
    os.utime(other, (1, 1))
    assert fingerprint(other) == fingerprint(path) == mark
    (tmp_path / "empty").touch()
    assert fingerprint(tmp_path / "empty") != mark
