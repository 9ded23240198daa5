"""One thread a process: the tensors are small, and threads that outnumber the cores wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
