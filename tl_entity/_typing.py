"""The check of types and shapes at every public boundary, told in a sentence."""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from tl_entity._words import WRITTEN, described, wanted
from tl_entity.errors import ArgumentError

Checked = TypeVar("Checked")

_check = jaxtyped(typechecker=beartype)

_READERS: dict[type, Callable[[Any], Any]] = {}

_ARGUMENT = re.compile(r"typechecking parameter '(\w+)'")
_SIZES = re.compile(r"axis annotation are as follows\.\s*\n(.*)")


def reads(kind: type, reader: Callable[[Any], Any], written: str) -> None:
    """Let every checked function take what `reader` understands where it wants a `kind`.

    Args:
        kind: a type that annotations name, also inside of sequences and mappings.
        reader: from what was given to a `kind`, or to the very thing that it can't read.
        written: how a person may write one, for messages.
    """
    _READERS[kind] = reader
    WRITTEN[kind] = written


def checked(thing: Checked) -> Checked:
    """Decorator: arguments and results must have the annotated types and tensor shapes.

    One size name has one value within a call, across all arguments and the result. An argument of
    another type is an `ArgumentError` that names it, says in a few words what it is, and what is
    wanted. Texts and tuples are read as heads, nodes and metrics where those are wanted.

    The check takes about 40 microseconds, so it belongs on functions that do work, not on ones in
    inner loops.
    """
    if inspect.isclass(thing):
        # As jaxtyped does: the fields of a dataclass are checked when it is made.
        inner = cast(Any, thing)
        if "__dataclass_fields__" in inner.__dict__:
            inner.__init__ = _wrapped(inner.__init__)
        return thing
    if not inspect.isfunction(thing):
        return _check(cast(Any, thing))
    return cast(Checked, _wrapped(thing))


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    inner = _check(function)
    parameters = inspect.signature(function).parameters
    # Annotations name types that are registered only once all modules are imported.
    reading = functools.cache(lambda: _readable(parameters))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for place, (name, annotation) in reading().items():
            if name in kwargs:
                kwargs[name] = _read(kwargs[name], annotation)
            elif place < len(args):
                args = (*args[:place], _read(args[place], annotation), *args[place + 1 :])
        try:
            return inner(*args, **kwargs)
        except TypeCheckError as error:
            told = _told(function, parameters, args, kwargs, str(error))
        raise told

    return call


def _told(
    function: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    report: str,
) -> ArgumentError:
    """The sentence for what jaxtyping reports at length."""
    what = function.__qualname__.removesuffix(".__init__")
    found = _ARGUMENT.search(report)
    if found is None:
        return ArgumentError(
            f"The arguments or the result of {what} do not fit each other's types."
        )
    name = found[1]
    given = inspect.signature(function).bind(*args, **kwargs).arguments.get(name)
    annotation = parameters[name].annotation
    sizes = _SIZES.search(report)
    of_others = f", where {sizes[1].strip()}" if sizes and "[" in wanted(annotation) else ""
    return ArgumentError(
        f"{what}: {name!r} must be {wanted(annotation)}{of_others}, not {described(given)}."
    )


def _readable(parameters: Mapping[str, inspect.Parameter]) -> dict[int, tuple[str, Any]]:
    """The arguments, by place, whose annotations name a type that has a reader."""
    return {
        place: (name, parameter.annotation)
        for place, (name, parameter) in enumerate(parameters.items())
        if any(part in _READERS for part in _parts(parameter.annotation))
    }


def _parts(annotation: Any) -> Iterable[Any]:
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _parts(part)


def _read(given: Any, annotation: Any) -> Any:
    """What was given, with all in it that stands for a registered type read as one."""
    if isinstance(annotation, type) and annotation in _READERS:
        return given if isinstance(given, annotation) else _READERS[annotation](given)
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Union or isinstance(annotation, types.UnionType):
        for choice in inside:
            found = _read(given, choice)
            if found is not given:
                return found
        return given
    if not inside or not isinstance(origin, type):
        return given
    if issubclass(origin, Mapping):
        if not isinstance(given, Mapping):
            return given
        read = {key: _read(value, inside[-1]) for key, value in given.items()}
        return read if any(read[key] is not given[key] for key in given) else given
    return _read_many(given, origin, inside[0])


def _read_many(given: Any, origin: type, wanted_inside: Any) -> Any:
    if not issubclass(origin, Iterable) or isinstance(given, Mapping):
        return given
    if wanted_inside in _READERS:
        alone = _read(given, wanted_inside)
        if isinstance(alone, wanted_inside):
            # One where several are wanted: a text, or a tuple of numbers, is not their sequence.
            return (alone,)
    if isinstance(given, set | frozenset) and wanted_inside in _READERS:
        given = sorted(given, key=str)  # a set has no order of its own
    if type(given) not in (list, tuple):
        return given
    each = [_read(one, wanted_inside) for one in given]
    if all(now is before for now, before in zip(each, given, strict=True)):
        return given
    return type(given)(each)
