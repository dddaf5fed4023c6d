# Sourced by the other scripts. Sets ROOT; ensure_env sets PYTHON to an interpreter that has what a requirements file
# names, in .venv, made and filled on the first run.

ROOT="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "error: $*" >&2
  exit 2
}

# ensure_env requirements.txt
# LONGLIVE_PYTHON=/path/to/python uses that interpreter as it is, and installs nothing.
ensure_env() {
  local requirements="$ROOT/$1" venv="$ROOT/.venv" base made
  if [ -n "${LONGLIVE_PYTHON:-}" ]; then
    PYTHON="$LONGLIVE_PYTHON"
    command -v "$PYTHON" >/dev/null || fail "LONGLIVE_PYTHON=$PYTHON: no such program; give the path of a Python"
    return
  fi
  base="$(command -v python3 || command -v python)" || fail "no python3 on the PATH; install Python 3.10 or newer"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$base" --version 2>&1) is too old; install Python 3.10 or newer, or set LONGLIVE_PYTHON"
  PYTHON="$venv/bin/python"
  local stamp="$venv/.installed-$1" wanted
  # requirements-test.txt includes requirements.txt, so both count.
  wanted="$(cat "$ROOT"/requirements*.txt | "$base" -c 'import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read() + sys.version.encode()).hexdigest())')"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if ! "$PYTHON" -c '' 2>/dev/null; then
    echo "Making $venv" >&2
    rm -rf "$venv"
    made="$("$base" -m venv "$venv" 2>&1)" || {
      rm -rf "$venv"
      echo "$made" >&2
      fail "$base can't make a virtual environment; on Debian or Ubuntu: sudo apt install python3-venv (or set LONGLIVE_PYTHON to an interpreter that has what $1 names)"
    }
  fi
  echo "Installing what $1 names into $venv (once; a few minutes)" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$requirements" ||
    fail "pip could not install $1; see the lines above"
  echo "$wanted" >"$stamp"
}

# Number of GPUs that a program started now would see.
visible_gpus() {  # grep -c fails where it counts 0, nvidia-smi where there is no driver
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9A-Za-z]' || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
  else
    echo 0
  fi
}

# threads_each 8: CPU cores for each of 8 processes, at least 1.
threads_each() {
  local cores
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)"
  echo "$((cores > $1 ? cores / $1 : 1))"
}

# run_front_end inference.py arguments…: one process, or one for each GPU where there are several.
# LONGLIVE_PROCESSES=N sets their number.
run_front_end() {
  local program="$ROOT/$1" processes
  shift
  processes="${LONGLIVE_PROCESSES:-$(visible_gpus)}"
  # CPU threads that wait for each other sleep. By default they spin, and whatever else runs makes a small model crawl.
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
  case "$processes" in *[!0-9]*) fail "LONGLIVE_PROCESSES=$processes is not a number of processes" ;; esac
  if [ "$processes" -gt 1 ]; then
    # torchrun gives each process one thread where this is not set; the text encoder may run on the CPU.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(threads_each "$processes")}"
    exec "$PYTHON" "$ROOT/scripts/several_processes.py" "$processes" "$program" "$@"
  fi
  exec "$PYTHON" "$program" "$@"
}
