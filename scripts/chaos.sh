#!/usr/bin/env bash
# Kill training runs at random moments, start them again, and compare with undisturbed ones bit for bit.
# Usage: scripts/chaos.sh N [SEED]      exit code 1 if any run differs
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
export OMP_NUM_THREADS=1 # ranks are many, cores are few
exec "${DISTACCUM_VENV:-.venv}/bin/python" tests/app/resume/chaos.py "${1:?how many runs}" "${2:-0}"
