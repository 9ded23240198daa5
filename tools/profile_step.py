"""Where a training step's time goes, by kind of work, with torch.profiler; and torch's own matmul as the ceiling.

    OMP_NUM_THREADS=1 python tools/profile_step.py configs/run/quickstart.yaml [a.b=c ...] [--bench]

The step is the trainer's; the run's data must be prepared, and its folder is not touched. --bench puts the model of
bench_models.py in the run's place (it needs the test extra). Medians of 12 steps after five, and of 12 more with the
profiler, which slows small operations. Step and ceiling are processor time: on a busy machine the clock on the wall
measures the neighbours. For several processes start it with torchrun; the first one's times are printed.
"""

import re
import sys
import tempfile
import time
from collections import Counter
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from lamella.channels import moe
from lamella.config import ModelConfig, load_run
from lamella.model.count import count
from lamella.parallel import layout, mesh
from lamella.parallel.seat import find_seat
from lamella.train import folder, loop

STEPS = 12
KINDS = {  # an operation is of the first kind whose pattern is in the names of its callers and itself
    **{"data": "=data", "metrics": "=metrics", "optimizer": r"Optimizer\.step", "DeepSpeed": "=zero"},
    **{"scan": "SelectiveScan", "convolution": "CausalConv1d", "routing, dispatch": "=moe|index|embedding"},
    **{"attention": "dot_product", "norms": "norm", "softmax, cross entropy": "softmax|cross_entropy|nll"},
    **{"matmul": "aten::(mm|addmm|bmm)", "elementwise, copies": "aten::[^/]*$", "Python, autograd": ""},
}


def label(owner, attribute, word):
    """Shows the profiler every call of a function under a word."""
    function = getattr(owner, attribute)

    def call(*args, **kwargs):
        with record_function(f"={word}"):
            return function(*args, **kwargs)

    setattr(owner, attribute, call)


def add(event, path, forward, found):
    """Gives the time of an operation and of all it calls to their kinds; a backward node counts with its forward."""
    path = f"{forward.get(event.sequence_nr, path) if 'evaluate_function' in event.name else path}/{event.name}"
    if "Backward" not in path:
        forward[event.sequence_nr] = path
    found[next(kind for kind, pattern in KINDS.items() if re.search(pattern, path))] += event.self_cpu_time_total / 1e3
    for child in sorted(event.cpu_children, key=lambda e: e.time_range.start):
        add(child, path, forward, found)


def milliseconds(function):
    begin = time.process_time()
    function()
    return 1e3 * (time.process_time() - begin)


def main():
    words = [word for word in sys.argv[1:] if word != "--bench"]
    aside = [f"runs={tempfile.mkdtemp()}", "tracking.enabled=false"]
    config, seat = load_run(words[0], [*words[1:], *aside]), find_seat()
    if "--bench" in sys.argv:
        import bench_models

        config = config.model_copy(update={"model": ModelConfig.model_validate(bench_models.OURS, strict=False)})
    folder.open_folder(config)
    run = loop.Run(config, mesh.join(seat, layout.resolve(config, seat.world)))
    run.reports = None
    times = [milliseconds(lambda: run.train_step([])) for _ in range(5 + STEPS)][5:]
    parts = [(run.data, "batch", "data"), (run.zero, "step", "zero"), (run.totals, "sum", "metrics")]
    parts += [(loop, "moe_metrics", "metrics"), (moe.Router, "forward", "moe"), (moe, "dispatch", "moe")]
    for owner, attribute, word in [*parts, (run, "train_step", "step")]:
        label(owner, attribute, word)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            run.train_step([])
    found, forward = [Counter() for _ in range(STEPS)], {}
    for root, kinds in zip([e for e in profiler.events() or [] if e.name == "=step"], found, strict=True):
        add(root, "", forward, kinds)
    tokens, width = config.layout.micro_batch * config.train.sequence_length, config.model.d_model
    x, w = torch.randn(tokens, width), torch.randn(6 * width, width)
    matmul = median([milliseconds(lambda: x @ w.t()) for _ in range(99)])
    ceiling = 12 * tokens * width**2 / matmul  # FLOP a millisecond of a processor
    if not run.mesh.first:
        return
    rows = config.train.global_batch_size // run.mesh.layout.data
    work, whole = rows * count(config.model, config.train.sequence_length).training_flops, median(times)
    profiled = median([sum(kinds.values()) for kinds in found])
    print(f"{torch.get_num_threads()} threads, {seat.world} processes: {whole:.1f} ms of a processor a step", end=" ")
    print(f"({min(times):.1f}-{max(times):.1f}), {profiled:.1f} with the profiler, of which")
    for kind, ms in sorted(((k, median([kinds[k] for kinds in found])) for k in KINDS), key=lambda row: -row[1]):
        print(f"{kind:<24}{ms:8.1f} ms {ms / profiled:7.1%}")
    print(f"matmul ceiling {ceiling / 1e6:.0f} GFLOP/s a processor: {work / ceiling:.1f} ms", end=" ")
    print(f"for the step's counted work, {work / ceiling / whole:.0%} of the step")


if __name__ == "__main__":
    main()
