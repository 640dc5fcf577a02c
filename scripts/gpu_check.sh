#!/usr/bin/env bash
# What can only be shown on a GPU: numerics with NCCL, bf16, host syncs, speed and memory. Ten minutes at most.
#
#   scripts/gpu_check.sh                       one GPU, and all of them where there are more
#   scripts/gpu_check.sh --device cpu --tiny   the same programs on a CPU with gloo, without the parts that need CUDA
#
# It needs `python3` (or the one in $PYTHON) with torch 2.11 or later, and nothing else: no package index, no
# installation, no wheels. It prints a report and writes it to benchmarks/results/gpu-<name>-<date>.json. Exit code 1:
# a check failed, and the report says which; 2: wrong arguments.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The package as it lies here, and the models and reference of the numerical tests.
export PYTHONPATH="$root:$root/tests/numerics${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
exec "${PYTHON:-python3}" "$root/benchmarks/gpu_check.py" "$@"
