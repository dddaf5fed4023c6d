#!/usr/bin/env bash
# Makes a video of each prompt. Without arguments: the small model that comes with this repository, on any machine.
#   bash scripts/inference.sh [CONFIG.yaml] [PROMPTS.txt] [key=value …] [--prompt TEXT] [--seconds S] [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env requirements.txt
run_front_end inference.py "$@"
