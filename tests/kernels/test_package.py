"""The package as a whole."""

import subprocess
import sys


def test_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import lamella_kernels"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
