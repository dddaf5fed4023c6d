#!/usr/bin/env bash
# Downloads Wan 2.1 and LongLive from Hugging Face; see: bash scripts/download.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env requirements.txt
exec "$PYTHON" "$ROOT/scripts/download.py" "$@"
