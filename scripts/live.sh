#!/usr/bin/env bash
# Opens a page where a video plays while it is made and follows what you type. Without arguments: the small model.
#   bash scripts/live.sh [CONFIG.yaml] [key=value …] [--port N] [--terminal] [--help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
ensure_env requirements.txt
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
exec "$PYTHON" "$ROOT/live.py" "$@"
