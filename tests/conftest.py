import dataclasses
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from demo.random_checkpoint import write
from demo.random_weights import Sizes
from utils.cli import guarded
from utils.config import Adapter, Config
from utils.interrupts import STOPPING
from wan.model import CausalWan, WanConfig

# On tensors as small as the tests' several threads wait for each other, on a busy machine for minutes.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "data/golden"

TINY = Sizes(
    WanConfig(dim=32, ffn_dim=64, freq_dim=16, text_dim=32, num_heads=2, num_layers=2),
    {"base_dim": 4}, {"vocab_size": 512, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    lora_rank=4, text_dtype=torch.float32,
)


@pytest.fixture(scope="session", autouse=True)
def _signals_are_on():
    """A shell that starts the tests in the background switches Ctrl-C off for them and all that they start."""
    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _process_stays_as_it_was():
    """A front-end that runs in the tests' process takes over its signals and its log. And what a test draws does not
    depend on those that ran before it."""
    torch.manual_seed(0)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    signals = {number: signal.getsignal(number) for number in STOPPING}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for number, handler in signals.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder with a very small random model in the released layout, `tiny/`."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / "tiny", TINY, seed=0, device="cpu")
    return folder


@pytest.fixture(scope="module")
def base() -> dict[str, torch.Tensor]:
    """Weights of a very small generator."""
    torch.manual_seed(0)
    return {name: value.clone() for name, value in CausalWan(TINY.generator).state_dict().items()}


def tiny_settings(tiny_folder: Path, output_folder: str | Path) -> Config:
    """A config of the very small model: 48×32 pixels, two blocks."""
    return Config(
        wan_folder=str(tiny_folder), model_name="tiny",
        generator_ckpt=str(tiny_folder / "tiny/models/longlive_base.pt"),
        lora_ckpt=str(tiny_folder / "tiny/models/lora.pt"), adapter=Adapter(rank=4, alpha=4),
        text_encoder_dtype="float32", height=32, width=48, num_output_frames=6, output_folder=str(output_folder),
        device="cpu",
    )


@pytest.fixture
def tiny_config(tiny_folder, tmp_path) -> Config:
    """The same, into the test's own folder."""
    return tiny_settings(tiny_folder, tmp_path / "videos")


@pytest.fixture
def tiny_yaml(tiny_config, tmp_path) -> Path:
    """The same config as a YAML file."""
    from omegaconf import OmegaConf

    path = tmp_path / "tiny.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(tiny_config)), path)
    return path


@pytest.fixture
def videos(tmp_path) -> Path:
    """The folder that the videos of a test go to."""
    return tmp_path / "videos"


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str

    def error_line(self) -> str:
        """The one line that says what is wrong; asserts that there is one, no traceback, and exit code 2."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert self.err.strip().splitlines()[-1] == lines[0]
        return lines[0]


def assert_complains(outcome: Outcome, *words: str) -> None:
    line = outcome.error_line()
    for word in words:
        assert str(word) in line, (word, line)


@pytest.fixture
def run_script(tmp_path):
    """Runs a front-end as a user does: run_script("inference.py", "--prompt", "a ball", …) → Outcome."""

    def run(script: str, *args, cwd: Path = tmp_path, timeout: float = 120, env: dict | None = None) -> Outcome:
        command = [sys.executable, str(REPOSITORY / script), *map(str, args)]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=timeout, check=False)
        return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def run_here(tiny_yaml, tmp_path, monkeypatch, capsys):
    """Runs a front-end as its script does, but in this process and with the very small model, in the test's own folder:
    run_here(inference, "--prompt", "a ball", …) → Outcome. `config` is another YAML, or None for what `args` say."""
    monkeypatch.chdir(tmp_path)

    def run(front_end, *args, config: Path | None = tiny_yaml) -> Outcome:
        argv = [str(arg) for arg in ([config, *args] if config else args)]
        capsys.readouterr()
        code = guarded(lambda: front_end.main(argv))
        return Outcome(code, *capsys.readouterr())

    return run
