"""What the compiler makes of every Triton kernel at its tiles, for GPUs that need not be there.

    python -m lamella_kernels.report [--arch 90 ...] [--op rmsnorm] [--json]

An op's gpu.py names the calls (`examples`); they run on meta tensors, and each kernel they would launch is compiled as
the launch would be, by the assembler that triton brings. Exit code 1 where a kernel has a fault: registers spill, a
block does not fit on a multiprocessor, or a product of 16-bit blocks does without tensor cores.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # the assembler tells of spills only when it runs

import triton
import triton.runtime
from triton.backends.compiler import GPUTarget

from lamella_kernels import ops, tiles
from lamella_kernels.forms import operators

# Shared memory of a multiprocessor and what one block may take of it, bytes (CUDA C++ Programming Guide, table of
# compute capabilities); registers, warps and blocks are the same for all three.
SHARED = {80: (167936, 166912), 90: (233472, 232448), 100: (233472, 232448)}
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024


@dataclass(frozen=True)
class Row:
    """One compiled kernel. spill in bytes, shared in bytes a block, blocks a multiprocessor; dots: 16-bit products."""

    op: str
    example: str
    kernel: str
    arch: int
    warps: int
    stages: int
    registers: int
    spill: int
    shared: int
    blocks: int
    instructions: int
    tensor_core: int
    dots: int

    @property
    def fault(self) -> str:
        if self.spill:
            return f"{self.spill} bytes spill"
        if not self.blocks:
            return f"no block fits: {self.registers} registers, {self.shared} bytes of shared memory"
        return "no tensor cores" if self.dots and not self.tensor_core else ""


def rows(op: str, arch: int, seen: set[str] | None = None) -> Iterator[Row]:
    """Every kernel that the op's examples launch, each variant once."""
    seen = set() if seen is None else seen
    found: list[Row] = []
    gpu = importlib.import_module(f"lamella_kernels.{op}.gpu")
    examples = cast("dict[str, Callable[[], object]]", gpu.examples())
    triton.runtime.driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    for example, call in examples.items():

        def compiled(kernel: Any, grid: Any, arguments: Any, options: Any, example: str = example) -> None:
            with _assembler() as log:
                code = kernel.run(*arguments, grid=grid, warmup=True, **options)
            if code.hash not in seen:
                seen.add(code.hash)
                found.append(_row(op, example, kernel.__name__, arch, code, log.getvalue()))

        with ops.listening(compiled), tiles.compiled_for(arch):
            call()
        yield from found
        found.clear()


class _Driver:
    """As much of a driver as a launch that only compiles asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextlib.contextmanager
def _assembler() -> Iterator[io.StringIO]:
    """What it prints while kernels compile."""
    triton.knobs.nvidia.dump_ptxas_log = True
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        yield text


def _row(op: str, example: str, kernel: str, arch: int, code: Any, log: str) -> Row:
    usage, listing = _disassembled(code.asm["cubin"])
    registers = int(_found(r"REG:(\d+)", usage))
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills, "the assembler's log does not tell of spills"
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", listing, re.MULTILINE)
    assert names, "cuobjdump shows no instructions"
    warps, shared = code.metadata.num_warps, code.metadata.shared
    total, most = SHARED[arch]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    blocks = min(by_registers, WARPS // warps, total // (shared + RESERVED), BLOCKS) if shared <= most else 0
    return Row(
        op,
        example,
        kernel,
        arch,
        warps,
        code.metadata.num_stages,
        registers,
        sum(int(number) for pair in spills for number in pair),
        shared,
        blocks,
        len(names),
        sum(bool(re.match(r"HGMMA|UTC.*MMA|HMMA", name)) for name in names),
        len(re.findall(r"tt\.dot .*: tensor<\d+x\d+x(?:bf16|f16)", code.asm["ttir"])),
    )


def _disassembled(cubin: bytes) -> tuple[str, str]:
    """The usage of resources and the instructions."""
    tool = str(Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        asked = ("--dump-resource-usage", "-sass")
        usage, listing = (
            subprocess.run([tool, word, file.name], capture_output=True, text=True, check=True).stdout for word in asked
        )
    return usage, listing


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"{pattern} is not in: {text[:500]}"
    return match[1]


def _print(found: list[Row]) -> None:
    lines = [{**asdict(row), "fault": row.fault} for row in found]
    widths = {name: max(len(name), *(len(str(line[name])) for line in lines)) for name in lines[0]}
    print(f"triton {triton.__version__}")
    for line in ({name: name for name in widths}, *lines):
        print("  ".join(str(line[name]).ljust(width) for name, width in widths.items()).rstrip())


def _alone(wanted: Sequence[str], arch: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="lamella-report-") as cache:
        triton.knobs.cache.dir = cache
        for op in wanted:
            yield from rows(op, arch)


def _each(wanted: Sequence[str], architectures: Sequence[int]) -> Iterator[Row]:
    """A process for each: a kernel that was compiled once keeps its target."""
    names = [field.name for field in fields(Row)]
    for arch in architectures:
        words = ["--json", "--arch", str(arch), *(word for op in wanted for word in ("--op", op))]
        command = [sys.executable, "-m", "lamella_kernels.report", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode and not any(line["fault"] for line in lines):
            raise SystemExit(done.returncode)  # it has said why
        yield from (Row(**{name: line[name] for name in names}) for line in lines)


def main() -> int:
    what = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m lamella_kernels.report", description=what)
    parser.add_argument("--arch", type=int, action="append", choices=tiles.ARCHITECTURES, help="default: all")
    parser.add_argument("--op", action="append", choices=operators(), help="default: all")
    parser.add_argument("--json", action="store_true", help="one object a kernel, one a line")
    given = parser.parse_args()
    architectures, wanted = given.arch or tiles.ARCHITECTURES, given.op or operators()
    found: list[Row] = []
    for row in _alone(wanted, architectures[0]) if len(architectures) == 1 else _each(wanted, architectures):
        found.append(row)
        if given.json:
            print(json.dumps({**asdict(row), "fault": row.fault}), flush=True)
    if not given.json:
        _print(found)
    return int(any(row.fault for row in found))


if __name__ == "__main__":
    sys.exit(main())
