"""What happens to files."""

from pathlib import Path
from random import Random


def flip(file: Path, random: Random | None = None) -> None:
    """One bit, in the middle or anywhere."""
    data = bytearray(file.read_bytes())
    at = len(data) // 2 if random is None else random.randrange(len(data))
    data[at] ^= 1 if random is None else 1 << random.randrange(8)
    file.write_bytes(data)


def zero_page(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[1024:2048] = bytes(1024)
    file.write_bytes(data)


def truncate(file: Path, random: Random | None = None) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: -1 if random is None else random.randrange(len(data))])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")
