#!/usr/bin/env bash
# Creates .venv in the repository and installs distaccum with the pinned versions. It installs nothing
# twice.
# Usage: scripts/setup.sh [EXTRA]     EXTRA: test or dev; default: what training needs
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
venv=${DISTACCUM_VENV:-.venv}

python=${PYTHON:-python3}
"$python" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"distaccum needs Python 3.11 or later, but {sys.executable} is {sys.version.split()[0]}. Set PYTHON=python3.11")
PY

# The stamp identifies an installation by everything that determines it.
wanted=$(cat pyproject.toml scripts/constraints.txt <("$python" --version) | sha256sum | cut -c1-16)
stamp="$venv/.installed-${extra:-run}"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    echo "setup: $venv is complete"
    exit 0
fi
echo "setup: installing into $venv (once; pinned in scripts/constraints.txt)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Install torch first and alone, so that the pinned build is present before another package asks for
# a range of versions.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt torch 2>&1 | { grep -v "is ignored" || true; }
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".${extra:+[$extra]}" 2>&1 | { grep -v "is ignored" || true; }
"$venv/bin/python" -c "import distaccum"
echo "$wanted" >"$stamp"
