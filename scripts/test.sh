#!/usr/bin/env bash
# Runs every test on the CPU. Arguments go to pytest: bash scripts/test.sh tests/test_kv_cache.py -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env requirements-test.txt
cd "$ROOT"
# One thread: on tensors as small as the tests' several wait for each other, on a busy machine for minutes.
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$PYTHON" -m pytest -m "not gpu" "$@"
