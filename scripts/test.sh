#!/usr/bin/env bash
# The whole test suite, with what it needs. Arguments go to pytest: scripts/test.sh tests/core/test_plan.py -k property
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
export OMP_NUM_THREADS=1 # ranks of the tests are many, cores are few
exec "${DISTACCUM_VENV:-.venv}/bin/python" -m pytest "$@"
