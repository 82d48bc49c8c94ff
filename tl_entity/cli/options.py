"""Options made from a dataclass of settings: names, types, defaults and explanations are its own.

An explanation is the attribute's entry in the docstring. What it says after "; None for" is the
default where the field's is None, and a name in backticks is the option of that name.
"""

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tl_entity.cli import values
from tl_entity.cli.parser import OneLineParser

_ENTRY = re.compile(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", re.MULTILINE)
_DEFAULT = re.compile(r"; None for (.*)$", re.DOTALL)


@dataclass(frozen=True)
class Option:
    """Where an option differs from what its field says.

    Attributes:
        flag: its name, if it is not the field's.
        metavar: stands for the value in the help.
        read: from text to the value.
        help: the explanation, with the default.
        also: further names.
        choices: the values there are.
    """

    flag: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    help: str | None = None
    also: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def add_options(
    parser: OneLineParser,
    settings: type,
    groups: Mapping[str, Sequence[str]],
    special: Mapping[str, Option],
) -> None:
    """Add an option for each named field.

    Args:
        parser: of the command.
        settings: the dataclass.
        groups: names of its fields, by the heading under which the help shows them.
        special: how some of them differ.
    """
    hints, said = get_type_hints(settings), _explanations(settings)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    flags = {name: _flag(name, special.get(name, Option())) for name in fields}
    for heading, names in groups.items():
        group = parser.group(heading)
        for name in names:
            option = special.get(name, Option())
            default = _default(fields[name])
            told = option.help or _help(said.get(name, ""), default, flags)
            keywords: dict[str, Any] = {"dest": name, "default": default, "help": _escaped(told)}
            if hints[name] is bool:
                keywords["action"] = "store_false" if default else "store_true"
            else:
                keywords |= _reading(hints[name], option)
            group.add_argument(flags[name], *option.also, **keywords)


def given(settings: type, options: argparse.Namespace) -> dict[str, Any]:
    """The values of a dataclass's fields among the options."""
    names = (field.name for field in dataclasses.fields(settings))
    return {name: getattr(options, name) for name in names if hasattr(options, name)}


def _flag(name: str, option: Option) -> str:
    return f"--{(option.flag or name).replace('_', '-')}"


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _explanations(settings: type) -> dict[str, str]:
    text = inspect.cleandoc(settings.__doc__ or "").partition("Attributes:\n")[2]
    return {name: " ".join(words.split()).rstrip(".") for name, words in _ENTRY.findall(text)}


def _help(text: str, default: Any, flags: Mapping[str, str]) -> str:
    instead = _DEFAULT.search(text)
    if instead is not None:
        usual: str | None = instead[1]
        text = text[: instead.start()]
    elif default is None or isinstance(default, bool):
        usual = None
    elif isinstance(default, Mapping):
        usual = ",".join(f"{key}={value:g}" for key, value in default.items())
    elif isinstance(default, tuple):
        usual = ",".join(map(str, default))
    else:
        usual = str(default)
    told = text if usual is None else f"{text} (default: {usual})"
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[1]), told)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def _reading(hint: Any, option: Option) -> dict[str, Any]:
    """How a value of this type is read."""
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        hint = next(part for part in get_args(hint) if part is not type(None))
    if option.choices:
        return {"choices": option.choices}
    if get_origin(hint) is Literal and option.read is None:
        return {"choices": get_args(hint)}
    usual: dict[Any, tuple[Callable[[str], Any], str]] = {
        int: (values.whole_number(), "N"),
        float: (values.number, "X"),
        str: (str, "NAME"),
    }
    read, metavar = usual.get(hint, (str, "NAMES"))
    return {"type": option.read or read, "metavar": option.metavar or metavar}
