#!/usr/bin/env bash
# Runs every test on the CPU. Arguments go to pytest: bash scripts/test.sh tests/test_kv_cache.py -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env requirements-test.txt
cd "$ROOT"
CUDA_VISIBLE_DEVICES="" exec "$PYTHON" -m pytest -m "not gpu" "$@"
