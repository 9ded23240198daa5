# Sourced by the other scripts, from the project's root: a virtual environment .venv with the project in it, and activated.
# LAMELLA_EXTRAS names extras, as "test". PYTHON names the interpreter (3.11 or newer).

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "lamella: $("$python" --version 2>&1) is too old; Python 3.11 or newer is needed (set PYTHON=/path/to/python3.11)" >&2
  exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
# shellcheck disable=SC1091
. .venv/bin/activate
export PIP_DISABLE_PIP_VERSION_CHECK=1

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# torch comes first: a CPU build where there is no GPU, never gigabytes of CUDA.
install_torch() {
  local torch
  torch=$(grep '^torch==' constraints.txt)
  if has_gpu || [ "$(uname -s)" != Linux ]; then
    pip install -q -c constraints.txt "$torch"
  else
    pip install -q --no-index --no-deps "$torch" 2>/dev/null ||
      pip install -q --index-url https://download.pytorch.org/whl/cpu -c constraints.txt "$torch" || {
      echo "lamella: no CPU build of $torch found; install one into .venv and start again" >&2
      exit 2
    }
  fi
}

wanted="$(cat pyproject.toml kernels/pyproject.toml kernels/lamella_kernels/native.h kernels/lamella_kernels/*/*.c \
  constraints.txt launch/install.sh) ${LAMELLA_EXTRAS:-}"
wanted=$(printf '%s' "$wanted" | cksum)
if [ "$(cat .venv/lamella-installed 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (some minutes the first time)"
  python -c 'import torch' 2>/dev/null || install_torch
  DS_BUILD_OPS=0 pip install -q -c constraints.txt -e ./kernels -e ".${LAMELLA_EXTRAS:+[$LAMELLA_EXTRAS]}"
  printf '%s' "$wanted" >.venv/lamella-installed
fi
