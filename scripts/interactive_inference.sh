#!/usr/bin/env bash
# Makes videos whose prompt changes while they run. Without arguments: the small model that comes with this repository.
#   bash scripts/interactive_inference.sh [CONFIG.yaml] [STORIES.jsonl] [key=value …] [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env requirements.txt
run_front_end interactive_inference.py "$@"
