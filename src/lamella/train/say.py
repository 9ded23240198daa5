"""A line for whoever watches the run. This file never imports torch."""

import sys


def say(text: str) -> None:
    print(f"lamella: {text}", file=sys.stderr, flush=True)
