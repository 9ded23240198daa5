"""Imported once by the server that `local` forks from: everything a rank needs, nothing run."""

import lamella.parallel.cpu_host
import lamella.parallel.tensor  # noqa: F401
