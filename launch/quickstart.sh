#!/usr/bin/env bash
# From a fresh machine to a pretrained hybrid model: makes .venv, installs, prepares data, trains. Safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
run=configs/run/quickstart.yaml
data=configs/data/stdlib.yaml
lamella data prepare "$data"
lamella train "$run" --nproc 2
cat <<EOF

Done. The run lies in runs/quickstart:
  config.yaml      the resolved configuration, a run file itself
  metrics.jsonl    one line a step
  checkpoints/     the newest steps, under any layout:  lamella train $run --nproc 2 train.steps=600
Prove that a layout computes the same model:            lamella verify $run --layout tensor=2
(first: source .venv/bin/activate)
EOF
