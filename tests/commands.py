"""The command line in this process."""

import sys

from lamella.cli import main as command


def call(*words) -> int:
    """Runs `lamella WORDS`. Returns its exit code."""
    given, sys.argv = sys.argv, ["lamella", *map(str, words)]
    try:
        command.main()
    except SystemExit as done:
        return int(done.code or 0)
    finally:
        sys.argv = given
    return 0
