"""A process that encodes: tasks come in by its standard input, results go out by its standard output.

Each is a pickle behind its length. The pipe's other end is the parent's alone, so that a worker reads the end of its
input, and ends, when the parent is gone, however it went.
"""

import os
import pickle
import signal
import struct
import sys
from typing import IO, Any

LENGTH = struct.Struct("<Q")


def send(pipe: IO[bytes], thing: Any) -> None:
    raw = pickle.dumps(thing, pickle.HIGHEST_PROTOCOL)
    pipe.write(LENGTH.pack(len(raw)))
    pipe.write(raw)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Raises EOFError when the other side is gone."""
    head = pipe.read(LENGTH.size)
    raw = pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
    if not raw:
        raise EOFError
    return pickle.loads(raw)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to stop
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no result
    from lamella.data.prepare.encode import Encoder
    from lamella.data.tokenizer import load

    try:
        folder, dtype, heldout = receive(tasks)
        encode = Encoder(load(folder), dtype, heldout)
        while True:
            send(results, encode(receive(tasks)))
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    main()
