#!/usr/bin/env bash
# Installs what the test suite needs and runs it, on two processes at a time. Arguments are passed to
# pytest, which then runs on one: scripts/test.sh tests/core/test_plan.py -k property
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
unset PYTHONDONTWRITEBYTECODE # a start with a new interpreter need not compile again
export OMP_NUM_THREADS=1 # the tests start more ranks than there are cores
[ $# -gt 0 ] || set -- --numprocesses 2 --dist worksteal --durations 10
exec "${DISTACCUM_VENV:-.venv}/bin/python" -m pytest "$@"
