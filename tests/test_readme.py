"""The README says what is true."""

import re

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.frames import read_frames
from utils.config import known_keys, load_config

README = (REPOSITORY / "README.md").read_text("utf-8")
CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_example_runs_as_it_stands(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) < 10
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("* 3", "* 1"), "README.md", "exec"), {})
    assert read_frames(tmp_path / "boat.mp4").shape == (9 + 12, 112, 192, 3)


def test_every_key_of_the_config_is_explained():
    table = README.split("## Config")[1].split("\n## ")[0]
    explained = set(re.findall(r"`([\w.]+)`", table))
    assert [key for key in known_keys() if key not in explained] == []


def test_defaults_in_the_table_are_the_defaults():
    table = README.split("## Config")[1].split("\n## ")[0]
    config = load_config().to_dict()
    for keys, default in re.findall(r"^\| (`[^|]+) \| ([^|]*) \|", table, re.MULTILINE):
        names, values = re.findall(r"`([^`]+)`", keys), re.findall(r"`([^`]+)`", default)
        for name, value in zip(names, values or ["null"], strict=True):
            have = config
            for part in name.split("."):
                have = have[part]
            assert yaml.safe_load(value) == have, name


def test_every_file_that_it_names_is_there():
    for path in re.findall(r"\b((?:scripts|configs|pipeline|wan|assets|demo)/[\w/]+\.\w+)", README):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_named(path):
    assert f"configs/{path.name}" in README
