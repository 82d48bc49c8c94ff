"""The units that a fine-tune changes: a head's q, k, v or o, a part of an MLP, a norm, ..."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.finite import check_finite
from tl_entity.hooks.cross_model import check_same_architecture

Axes = Literal["heads of columns", "heads of rows", "matrix", "vector", "scale", "rows"]
"""How a parameter acts: on which axes of what it reads, and of what it writes."""

MLP = "mlp"
"""As the kind of a unit: all that belongs to the MLP of a layer."""

MLP_KINDS = ("gate", "in", "out", "b_in", "b_out")
"""The parts of an MLP."""

ATTENTION_KINDS = ("q", "k", "v", "o", "b_q", "b_k", "b_v")
"""What belongs to a head, or to a key-value head."""

SHARED_KINDS = ("k", "v", "b_k", "b_v")
"""What query heads of a group share: the unit's head is the key-value head."""


class Unit(NamedTuple):
    """A part of a model's weights.

    Attributes:
        kind: q, k, v, o for a head's matrices and b_q, b_k, b_v for its biases; gate, in, out, b_in
            and b_out for the parts of an MLP; b_o for the bias of all heads' outputs; ln1, ln2,
            q_norm, k_norm, ln_final for the weights of norms; embed, unembed, b_u.
        layer: None for what belongs to no layer.
        head: None for what belongs to no head; for k, v and their biases it is the key-value head.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer}"
        which = "KV" if self.kind in SHARED_KINDS else "H"
        return f"{layer}{'' if self.head is None else f'{which}{self.head}'} {self.kind}".strip()

    # In lists and tuples too.
    __repr__ = __str__


class Source(NamedTuple):
    """What a parameter multiplies: an argument of a module, or, without one, its output."""

    module: str
    argument: str | int | None = None


@dataclass(frozen=True)
class Place:
    """Where a parameter acts. Names of modules are those within the block.

    Attributes:
        kind: of its units.
        axes: how it acts.
        output: the module whose output it changes.
        reads: what it multiplies; None for a bias.
    """

    kind: str
    axes: Axes
    output: str
    reads: Source | None = None

    @property
    def by_head(self) -> bool:
        """Whether the first axis of the parameter is that of the heads."""
        return self.kind in ATTENTION_KINDS


def _attention_places() -> dict[str, Place]:
    places = {
        "attn.W_O": Place("o", "heads of rows", "attn", Source("attn.hook_z")),
        "attn.b_O": Place("b_o", "vector", "attn"),
    }
    for letter, argument in (("q", "query_input"), ("k", "key_input"), ("v", "value_input")):
        output = f"attn.hook_{letter}"
        # Under grouped-query attention the parameters themselves have an underscore.
        for kv in ("", "_") if letter in SHARED_KINDS else ("",):
            places[f"attn.{kv}W_{letter.upper()}"] = Place(
                letter, "heads of columns", output, Source("attn", argument)
            )
            places[f"attn.{kv}b_{letter.upper()}"] = Place(f"b_{letter}", "vector", output)
    return places


IN_BLOCK: Mapping[str, Place] = {
    **_attention_places(),
    "mlp.W_gate": Place("gate", "matrix", "mlp.hook_pre", Source("mlp", 0)),
    "mlp.W_in": Place("in", "matrix", "mlp.hook_pre_linear", Source("mlp", 0)),
    "mlp.W_out": Place("out", "matrix", "mlp", Source("mlp.hook_post")),
    "mlp.b_in": Place("b_in", "vector", "mlp.hook_post"),
    "mlp.b_out": Place("b_out", "vector", "mlp"),
    "ln1.w": Place("ln1", "scale", "ln1", Source("ln1.hook_normalized")),
    "ln2.w": Place("ln2", "scale", "ln2", Source("ln2.hook_normalized")),
    "attn.q_norm.w": Place("q_norm", "scale", "attn.q_norm", Source("attn.q_norm.hook_normalized")),
    "attn.k_norm.w": Place("k_norm", "scale", "attn.k_norm", Source("attn.k_norm.hook_normalized")),
}
"""TransformerLens's parameters of a block."""

AT_ENDS: Mapping[str, Place] = {
    "embed.W_E": Place("embed", "rows", "embed"),
    "ln_final.w": Place("ln_final", "scale", "ln_final", Source("ln_final.hook_normalized")),
    "unembed.W_U": Place("unembed", "matrix", "unembed", Source("unembed", 0)),
    "unembed.b_U": Place("b_u", "vector", "unembed"),
}
"""Those of no block."""

NORM_KINDS = ("ln1", "ln2", "q_norm", "k_norm", "ln_final")
"""The weights of norms."""

KINDS: tuple[str, ...] = (
    *ATTENTION_KINDS[:4],
    *MLP_KINDS[:3],
    *NORM_KINDS,
    "embed",
    "unembed",
    *ATTENTION_KINDS[4:],
    "b_o",
    *MLP_KINDS[3:],
    "b_u",
)
"""All kinds of units."""


def place_of(name: str) -> tuple[int | None, Place] | None:
    """The layer of a parameter and where it acts; None for one that is in none of the tables."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return (None, AT_ENDS[name]) if name in AT_ENDS else None
    return (int(match[1]), IN_BLOCK[match[2]]) if match[2] in IN_BLOCK else None


def units_of(name: str, parameter: Tensor) -> tuple[Unit, ...]:
    """The units of a parameter, in the order of its first axis if that is of heads."""
    found = place_of(name)
    if found is None:
        return ()
    layer, place = found
    heads = range(len(parameter)) if place.by_head else (None,)
    return tuple(Unit(place.kind, layer, head) for head in heads)


@checked
def check_same_weights(base: Model, tuned: Model) -> None:
    """Make sure that the weights of one model can be set beside those of the other.

    Raises:
        InputError: if the models differ in architecture or tokenizer, or a weight is in one alone
            or has another shape there, naming it; if one is a TransformerBridge; or if the two are
            one model.
    """
    for model in (base, tuned):
        if not isinstance(model, HookedTransformer):
            raise InputError(
                "Weights are set side by side in HookedTransformer's layout, and this is a "
                'TransformerBridge; load it with backend="hooked".'
            )
    check_same_architecture(base, tuned)
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    for name in [*ours, *theirs]:
        shapes = [tuple(them[name].shape) if name in them else None for them in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"The models differ in the shape of {name} "
                f"({' and '.join('none' if s is None else str(s) for s in shapes)}); "
                "weights can only be set side by side if all have the same shape."
            )


@checked
def changed_parameters(base: Model, tuned: Model) -> dict[str, tuple[Unit, ...]]:
    """The parameters in which the models differ, each with all its units, changed or not.

    Raises:
        InputError: as `check_same_weights`; if none differs; or if one differs that belongs to no
            unit, naming it.
    """
    check_same_weights(base, tuned)
    changed: dict[str, tuple[Unit, ...]] = {}
    for name, ours in base.named_parameters():
        theirs = tuned.get_parameter(name)
        if ours is theirs or torch.equal(ours.detach(), theirs.detach().to(ours.device)):
            continue
        units = units_of(name, ours)
        if not units or (units[0].kind in MLP_KINDS and not base.cfg.gated_mlp):
            raise InputError(
                f"The models differ in {name}, which has no share: only the weights of a Llama "
                "(gated MLPs, RMS norms) do."
            )
        for model in (base, tuned):
            weight = model.get_parameter(name)
            check_finite(f"The model's weight {name}", weight, "load the model anew, or mend it")
        changed[name] = units
    if not changed:
        raise InputError("The two models have the same weights, so there is no gain to share out.")
    return changed


def difference(base: Model, tuned: Model, name: str, dtype: torch.dtype) -> Tensor:
    """The tuned model's parameter minus the base's, on the base's device."""
    ours = base.get_parameter(name).detach()
    return tuned.get_parameter(name).detach().to(ours.device, dtype) - ours.to(dtype)


def sizes_of_change(base: Model, tuned: Model, names: Iterable[str]) -> list[float]:
    """The Euclidean norm of each unit's change, the units of all parameters one after another."""
    found: list[float] = []
    for name in names:
        change = difference(base, tuned, name, torch.float64)
        rows = change.flatten(1) if units_of(name, change)[0].head is not None else change[None]
        found += rows.flatten(1).norm(dim=1).tolist()
    return found


@checked
def expanded(model: Model, units: Iterable[Unit]) -> frozenset[Unit]:
    """The same units, with an MLP replaced by its parts.

    Raises:
        InputError: naming a unit that the model has not.
    """
    known = {unit for name, weight in model.named_parameters() for unit in units_of(name, weight)}
    found: set[Unit] = set()
    for unit in units:
        kind, layer, _ = Unit(*unit)
        parts = [Unit(part, layer) for part in MLP_KINDS] if kind == MLP else [Unit(*unit)]
        there = known.intersection(parts)
        if not there:
            raise InputError(
                f"The model has no unit {Unit(*unit)}; kinds are {', '.join((*KINDS, MLP))}, and "
                f"it has {model.cfg.n_layers} layers."
            )
        found |= there
    return frozenset(found)


@checked
def random_units(
    units: Sequence[Unit], like: Collection[Unit], *, draws: int, seed: int
) -> list[tuple[Unit, ...]]:
    """Sets of units drawn at random without replacement, each with as many of every layer and kind
    as `like` has."""
    generator = np.random.default_rng(seed)
    pools: dict[tuple[int | None, str], list[Unit]] = {}
    for unit in units:
        pools.setdefault((unit.layer, unit.kind), []).append(unit)
    counts: dict[tuple[int | None, str], int] = {}
    for unit in like:
        counts[unit.layer, unit.kind] = counts.get((unit.layer, unit.kind), 0) + 1
    return [
        tuple(
            pools[key][index]
            for key, count in sorted(counts.items(), key=str)
            for index in generator.permutation(len(pools[key]))[:count].tolist()
        )
        for _ in range(draws)
    ]


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter of a model that shares it with another."""
    module_name, _, parameter_name = name.rpartition(".")
    module: Any = model.get_submodule(module_name)
    module._parameters[parameter_name] = nn.Parameter(value, requires_grad=False)
