"""The header of a GGUF file: what is in it, and where."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from tl_entity.errors import InputError
from tl_entity.models.files import reason

MOST_ITEMS = 2**21
"""Values and items of lists in a header; a vocabulary with its merges has half a million."""


_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.F64: torch.float64,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file: shape as in torch, offset from the file's start."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int


@dataclass(frozen=True)
class Header:
    file: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(f"{self.architecture}.{name}", default)

    def need(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise InputError(f"{self.file} lacks the value {self.architecture}.{name}.")
        return value


def read_header(file: Path) -> Header:
    if not file.is_file():
        raise InputError(f"There is no GGUF file {file}.")
    try:
        return _Parser(file).header()
    except InputError:
        raise
    except (struct.error, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise InputError(f"{file} is damaged or no GGUF file: {reason(error)}.") from None
    except RecursionError:
        raise InputError(f"{file} is damaged: lists in lists run too deep.") from None
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror or error}.") from None


class _Parser:
    """Reads a header from front to back."""

    def __init__(self, file: Path) -> None:
        self.file = file
        mapped: Any = mapped_file(file)
        self.data = memoryview(mapped)
        self.at = 0
        self.items_left = MOST_ITEMS

    def header(self) -> Header:
        if bytes(self.data[:4]) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}, and 2 and 3 are read")
        n_tensors, n_values = self.number("Q"), self.number("Q")
        self.spend(n_tensors + n_values)
        values = {}
        for _ in range(n_values):
            name = self.string()
            values[name] = self.value(self.number("I"))
        found = {}
        for _ in range(n_tensors):
            name = self.string()
            n_axes = self.number("I")
            if not name.isprintable() or n_axes > 4 or name in found:
                raise ValueError(f"its tensor {len(found) + 1} is none, or is there twice")
            shape = tuple(self.number("Q") for _ in range(n_axes))[::-1]
            found[name] = shape, GGMLQuantizationType(self.number("I")), self.number("Q")
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise ValueError(f"its alignment is {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, offset) in found.items():
            if offset % 8:
                raise ValueError(f"the tensor {name} lies at an odd place")
            tensors[name] = Stored(shape, kind, start + offset)
        return Header(self.file, values, tensors)

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def numbers(self, code: str, length: int) -> list[Any]:
        found = np.frombuffer(self.data, f"<{code}", length, self.at)
        self.at += found.nbytes
        return found.tolist()

    def spend(self, items: int) -> None:
        """Count what is read one by one, so that no file keeps the reader for minutes."""
        self.items_left -= items
        if self.items_left < 0:
            raise ValueError(f"its header has more than {MOST_ITEMS} values")

    def string(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.at:
            raise ValueError("a text runs beyond its end")
        text = bytes(self.data[self.at : self.at + length])
        self.at += length
        return text.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, length = self.number("I"), self.number("Q")
            if length > len(self.data) - self.at:
                raise ValueError("a list runs beyond its end")
            self.spend(length)
            if item in _SCALARS:
                return self.numbers(_SCALARS[item], length)
            return [self.value(item) for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"a value is of the unknown kind {kind}")
        number = self.number(_SCALARS[kind])
        # 1e-5 was written as the nearest float32; its shortest spelling is what was meant.
        return float(str(np.float32(number))) if kind == _FLOAT32 else number


def mapped_file(file: Path) -> np.ndarray:
    """The file's bytes; a change to them stays in memory."""
    # As a plain array: slices of a memmap cost far more.
    return np.memmap(file, mode="c").view(np.ndarray)
