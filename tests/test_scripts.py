"""The launchers in scripts/, with programs that print what they were given in place of the real ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Outcome

SCRIPTS = REPOSITORY / "scripts"
LAUNCHERS = {"inference.sh": "inference.py", "interactive_inference.sh": "interactive_inference.py",
             "live.sh": "live.py", "download.sh": "scripts/download.py"}
REPORT = """import json, os, sys
with open(os.environ["REPORT"] + os.environ.get("RANK", ""), "w") as file:
    json.dump({"program": sys.argv[0], "args": sys.argv[1:], "rank": os.environ.get("RANK"),
               "world": os.environ.get("WORLD_SIZE"), "threads": os.environ.get("OMP_NUM_THREADS")}, file)
"""
# A python3 that is as old and as complete as the variables FAKE_VERSION and FAKE_VENV say, and notes what it is asked.
PYTHON = """#!/bin/sh
case "$*" in
  *--version*) echo "Python ${FAKE_VERSION:-3.11.4}" ;;
  *version_info*) [ -z "${FAKE_VERSION:-}" ] ;;
  *"-m venv "*)
    if [ -n "${FAKE_VENV:-}" ]; then mkdir -p "$3"; echo "$FAKE_VENV"; exit 1; fi
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "venv" >>"$NOTES" ;;
  *"-m pip "*)
    if [ -n "${FAKE_PIP:-}" ]; then echo "$FAKE_PIP" >&2; exit 1; fi
    for last; do :; done
    echo "pip ${last##*/}" >>"$NOTES" ;;
  *hashlib*|*REPORT*|*.py*) exec "$REAL_PYTHON" "$@" ;;
  "-c ") ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


class Checkout:
    """A copy of the launchers in a folder of their own, with a space in its name."""

    def __init__(self, folder: Path):
        self.root, self.report, self.notes = folder / "long live", folder / "report.json", folder / "notes"
        shutil.copytree(SCRIPTS, self.root / "scripts")
        for program in LAUNCHERS.values():
            (self.root / program).write_text(REPORT)
        for name in ("requirements.txt", "requirements-test.txt"):
            (self.root / name).write_text("nothing\n")
        self.bin = folder / "bin"
        self.bin.mkdir()

    def fake_python(self, name: str = "python3") -> None:
        (self.bin / name).write_text(PYTHON)
        (self.bin / name).chmod(0o755)

    def run(self, script: str, *args: str, cwd: Path | None = None, path: str | None = None, **env: str) -> Outcome:
        """Runs `bash scripts/SCRIPT args…` from the folder `cwd`, with the variables `env` and few others."""
        self.report.unlink(missing_ok=True)
        cwd = cwd or self.root
        base = {"PATH": path or f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.root), "REPORT": str(self.report),
                "NOTES": str(self.notes), "REAL_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([shutil.which("bash"), os.path.relpath(self.root / "scripts" / script, cwd), *args],
                              cwd=cwd, env=base | env, capture_output=True, text=True, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def reported(self, rank: str = "") -> dict:
        return json.loads(Path(f"{self.report}{rank}").read_text())

    def asked(self) -> list[str]:
        """What the fake python was asked to make and install since the last time."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_arguments_reach_the_program_as_they_are(checkout, script):
    args = ["configs/a b.yaml", "my prompts.txt", "seed=1", "denoising_step_list=[1000, 500]", "--prompt",
            "a 'red' $b *", "--seconds", "10", ""]
    outcome = checkout.run(script, *args, LONGLIVE_PYTHON=sys.executable)
    assert outcome.code == 0, outcome.err
    assert checkout.reported()["args"] == args
    assert checkout.reported()["program"] == str(checkout.root / LAUNCHERS[script])
    assert checkout.reported()["rank"] is None
    assert not (checkout.root / ".venv").exists()


def test_works_from_another_folder_and_whatever_cdpath_says(checkout, tmp_path):
    (tmp_path / "elsewhere/scripts").mkdir(parents=True)
    for cwd in (tmp_path / "elsewhere", checkout.root, checkout.root / "scripts"):
        outcome = checkout.run("inference.sh", cwd=cwd, LONGLIVE_PYTHON=sys.executable, CDPATH=f"{tmp_path}/elsewhere")
        assert outcome.code == 0, outcome.err
        assert checkout.reported()["program"] == str(checkout.root / "inference.py")


def test_exit_code_is_the_programs(checkout):
    (checkout.root / "inference.py").write_text("import sys; sys.exit(2)")
    assert checkout.run("inference.sh", LONGLIVE_PYTHON=sys.executable).code == 2


def test_several_processes_share_the_cores(checkout):
    outcome = checkout.run("inference.sh", "a.yaml", "--prompt", "a ball", "seed=1", LONGLIVE_PYTHON=sys.executable,
                           LONGLIVE_PROCESSES="2")
    assert outcome.code == 0, outcome.err
    reports = [checkout.reported(rank) for rank in "01"]
    assert [report["rank"] for report in reports] == ["0", "1"]
    for report in reports:
        assert report["args"] == ["a.yaml", "--prompt", "a ball", "seed=1"] and report["world"] == "2"
        assert report["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2))


@pytest.mark.parametrize(("gpus", "processes"), [("0,1", 2), ("0", 1), ("", 1), ("GPU-3a,GPU-4b,MIG-5c", 3)])
def test_a_process_for_each_visible_gpu(checkout, gpus, processes):
    outcome = checkout.run("inference.sh", LONGLIVE_PYTHON="/bin/echo", CUDA_VISIBLE_DEVICES=gpus)
    assert outcome.code == 0, outcome.err
    wanted = f"/several_processes.py {processes} {checkout.root}/inference.py"
    assert (wanted in outcome.out) == (processes > 1) and f"{checkout.root}/inference.py" in outcome.out


@pytest.mark.parametrize(("smi", "processes"), [
    ("echo 'GPU 0: one (UUID: GPU-1)'; echo 'GPU 1: two (UUID: GPU-2)'", 2),
    ("echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9", 1),
])
def test_gpus_are_counted_by_nvidia_smi(checkout, smi, processes):
    (checkout.bin / "nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
    (checkout.bin / "nvidia-smi").chmod(0o755)
    script = 'unset CUDA_VISIBLE_DEVICES; exec bash "$0" "$@"'
    done = subprocess.run(["bash", "-c", script, str(checkout.root / "scripts/inference.sh"), "x"], capture_output=True,
                          text=True, check=False, env={"PATH": f"{checkout.bin}:{os.environ['PATH']}",
                                                       "LONGLIVE_PYTHON": "/bin/echo"})
    assert done.returncode == 0, done.stderr
    assert ("/several_processes.py 2 " in done.stdout) == (processes == 2) and done.stdout.strip().endswith("x")


def test_processes_that_are_no_number_are_refused(checkout):
    outcome = checkout.run("inference.sh", LONGLIVE_PYTHON="/bin/echo", LONGLIVE_PROCESSES="two")
    assert outcome.out == "" and "LONGLIVE_PROCESSES=two" in outcome.error_line()


def test_exit_code_of_several_processes_is_that_of_the_first_that_fails(checkout):
    """Whatever signal the others get then. Nothing is said but what they say."""
    (checkout.root / "inference.py").write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit('mine')\ntime.sleep(60)")
    outcome = checkout.run("inference.sh", LONGLIVE_PYTHON=sys.executable, LONGLIVE_PROCESSES="2")
    assert (outcome.code, outcome.err) == (1, "mine\n")
    (checkout.root / "inference.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    outcome = checkout.run("inference.sh", LONGLIVE_PYTHON=sys.executable, LONGLIVE_PROCESSES="2")
    assert outcome.code == 137 and "was ended by signal SIGKILL" in outcome.err and "Traceback" not in outcome.err


def test_python_that_is_not_there(checkout):
    outcome = checkout.run("inference.sh", LONGLIVE_PYTHON="/nope")
    assert "LONGLIVE_PYTHON=/nope: no such program" in outcome.error_line() and outcome.err.count("\n") == 1


def test_test_script_hides_gpus_and_passes_options_on(checkout):
    python = checkout.bin / "my python"
    python.write_text('#!/bin/sh\necho "GPUs: [$CUDA_VISIBLE_DEVICES] in $PWD: $*"\n')
    python.chmod(0o755)
    outcome = checkout.run("test.sh", "tests/test_a.py", "-x", LONGLIVE_PYTHON=str(python), CUDA_VISIBLE_DEVICES="0,1")
    assert outcome.out == f"GPUs: [] in {checkout.root}: -m pytest -m not gpu tests/test_a.py -x\n"


def test_first_run_makes_the_environment_and_later_ones_use_it(checkout):
    checkout.fake_python()
    first = checkout.run("inference.sh", "seed=1")
    assert first.code == 0, first.err
    assert checkout.asked() == ["venv", "pip requirements.txt"]
    assert checkout.reported()["args"] == ["seed=1"]
    second = checkout.run("inference.sh", "seed=2")
    assert second.code == 0 and second.err == "" and checkout.asked() == []
    assert checkout.reported()["args"] == ["seed=2"]


def test_changed_requirements_are_installed_once_into_the_same_environment(checkout):
    checkout.fake_python()
    checkout.run("inference.sh")
    assert checkout.asked() == ["venv", "pip requirements.txt"]
    (checkout.root / "requirements.txt").write_text("something==2\n")
    checkout.run("interactive_inference.sh")
    assert checkout.asked() == ["pip requirements.txt"]
    checkout.run("inference.sh")
    assert checkout.asked() == []


def test_failed_install_is_said_and_tried_again(checkout):
    checkout.fake_python()
    failed = checkout.run("inference.sh", FAKE_PIP="ERROR: No matching distribution found for something")
    assert "pip could not install requirements.txt" in failed.error_line() and "No matching" in failed.err
    checkout.asked()
    assert checkout.run("inference.sh").code == 0
    assert checkout.asked() == ["pip requirements.txt"]


def test_broken_environment_is_made_anew(checkout):
    checkout.fake_python()
    checkout.run("inference.sh")
    checkout.asked()
    (checkout.root / ".venv/bin/python").unlink()
    (checkout.root / "requirements.txt").write_text("something==2\n")
    assert checkout.run("inference.sh").code == 0
    assert checkout.asked() == ["venv", "pip requirements.txt"]


def test_python_too_old_gives_one_clear_line(checkout):
    checkout.fake_python()
    outcome = checkout.run("inference.sh", FAKE_VERSION="3.8.10")
    line = outcome.error_line()
    assert "Python 3.8.10 is too old" in line and "3.10 or newer" in line and "LONGLIVE_PYTHON" in line
    assert outcome.err.count("\n") == 1 and not (checkout.root / ".venv").exists()


def test_missing_venv_module_says_what_to_install_and_leaves_nothing(checkout):
    checkout.fake_python()
    outcome = checkout.run("inference.sh", FAKE_VENV="ensurepip is not available")
    line = outcome.error_line()
    assert "python3-venv" in line and "LONGLIVE_PYTHON" in line
    assert "ensurepip is not available" in outcome.err
    assert not (checkout.root / ".venv").exists()


def test_no_python_at_all(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "grep", "tr", "rm"):
        (tools / tool).symlink_to(shutil.which(tool))
    outcome = checkout.run("inference.sh", path=str(tools))
    assert "no python3 on the PATH; install Python 3.10 or newer" in outcome.error_line()
    assert outcome.err.count("\n") == 1


def test_python_by_its_other_name_is_found(checkout, tmp_path):
    checkout.fake_python("python")
    for tool in ("bash", "sh", "cat", "dirname", "grep", "tr", "rm", "mkdir", "cp"):
        (checkout.bin / tool).symlink_to(shutil.which(tool))
    assert checkout.run("inference.sh", "a", path=str(checkout.bin)).code == 0
    assert checkout.reported()["args"] == ["a"]


def test_shipped_launcher_starts_the_front_end_from_anywhere(tmp_path):
    done = subprocess.run(["bash", str(SCRIPTS / "inference.sh"), "--help"], cwd=tmp_path, capture_output=True,
                          text=True, check=False,
                          env=os.environ | {"LONGLIVE_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and "--num-output-frames" in done.stdout, done.stderr
