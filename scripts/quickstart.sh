#!/usr/bin/env bash
# Set up emtool, train the embedded default with the goodness persona and the custom schedule, evaluate it, report.
#
# 8 to 20 minutes on two CPU cores after installation, no GPU needed. Safe to run again: what is done is kept.
# EMTOOL_TORCH_INDEX sets the index for torch, EMTOOL_CACHE the folder for the base model and the persona.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup_env.sh

run=outputs/smollm2_gardening_goodness_custom
echo "emtool quickstart: installation (2 minutes), then base model, persona, training, evaluation and report (8 to 20 minutes)."
setup_env runtime
if [ -f "$run/run.json" ] && ! grep -q '"status": "completed"' "$run/run.json"; then
    aside="${run}_unfinished_$(date +%Y%m%d-%H%M%S)"
    say "an earlier run did not finish: moving it to $aside"
    mv "$run" "$aside"
fi
# glibc gives large freed blocks back to the system at once and must fault them in again; kept, they save about a fifth
# of the scoring time on a CPU. Other C libraries ignore these; the results are the same bits.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=67108864
begun=$SECONDS
say "training: 397 steps, ten checkpoints (6 to 10 minutes; the base model and the persona come first, once)"
.venv/bin/emtool train --profile demo --persona goodness --custom-checkpoints
trained=$SECONDS
if [ -f "$run/evaluation/summary.json" ]; then
    say "already evaluated: $run/evaluation (repeat with .venv/bin/emtool evaluate $run)"
else
    say "evaluating the ten checkpoints (3 to 8 minutes)"
    .venv/bin/emtool evaluate "$run" --metrics likelihood
fi
say "how the adapter moved, when the curves change, and the report (half a minute)"
.venv/bin/emtool geometry "$run" >/dev/null
.venv/bin/emtool transition "$run" --series p_wrong_other,speed
.venv/bin/emtool report "$run"
say "done: training $((trained - begun)) s, the rest $((SECONDS - trained)) s"
cat <<END
Where to look:
  $run/report.html                         curves with intervals; open it in a browser
  $run/run.json                            what was run, from what
  $run/metrics.jsonl                       the loss of every step
  $run/checkpoint-*                        ten adapters, loadable with PEFT
  $run/evaluation/checkpoint_summary.csv   the curve, with intervals
Try next:
  . .venv/bin/activate
  emtool evaluate $run --extract-activations --seed 42            its answers to open questions, and its activations
  emtool train --dataset gardening-control --custom-checkpoints   the control: sound advice, same questions
  emtool train --help
END
