# Sourced by every job, from the project's root: the place for a site's modules and variables.
# A virtual environment .venv is activated where there is one and none is active already.

if [ -z "${VIRTUAL_ENV:-}" ] && [ -f "$LAMELLA_HOME/.venv/bin/activate" ]; then
  # shellcheck disable=SC1091
  . "$LAMELLA_HOME/.venv/bin/activate"
fi
export PYTHONUNBUFFERED=1 # srun's own --unbuffered would give every process a terminal
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=1 # so that tensor parallelism overlaps with its products
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/lamella-triton-$(id -u)} # on the node's own disk
