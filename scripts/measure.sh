#!/usr/bin/env bash
# What README says of speed on a GPU, measured on this one without a checkpoint: bash scripts/measure.sh FOLDER [PART…]
# Parts: tests decoder passes bf16 fp8 long; all of them take about 9 minutes. One that fails or takes too long does not stop the
# others. FOLDER gets the results as JSON and log.txt; the tables are printed at the end.
# LATENTS="60 120" makes shorter videos, LONGLIVE_PYTHON=/path/to/python uses that interpreter in place of .venv.
set -uo pipefail
source "$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/_env.sh"
[ $# -ge 1 ] || fail "which folder? bash scripts/measure.sh FOLDER [PART…]"
mkdir -p "$1" || fail "$1: can't be made"
out="$(cd "$1" && pwd)"
shift
parts=("$@")
[ $# -ge 1 ] || parts=(tests decoder passes bf16 fp8 long)
ensure_env requirements-test.txt
cd "$ROOT" || exit
export PYTHONUNBUFFERED=1

# run NAME SECONDS COMMAND…: says how long it took; what it prints goes to log.txt, and its last line to the terminal.
run() {
  local name="$1" limit="$2" began=$SECONDS code=0 log
  shift 2
  log="$(mktemp)"
  timeout "$limit" "$PYTHON" "$@" >"$log" 2>&1 || code=$?
  { echo "== $name: $*"; cat "$log"; } >>"$out/log.txt"
  echo "== $name: $((SECONDS - began)) s, exit code $code: $(tail -n 1 "$log" | cut -c 1-160)"
  [ "$code" = 0 ] || tail -n 15 "$log" | cut -c 1-200
  rm -f "$log"
}

# bench NAME SECONDS OPTION…: one run of the benchmark.
bench() {
  run "$1" "$2" scripts/benchmark.py --long 0 --json "$out/$1.json" "${@:3}"
}

read -ra latents <<<"${LATENTS:-60 240}"
large=(--also 30 height=720 width=1280)
tiny=(vae=taehv vae_ckpt=random)
# One denoising step and the tiny decoder leave, of a video of a thousand latents, what could grow.
thousand=(1000 "${tiny[@]}" "denoising_step_list=[1000]")
for part in "${parts[@]}"; do
  case "$part" in
    tests) # compiling kernels takes most of the time, on the CPU: both files at once
      run "tests of FP8" 240 -m pytest -m gpu -q tests/test_gpu_fp8.py &
      run "other tests" 240 -m pytest -m gpu -q --ignore tests/test_gpu_fp8.py --continue-on-collection-errors
      wait ;;
    decoder | passes) run "$part" 120 "scripts/tune_$part.py" --json "$out/tune_$part.json" ;;
    bf16) bench bf16 300 --latents "${latents[@]}" --cold 2 --roofline 0.05 "${large[@]}" ;;
    fp8) bench fp8 240 --latents "${latents[@]}" --cold 0 --roofline 0 --precision fp8 --also "${latents[-1]}" "${tiny[@]}" ;;
    long) bench long 200 --latents 36 --switches 0 --cold 0 --roofline 0 --also "${thousand[@]}" \
      --also "${thousand[@]}" model_kwargs.use_infinite_attention=true ;;
    *) echo "no part $part: tests decoder passes bf16 fp8 long" >&2 ;;
  esac
done

for name in "${parts[@]}"; do
  case "$name" in decoder | passes) sed -n "/^== $name: /,/^== /{/^== /d;p}" "$out/log.txt" ;; esac
done
results=()
for name in bf16 fp8 long; do
  if [ -f "$out/$name.json" ]; then
    results+=("$out/$name.json")
    sed -n "/^== $name: /,/^== /p" "$out/log.txt" | sed -n '/^GPU busy/,$p' | grep -v "^==" | head -n 9 | cut -c 1-110
  fi
done
[ ${#results[@]} = 0 ] || "$PYTHON" scripts/benchmark.py --compare "${results[@]}"
