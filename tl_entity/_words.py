"""What a value is, and what an annotation wants, in a few words."""

import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, ForwardRef, Literal, Union, get_args, get_origin

_TEXT_SHOWN = 40

_NUMBERS = {
    "Int": "whole numbers",
    "Float": "floating-point numbers",
    "Bool": "booleans",
    "Shaped": "numbers",
}

WRITTEN: dict[type, str] = {}
"""How a person may write a thing of a type, where that is more than the type itself."""

_PLAIN: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    type(None): "None",
    object: "anything",
}


def described(value: Any) -> str:
    """A value in a few words, never its whole content.

    >>> described([1, 2, "three"])
    'a list of 3 (int, str)'
    """
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return f"the text {value if len(value) <= _TEXT_SHOWN else value[:_TEXT_SHOWN] + '…'!r}"
    if isinstance(value, int | float):
        return f"the number {value!s:.40}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{_article(kind)} of {dtype} of shape {tuple(value.shape)}"
    if isinstance(value, dict | list | set | frozenset) or type(value) is tuple:
        # A few are enough to say what they are.
        kinds = dict.fromkeys(type(one).__name__ for one in islice(value, 50))
        return f"{_article(kind)} of {len(value)}" + (f" ({', '.join(kinds)})" if kinds else "")
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', '')}"
    return _article(kind)


def wanted(annotation: Any) -> str:
    """What an annotation asks for, in words.

    >>> from collections.abc import Sequence
    >>> wanted(Sequence[int] | None)
    'a list of whole numbers, or None'
    """
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _either([repr(one) for one in inside])
    if origin is Union or isinstance(annotation, types.UnionType):
        return _either([wanted(one) for one in inside])
    if hasattr(annotation, "dims") and hasattr(annotation, "array_type"):  # of jaxtyping
        kind = annotation.array_type
        name = "tensor" if getattr(kind, "__name__", "") == "Tensor" else kind.__name__
        numbers = _NUMBERS.get(annotation.__name__.split("[")[0], "numbers")
        return f"{_article(name)} of {numbers}, [{annotation.dim_str}]"
    if isinstance(annotation, ForwardRef):
        return _article(annotation.__forward_arg__)
    if isinstance(annotation, str):
        return _article(annotation)
    if annotation is Callable or origin is Callable or origin is type(Callable):
        return "a function"
    if isinstance(origin, type) and inside:
        if issubclass(origin, Callable):
            return "a function"
        if issubclass(origin, Mapping):
            return f"a dict from {_many(inside[0])} to {_many(inside[1])}"
        if issubclass(origin, Iterable):
            name = (
                "a tuple" if origin is tuple else "a set" if issubclass(origin, set) else "a list"
            )
            return f"{name} of {_many(inside[0])}"
    written = WRITTEN.get(annotation) if isinstance(annotation, type) else None
    return _article(getattr(annotation, "__name__", str(annotation))) + (
        f" ({written})" if written else ""
    )


def _many(annotation: Any) -> str:
    if annotation is str:
        return "texts"
    if annotation is int:
        return "whole numbers"
    if annotation is float:
        return "numbers"
    what = wanted(annotation)
    return what.removeprefix("a ").removeprefix("an ")


def _either(choices: list[str]) -> str:
    choices = list(dict.fromkeys(choices))
    if len(choices) == 1:
        return choices[0]
    comma = "," if any(re.search(r" of | from |\(", choice) for choice in choices) else ""
    return f"{', '.join(choices[:-1])}{comma} or {choices[-1]}"


def _article(name: str) -> str:
    # Head and MLP aside, names are read as words.
    return f"{'an' if name[:1] in 'AEIOaeio' else 'a'} {name}"
