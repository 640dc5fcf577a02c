#!/usr/bin/env bash
# Installs what the test suite needs and runs it. Arguments are passed to pytest:
# scripts/test.sh tests/core/test_plan.py -k property
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
export OMP_NUM_THREADS=1 # the tests start more ranks than there are cores
exec "${DISTACCUM_VENV:-.venv}/bin/python" -m pytest "$@"
