#!/usr/bin/env bash
# Runs every night the checks that take too long for each change. All parts run; exit code 1 if any
# part failed.
# Usage: scripts/nightly.sh [START]     START: the first seed; default: another one each day
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh test
export OMP_NUM_THREADS=1 # there are more ranks than cores
python="${DISTACCUM_VENV:-.venv}/bin/python"
start=${1:-$(( $(date +%s) / 86400 * 300 ))}
failed=0

# 300 training loops composed at random; each must be exact, or refused on all ranks. The test suite
# always runs the same 20 of them. Mistakes and surroundings combine in thousands of pairs, so each
# night tries other ones. To run a failing seed again, use --case.
echo "nightly: loops composed at random, from seed $start"
"$python" tests/step/fuzz/fuzz.py --seeds 300 --start "$start" || failed=1

# What repeats the suite in other combinations; docs/testing.md has a reason for each.
echo "nightly: tests that are marked so"
"$python" -m pytest -m nightly --numprocesses 2 --dist worksteal || failed=1

exit "$failed"
