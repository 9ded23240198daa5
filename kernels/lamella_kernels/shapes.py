"""One check for all operators: the letters of a shape suffix name sizes, and a letter means one size in a call.

    sizes = match_shapes("selective_scan", {"x_BTI": x, "A_IN": A})        # {"B": 4, "T": 256, "I": 512, "N": 16}

Operators name their arguments like this in errors too, so that the message says which dim is wrong.
"""

from collections.abc import Mapping

from torch import Tensor


def match_shapes(op: str, tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """Read the sizes off tensors named `name_LETTERS` and hold each letter to one size; None is an absent option.

    Errors: ValueError for a wrong number of dims, a letter with two sizes, or tensors on two devices.
    """
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    first = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        letters = name.rpartition("_")[2]
        shape = tuple(tensor.shape)
        if len(shape) != len(letters):
            raise ValueError(f"{op}: {name} needs {len(letters)} dims [{', '.join(letters)}], got shape {shape}")
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{op}: {name} has shape {shape}, but {letter} is {sizes[letter]} in {source[letter]}")
            source.setdefault(letter, name)
        if first is None:
            first = (name, tensor.device)
        elif tensor.device != first[1]:
            raise ValueError(f"{op}: {name} is on {tensor.device}, but {first[0]} is on {first[1]}; move it there")
    return sizes
