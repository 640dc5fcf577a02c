#!/usr/bin/env bash
# Runs the main job on any machine: two ranks train a small GPT on real text, and gradient
# accumulation reaches the effective batch size.
# Usage: scripts/demo.sh [OVERRIDE ...]     for example: scripts/demo.sh parallel=fsdp accum.sync=gather_once
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
"$here/scripts/setup.sh"
venv=$(cd "$here" && cd "${DISTACCUM_VENV:-.venv}" && pwd)
# On a machine with one GPU, two ranks cannot share it; there the demo runs one rank per GPU.
ranks=$("$venv/bin/python" -c 'import torch; n = torch.cuda.device_count(); print(min(2, n) if n else 2)')
cores=$(nproc 2>/dev/null || echo 2)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores / ranks > 0 ? cores / ranks : 1 ))}
echo "demo: torchrun --nproc-per-node $ranks -m distaccum train experiment=demo $*"
exec "$venv/bin/torchrun" --nproc-per-node "$ranks" -m distaccum train experiment=demo "$@"
