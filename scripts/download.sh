#!/usr/bin/env bash
# Download the weights that inference needs; see: scripts/download.sh --help
set -euo pipefail

scripts="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ -f "$scripts/_env.sh" ]]; then
    source "$scripts/_env.sh"
    ensure_env requirements.txt
fi
exec "${PYTHON:-python3}" "$scripts/download.py" "$@"
