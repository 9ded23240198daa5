"""One thread a process: the tensors are small, and threads that outnumber the cores wait for each other.

Without a GPU, Triton's kernels are interpreted (tests/kernels/interpreter.py); it asks for that before it is imported.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
