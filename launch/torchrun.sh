#!/usr/bin/env bash
# Trains on one or several machines: launch/torchrun.sh RUN.yaml [a.b=c ...]
# On every machine set NNODES (default 1), NPROC (processes here; default: GPUs, else 1) and, for several machines,
# MASTER=host:port of one of them. Everything is validated before a process starts.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/install.sh
[ $# -ge 1 ] || { echo "usage: launch/torchrun.sh RUN.yaml [a.b=c ...]" >&2; exit 2; }
nnodes=${NNODES:-1}
nproc=${NPROC:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
[ "$nproc" -gt 0 ] || nproc=1
if [ "$nnodes" -gt 1 ] && [ -z "${MASTER:-}" ]; then
  echo "launch/torchrun.sh: NNODES=$nnodes needs MASTER=host:port, the same on every machine" >&2
  exit 2
fi
lamella train "$@" --dry-run --nproc $((nnodes * nproc))
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
where=(--standalone)
[ "$nnodes" -eq 1 ] || where=(--rdzv-backend=c10d --rdzv-endpoint="$MASTER" --rdzv-id="${RDZV_ID:-lamella}")
exec torchrun --nnodes="$nnodes" --nproc-per-node="$nproc" "${where[@]}" -m lamella train "$@"
