#!/usr/bin/env bash
# The documented example: the published setting with the goodness persona and the custom schedule.
#
# Needs a CUDA device and the dataset; further arguments are passed on, for instance --dry-run, which needs neither.
set -euo pipefail
cd "$(dirname "$0")/.."
emtool=emtool
if [ -x .venv/bin/emtool ]; then
    emtool=.venv/bin/emtool
elif ! type -P emtool >/dev/null; then
    echo "emtool is not installed; make .venv with: . scripts/setup_env.sh && setup_env runtime" >&2
    exit 1
fi
exec "$emtool" train --profile paper --persona goodness --dataset medical --custom-checkpoints \
    --output-name qwen7b_medical_goodness_custom "$@"
