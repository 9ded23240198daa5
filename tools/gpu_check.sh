#!/usr/bin/env bash
# What only a GPU shows, in one call of under ten minutes and without a network:
#
#     bash tools/gpu_check.sh [OUT [WHEELS]]
#
# The host has torch with CUDA and triton; WHEELS (default: wheels) is a folder with the wheels that it lacks, see
# below. OUT (default: gpu-check) gets a log of every step, steps.jsonl with their exit codes and seconds, kernels.jsonl
# (tools/bench_kernels.py), report.txt (registers, spills, tensor cores of every kernel) and summary.txt. A step that
# fails or runs into its limit does not keep the next one from running; the exit code is 1 then.
#
# To fill WHEELS where there is a network:
#     DS_BUILD_OPS=0 pip wheel --no-deps -c constraints.txt -w wheels deepspeed megatron-core omegaconf \
#         antlr4-python3-runtime hjson py-cpuinfo ninja msgpack pydantic-settings flash-linear-attention
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check} wheels=${2:-wheels}
mkdir -p "$out"
out=$(cd "$out" && pwd)
: >"$out/steps.jsonl"

step() { # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin rc
  shift 2
  begin=$(date +%s)
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  printf '{"step": "%s", "rc": %d, "seconds": %d}\n' "$name" "$rc" $(($(date +%s) - begin)) | tee -a "$out/steps.jsonl"
}

install() {
  python3 -m venv --system-site-packages "$out/venv"
  if [ -d "$wheels" ]; then "$out/venv/bin/pip" install -q --no-index --no-deps "$wheels"/*.whl; fi
  DS_BUILD_OPS=0 "$out/venv/bin/pip" install -q --no-index --no-deps --no-build-isolation -e ./kernels -e .
}
export -f install
export out wheels

step install 120 bash -c install
PATH="$out/venv/bin:$PATH"
export OMP_NUM_THREADS=4 TOKENIZERS_PARALLELISM=false TRITON_CACHE_DIR="$out/triton-cache"
run=configs/run/quickstart.yaml
small=(tracking.enabled=false "runs=$out/runs" "data.path=$out/stdlib")

step device 20 nvidia-smi
step versions 60 python -c 'import torch, triton; print(torch.__version__, triton.__version__, torch.version.cuda)
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
step kernels 150 python -m pytest tests/kernels -q -m "not full" -p no:cacheprovider
step report 60 python -m lamella_kernels.report --arch 90
step prepare 60 lamella data prepare configs/data/stdlib.yaml "path=$out/stdlib"
step train 60 lamella train "$run" --nproc 1 "${small[@]}" name=cuda train.steps=40
step resume 60 lamella train "$run" --nproc 1 "${small[@]}" name=cuda train.steps=60
step verify 90 lamella verify "$run" "data.path=$out/stdlib" --layout tensor=1,micro_batch=4
step warm-up 60 lamella kernels warm-up "$run" model=jamba-1b train.precision=bf16 train.sequence_length=4096 "${small[@]}"
step step 90 python -m tools.bench_step --rounds 8
step peer 60 python -m tools.bench_step --sides transformers --rows 1 --length 1024 --rounds 2
step bench 150 python -m tools.bench_kernels --json --lengths 2048 8192 32768 --rounds 10
grep '^{' "$out/bench.log" >"$out/kernels.jsonl" || true
cp "$out/report.log" "$out/report.txt"

python - "$out" >"$out/summary.txt" <<'EOF'
import json, pathlib, sys

folder = pathlib.Path(sys.argv[1])
for line in (folder / "steps.jsonl").read_text().splitlines():
    step = json.loads(line)
    print(f"{step['step']:<10}{'ok' if step['rc'] == 0 else 'rc %d' % step['rc']:<8}{step['seconds']:>5} s")
for name in ("step", "peer"):
    print((folder / f"{name}.log").read_text().strip().splitlines()[-2:])
for line in (folder / "kernels.jsonl").read_text().splitlines():
    found = json.loads(line)
    if "op" not in found:
        print(found)
        continue
    times = ", ".join(f"{k[:-6]} {v:.2f}x" for k, v in found.items() if k.endswith("_times"))
    limits = ", ".join(f"{k} {found[k]:.0%}" for k in ("of_copy", "of_matmul") if k in found)
    print(f"{found['op']:<18}{found['rows']:>3} x {found['length']:<7}{found['what']:<20}{found['ours_ms']:8.3f} ms  {times}  {limits}")
EOF
cat "$out/summary.txt"
! grep -qv '"rc": 0' "$out/steps.jsonl"
