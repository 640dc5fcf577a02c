#!/usr/bin/env bash
# Kills training runs at random moments, starts them again, and compares them bit for bit with
# undisturbed runs.
# Usage: scripts/chaos.sh N [SEED]      exit code 1 if any run differs
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
export OMP_NUM_THREADS=1 # there are more ranks than cores
exec "${DISTACCUM_VENV:-.venv}/bin/python" tests/app/resume/chaos.py "${1:?how many runs}" "${2:-0}"
