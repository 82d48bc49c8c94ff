"""Results that show themselves in a notebook, print as one line, and are kept in one file.

A result is a frozen dataclass of tensors, numbers, texts, heads, and further results. `save` writes
it to a safetensors file: the tensors as they are, everything else as JSON in the file's header.
Nothing is pickled, and a file is read by the types that the class declares for its fields. The
header holds a hash of all of it, so that a file that was changed is refused.

`to_json` gives what a result says as plain JSON, for other programs.
"""

import dataclasses
import hashlib
import html
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, Node
from tl_entity.output import write_atomically

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 2
"""Version of the files. Those of format 1, which have no hash, are still read."""

HEADER = "tl_entity"
"""The entry of a file's header that holds all but the tensors."""

ROWS_SHOWN = 10
"""Rows of a table in a notebook, where nothing else is said."""

INFINITE = "infinite"
"""Stands for infinity in JSON, which has no number for it."""

Label = Callable[[str], str]
"""What the names in a result (of groups, positions, information) are called in a figure."""

SomeResult = TypeVar("SomeResult", bound="Result")


class Result:
    """What results have in common; for frozen dataclasses to inherit from.

    A class says what it is in one line (`__str__`) and gives all its numbers (`to_dataframe`); how
    it looks in a notebook and how it is kept follow from these and from its fields' types.
    """

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # A dataclass writes its own repr, with whole tensors in it, unless the class has one.
        if "__repr__" not in cls.__dict__:
            cls.__repr__ = Result.__repr__

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self}"

    def to_dataframe(self) -> "pd.DataFrame":
        """All numbers, one row for each thing measured."""
        raise NotImplementedError

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The first `n` rows of what is most worth reading; None for all of them."""
        rows = self.to_dataframe()
        return rows if n is None else rows.head(n)

    def _repr_html_(self) -> str:
        """The line and the table, as a notebook shows them."""
        shown, there = self.table(), len(self.table(None))
        more = "" if len(shown) == there else f"<p>{len(shown)} of {there} rows</p>"
        return (
            f"<p><b>{type(self).__name__}</b>: {html.escape(str(self))}</p>\n"
            + shown.to_html(index=False, border=0, float_format=_shown, na_rep="")
            + more
        )

    def to_json(self) -> dict[str, Any]:
        """What the result says, as plain JSON: its fields by name, unless the class says
        otherwise; what stands for tensors, heads and numbers is said at `plain`."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def save(self, path: str | Path) -> None:
        """Write the result to one safetensors file; `load` of the same class reads it back.

        Raises:
            InputError: if the file can't be written there.
        """
        write_atomically(path, pack(self))

    @classmethod
    def load(cls: type[SomeResult], path: str | Path) -> SomeResult:
        """Read a result of this class that `save` wrote; its tensors come to the CPU.

        Raises:
            InputError: if the file is not there, is no saved result, or is one of another class or
                of another version of the format.
        """
        path = Path(path)
        header = read_header(path)
        if header.get("format") not in (1, FORMAT):
            raise InputError(
                f"{path} was saved in format {header.get('format')}; this version of tl_entity "
                f"reads format {FORMAT}."
            )
        if header.get("class") != cls.__name__:
            raise InputError(
                f"{path} holds a result of class {header.get('class')}, not {cls.__name__}."
            )
        tensors = _read_tensors(path)
        if header["format"] == FORMAT and header.get("sha256") != _digest(header, tensors):
            raise InputError(f"{path} is damaged: it is not what tl_entity saved.")
        try:
            return _read(cls, header["content"], tensors)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} does not hold a whole {cls.__name__}: {error}.") from None


def pack(result: Result, **notes: Any) -> bytes:
    """A result as a safetensors file, with further notes in its header."""
    from safetensors.torch import save

    tensors: dict[str, Any] = {}
    content = _write_fields(result, "", tensors)
    header = {"format": FORMAT, "class": type(result).__name__, "content": content, **notes}
    return save(tensors, {HEADER: json.dumps({**header, "sha256": _digest(header, tensors)})})


def read_header(path: Path) -> dict[str, Any]:
    """All that a saved result's file holds but its tensors.

    Raises:
        InputError: if there is no file, or it is none that was saved.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InputError(f"{path} is not a result that tl_entity saved.")
    return header


def plain(value: Any) -> Any:
    """A value as plain JSON: a head as `[layer, head]`, a circuit as its groups, a tensor as nested
    lists, NaN as null, infinity as "infinite", a further result as its `to_json`."""
    import torch

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else INFINITE if value == math.inf else None
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return plain(value.tolist())
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, Circuit):
        return {group.name: plain(group.heads) for group in value}
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(held) for key, held in value.items()}
    if isinstance(value, frozenset):
        value = sorted(value)
    return [plain(held) for held in value]


def read_number(written: float | str | None) -> float:
    """The number that `plain` wrote; NaN for what became null."""
    if written is None:
        return math.nan
    return math.inf if written == INFINITE else float(written)


def _shown(number: float) -> str:
    return f"{number:.3f}" if math.isfinite(number) else ""


def _read_tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        raise InputError(f"{path} is not a result that tl_entity saved.") from None


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """A hash of all that a file holds, but for the hash itself."""
    import torch

    rest = {name: held for name, held in header.items() if name != "sha256"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# Writing follows the values, reading the declared types; each case below has its twin there.


def _write_fields(result: Any, name: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        field.name: _write(getattr(result, field.name), f"{name}/{field.name}".strip("/"), tensors)
        for field in dataclasses.fields(result)
    }


def _write(value: Any, name: str, tensors: dict[str, Any]) -> Any:
    import torch

    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Head | Node):
        return str(value)
    if isinstance(value, np.ndarray | torch.Tensor):
        # A copy: two fields may share their memory, which the format does not allow.
        tensors[name] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        return name
    if dataclasses.is_dataclass(value):
        return _write_fields(value, name, tensors)
    if isinstance(value, Mapping):
        return [
            [_write(key, f"{name}/{i}/key", tensors), _write(held, f"{name}/{i}", tensors)]
            for i, (key, held) in enumerate(value.items())
        ]
    if isinstance(value, frozenset):
        value = sorted(value)  # a set has no order of its own
    if isinstance(value, list | tuple):
        return [_write(held, f"{name}/{i}", tensors) for i, held in enumerate(value)]
    raise TypeError(f"{name} is a {type(value).__name__}, which can't be saved")


def _read(hint: Any, content: Any, tensors: Mapping[str, Any]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Union or isinstance(hint, types.UnionType):
        return _read_union(arguments, content, tensors)
    if origin is Literal:
        if content not in arguments:
            raise ValueError(f"{content!r} is none of {arguments}")
        return content
    if origin is frozenset:
        return frozenset(_read(arguments[0], held, tensors) for held in content)
    if origin is tuple:
        return _read_tuple(arguments, content, tensors)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        key, held = arguments
        return {_read(key, k, tensors): _read(held, v, tensors) for k, v in content}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return [_read(arguments[0], held, tensors) for held in content]
    if hasattr(hint, "array_type"):  # of a jaxtyping annotation
        tensor = tensors[content]
        return tensor.numpy() if hint.array_type is np.ndarray else tensor
    if hint is Head or hint is Node:
        return hint.parse(content)
    if dataclasses.is_dataclass(hint):
        fields = dataclasses.fields(hint)
        # A field that came later has a default, so that files from before it can be read.
        needed = {field.name for field in fields if _has_no_default(field)}
        if not needed <= set(content) <= {field.name for field in fields}:
            raise ValueError(f"its fields are {', '.join(content)}")
        hints = get_type_hints(hint)
        return hint(**{name: _read(hints[name], held, tensors) for name, held in content.items()})  # type: ignore[operator]
    if isinstance(hint, type) and issubclass(hint, tuple):  # a NamedTuple
        hints = get_type_hints(hint)
        return hint(*(_read(h, v, tensors) for h, v in zip(hints.values(), content, strict=True)))
    if hint is float and isinstance(content, int | float | str):
        return float(content)
    if hint in (bool, int, str, type(None)) and type(content) is hint:
        return content
    raise TypeError(f"{content!r:.60} is not of the type {hint}")


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _read_union(choices: Sequence[Any], content: Any, tensors: Mapping[str, Any]) -> Any:
    if content is None and type(None) in choices:
        return None
    for choice in choices:
        try:
            return _read(choice, content, tensors)
        except (KeyError, TypeError, ValueError):
            continue
    raise TypeError(f"{content!r:.60} is of none of the types {choices}")


def _read_tuple(hints: Sequence[Any], content: Any, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_read(hints[0], held, tensors) for held in content)
    return tuple(_read(h, held, tensors) for h, held in zip(hints, content, strict=True))
