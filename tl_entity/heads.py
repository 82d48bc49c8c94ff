"""Attention heads and the circuits they form: names, positions, and their JSON file."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_entity._typing import reads
from tl_entity._words import described
from tl_entity.errors import ArgumentError, InputError
from tl_entity.output import write_atomically
from tl_entity.reading import read_json

if TYPE_CHECKING:
    import pandas as pd

ENTITY_TRACKING_POSITIONS: dict[str, str] = {
    "value_fetcher": "last",
    "pos_transmitter": "last",
    "pos_detector": "query_label",
    "struct_reader": "previous_query_label",
}
"""The four groups of the entity-tracking circuit and where each sits (Prakash et al. 2024, §3)."""


class Head(NamedTuple):
    """An attention head, written `L10H3`."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    # In lists and tuples too.
    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> "Head":
        """The head that `L10H3` names.

        Raises:
            InputError: if the text has another form.
        """
        match = re.fullmatch(r"L(\d+)H(\d+)", text.strip())
        if match is None:
            raise InputError(f"{text!r} does not name a head; write it like L10H3.")
        return cls(int(match[1]), int(match[2]))


HeadsAt = Mapping[str, Sequence[Head]]
"""Heads by the named position they are edited at, e.g. `{"last": [Head(2, 0)]}`."""


class Node(NamedTuple):
    """A head, or a layer's MLP, at all tokens of a role; written `L10H3@label` or `MLP10@label`.

    Attributes:
        layer: its layer.
        head: which head of the layer; None for the MLP.
        role: name of the role.
    """

    layer: int
    head: int | None
    role: str

    def __str__(self) -> str:
        what = f"MLP{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"
        return f"{what}@{self.role}"

    __repr__ = __str__

    @classmethod
    def parse(cls, text: str) -> "Node":
        """The node that `L10H3@label` or `MLP10@label` names.

        Raises:
            InputError: if the text has another form.
        """
        match = re.fullmatch(r"(?:L(\d+)H(\d+)|MLP(\d+))@(.+)", text.strip())
        if match is None:
            raise InputError(
                f"{text!r} does not name a node; write it like L10H3@label or MLP10@label."
            )
        layer = match[1] if match[3] is None else match[3]
        return cls(int(layer), None if match[2] is None else int(match[2]), match[4])


def as_head(given: "Head | tuple[int, int] | str") -> Head:
    """A head from what people write for one: a `Head`, `(10, 3)` or `"L10H3"`.

    Raises:
        InputError: if it is none of these.
    """
    head = _read_head(given)
    if not isinstance(head, Head):
        raise ArgumentError(f"{described(given)} is no head; write it like L10H3 or (10, 3).")
    return head


def as_node(given: "Node | tuple[int, int | None, str] | str") -> Node:
    """A node from a `Node`, `(10, 3, "label")` or `"L10H3@label"`.

    Raises:
        InputError: if it is none of these.
    """
    node = _read_node(given)
    if not isinstance(node, Node):
        raise ArgumentError(
            f"{described(given)} is no node; write it like L10H3@label or MLP10@label."
        )
    return node


def _read_head(given: Any) -> Any:
    if isinstance(given, str):
        return Head.parse(given)
    if isinstance(given, tuple | list) and not isinstance(given, Node) and len(given) == 2:
        layer, head = given
        if _is_index(layer) and _is_index(head):
            return given if isinstance(given, Head) else Head(int(layer), int(head))
    return given


def _read_node(given: Any) -> Any:
    if isinstance(given, str):
        return Node.parse(given)
    if isinstance(given, tuple | list) and len(given) == 3:
        layer, head, role = given
        if _is_index(layer) and (head is None or _is_index(head)) and isinstance(role, str):
            return given if isinstance(given, Node) else Node(layer, head, role)
    return given


def _is_index(given: Any) -> bool:
    return hasattr(given, "__index__") and not isinstance(given, bool) and given >= 0


reads(Head, _read_head, "like L10H3 or (10, 3)")
reads(Node, _read_node, "like L10H3@label or MLP10@label")


class Group(NamedTuple):
    """Heads that do one thing, at one named position of the prompt."""

    name: str
    position: str
    heads: tuple[Head, ...]


@dataclass(frozen=True, repr=False)
class Circuit:
    """Named groups of heads, each with the named position at which its heads act.

    The four groups of the paper are made by `Circuit.entity_tracking`; any other set of groups can
    be given for a task of one's own. A group's heads are read as `circuit["value_fetcher"]` or
    `circuit.value_fetcher`.

    Raises:
        InputError: if a head appears twice at one position, or two groups share a name.
    """

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            raise InputError(f"A circuit names a group twice: {', '.join(names)}.")
        seen: dict[tuple[str, Head], str] = {}
        for group in self.groups:
            for head in group.heads:
                if (group.position, head) in seen:
                    other = seen[group.position, head]
                    raise InputError(
                        f"{head} is in the circuit twice at position {group.position!r} "
                        f"({other} and {group.name}); a head acts once at a position."
                    )
                seen[group.position, head] = group.name

    @classmethod
    def entity_tracking(cls, **heads: Iterable[tuple[int, int]]) -> "Circuit":
        """A circuit of the paper's groups: `value_fetcher`, `pos_transmitter`, `pos_detector`,
        `struct_reader`; a group that is left out is empty.

        Raises:
            InputError: if a keyword is none of the four groups.
        """
        unknown = set(heads) - set(ENTITY_TRACKING_POSITIONS)
        if unknown:
            raise InputError(
                f"{', '.join(sorted(unknown))}: no such group; "
                f"the groups are {', '.join(ENTITY_TRACKING_POSITIONS)}."
            )
        return cls(
            tuple(
                Group(name, position, _as_heads(heads.get(name, ())))
                for name, position in ENTITY_TRACKING_POSITIONS.items()
            )
        )

    def __getitem__(self, name: str) -> tuple[Head, ...]:
        for group in self.groups:
            if group.name == name:
                return group.heads
        raise KeyError(name)

    def __getattr__(self, name: str) -> tuple[Head, ...]:
        # Only reached for names that are no attribute; dunders must not look at `groups`, which
        # does not exist yet while an instance is unpickled.
        if not name.startswith("_"):
            for group in self.groups:
                if group.name == name:
                    return group.heads
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        """Number of heads, over all groups."""
        return sum(len(group.heads) for group in self.groups)

    def __str__(self) -> str:
        return "; ".join(
            f"{group.name} at {group.position}: {' '.join(map(str, group.heads)) or 'none'}"
            for group in self.groups
        )

    def __repr__(self) -> str:
        return f"Circuit: {self}"

    def _repr_html_(self) -> str:
        shown = self.to_dataframe().to_html(index=False, border=0)
        return f"<p><b>Circuit</b>: {len(self)} heads</p>\n{shown}"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a group: its position and its heads."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "group": group.name,
                    "position": group.position,
                    "n_heads": len(group.heads),
                    "heads": " ".join(map(str, group.heads)),
                }
                for group in self.groups
            ]
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Number of heads in each group."""
        return {group.name: len(group.heads) for group in self.groups}

    def heads_at(self) -> dict[str, tuple[Head, ...]]:
        """All heads of the circuit by position, groups at the same position together."""
        together: dict[str, tuple[Head, ...]] = {}
        for group in self.groups:
            together[group.position] = together.get(group.position, ()) + group.heads
        return together

    def restrict(self, heads: Mapping[str, Iterable[tuple[int, int]]]) -> "Circuit":
        """The circuit with some groups cut down to those of their heads that are named, such as the
        heads that DCM selected; a group that is left out stays whole.

        Raises:
            InputError: if there is no such group, or it does not have such a head.
        """
        wanted = {name: set(_as_heads(some)) for name, some in heads.items()}
        for name, some in wanted.items():
            if name not in self.sizes:
                raise InputError(f"The circuit has no group {name!r} to cut down.")
            strange = sorted(some - set(self[name]))
            if strange:
                raise InputError(f"{strange[0]} is not in the group {name!r}, which is cut down.")
        return Circuit(
            tuple(
                group._replace(heads=tuple(h for h in group.heads if h in wanted[group.name]))
                if group.name in wanted
                else group
                for group in self.groups
            )
        )

    def to_json(self) -> str:
        """The circuit as JSON: `{"value_fetcher": [[layer, head], ...], ...}`.

        A group that is not one of the paper's is written with its position:
        `{"name": {"position": "last", "heads": [[layer, head], ...]}}`.
        """
        content = {}
        for group in self.groups:
            heads = [list(head) for head in group.heads]
            is_papers = ENTITY_TRACKING_POSITIONS.get(group.name) == group.position
            content[group.name] = (
                heads if is_papers else {"position": group.position, "heads": heads}
            )
        return json.dumps(content) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the circuit to a JSON file, as `to_json` gives it."""
        write_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read a circuit that `save` wrote, or one of the paper's released files.

        Raises:
            InputError: if the file is missing, is no JSON, or holds something else.
        """
        path = Path(path)
        content = read_json(path, what="circuit file", holds="an object of groups")
        if set(content) <= set(ENTITY_TRACKING_POSITIONS) and all(
            isinstance(entry, list) for entry in content.values()
        ):
            papers = {name: _read_heads(path, name, entry) for name, entry in content.items()}
            return cls.entity_tracking(**papers)
        return cls(tuple(_read_group(path, name, entry) for name, entry in content.items()))


def heads_by_position(heads: Any) -> dict[str, tuple[Head, ...]]:
    """The heads to edit at each named position, from a circuit or a plain mapping."""
    if heads is None:
        return {}
    if isinstance(heads, Circuit):
        return heads.heads_at()
    if not isinstance(heads, Mapping):
        raise ArgumentError(
            f"{described(heads)} can't be taken for heads at named positions; write them like "
            '{"last": ["L10H3"]}, or give a Circuit.'
        )
    return {position: _as_heads(at) for position, at in heads.items()}


def _as_heads(given: Any) -> tuple[Head, ...]:
    """Heads from a list of them, or from one."""
    if isinstance(given, str) or isinstance(_read_head(given), Head):
        return (as_head(given),)
    if not isinstance(given, Iterable):
        raise ArgumentError(f"{described(given)} is no list of heads; write it like ['L10H3'].")
    return tuple(as_head(head) for head in given)


def without(
    heads: "Circuit | HeadsAt", removed: "Circuit | HeadsAt"
) -> dict[str, tuple[Head, ...]]:
    """`heads` less those in `removed` at the same position."""
    gone = heads_by_position(removed)
    return {
        position: tuple(head for head in at if head not in gone.get(position, ()))
        for position, at in heads_by_position(heads).items()
    }


def _read_group(path: Path, name: str, entry: object) -> Group:
    if isinstance(entry, list):
        if name not in ENTITY_TRACKING_POSITIONS:
            raise InputError(
                f"{path}: group {name!r} needs its position: "
                '{"position": "last", "heads": [[layer, head], ...]}.'
            )
        position, heads = ENTITY_TRACKING_POSITIONS[name], entry
    elif isinstance(entry, dict) and isinstance(entry.get("position"), str):
        position, heads = entry["position"], entry.get("heads")
    else:
        raise InputError(f"{path}: group {name!r} must be a list of [layer, head] pairs.")
    return Group(name, position, _read_heads(path, name, heads))


def _read_heads(path: Path, name: str, entry: object) -> tuple[Head, ...]:
    def is_pair(item: object) -> bool:
        return (
            isinstance(item, list)
            and len(item) == 2
            and all(type(index) is int and index >= 0 for index in item)
        )

    if not isinstance(entry, list) or not all(is_pair(item) for item in entry):
        raise InputError(f"{path}: group {name!r} must be a list of [layer, head] pairs.")
    return tuple(Head(*item) for item in entry)
