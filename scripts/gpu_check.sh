#!/usr/bin/env bash
# Checks what only a GPU can show: numerics with NCCL, bf16, host syncs, speed and memory. It takes at
# most ten minutes.
#
#   scripts/gpu_check.sh                       one GPU, and all GPUs if there are more
#   scripts/gpu_check.sh --device cpu --tiny   the same programs on a CPU with gloo, without the parts that need CUDA
#
# It needs `python3` (or the interpreter in $PYTHON) with torch 2.11 or later and numpy. It does not
# install this package. numpy may be missing, because torch does not require it, but torch.distributed
# cannot send objects without it. For a machine without a package index, download the wheel of numpy
# on a machine that has one:
#
#   scripts/gpu_check.sh --download DIR [--python-version 3.12 --platform manylinux_2_28_x86_64 ...]   (pip download)
#   scripts/gpu_check.sh --wheels DIR ...      then here: a missing numpy is taken from DIR, but not installed
#
# It prints a report and writes it to benchmarks/results/gpu-<name>-<date>.json. Exit code 1: a check
# failed (the report says which), or none could run. Exit code 2: wrong arguments.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
wheels=

if [ "${1:-}" = --download ] || [ "${1:-}" = --wheels ]; then
  if [ -z "${2:-}" ]; then echo "$1 needs a folder" >&2; exit 2; fi
fi
if [ "${1:-}" = --download ]; then
  folder=$2
  shift 2
  exec "$python" -m pip download --only-binary=:all: --no-deps --dest "$folder" "$@" "numpy>=1.26"
fi
if [ "${1:-}" = --wheels ]; then
  wheels=$2
  shift 2
fi

# Use the package from this checkout, and the models and the reference of the numerical tests.
export PYTHONPATH="$root:$root/tests/support${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
if ! "$python" -c 'import numpy' 2>/dev/null; then
  if [ -z "$wheels" ]; then
    echo "numpy is missing. Run scripts/gpu_check.sh --download DIR on a machine with a package index, then here with --wheels DIR" >&2
    exit 1
  fi
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$site" numpy
  export PYTHONPATH="$site:$PYTHONPATH"
fi
"$python" "$root/benchmarks/gpu_check.py" "$@"
