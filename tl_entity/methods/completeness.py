"""Is a circuit all there is? The circuit and the model must lose as much by the same heads (after
Prakash et al. 2024, §3.3)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.methods.circuits import (
    Evaluation,
    ablation_of,
    evaluate_circuits,
    evaluate_removals,
)
from tl_entity.results import Label, Result, plain
from tl_entity.runs.runner import RunSettings
from tl_entity.stats import Interval, paired_difference_interval, paired_loss_interval
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

MOST_DRAWS = 100
"""Tries to find a random part that is not there yet, before one is taken twice."""


@dataclass(frozen=True)
class Removal:
    """What circuit and model lose by the same heads K.

    Attributes:
        name: name of the group, `random 0` and so on, or empty if nothing is removed.
        heads: K, by named position.
        of_circuit: F(C \\ K), accuracy of the circuit without K.
        of_model: F(M \\ K), accuracy of the model without K.
        circuit_loss: F(C) - F(C \\ K).
        model_loss: F(M) - F(M \\ K).
        circuit_loss_interval: 95 % interval of the circuit's loss, prompts compared in pairs.
        model_loss_interval: the same of the model's.
        interval: 95 % interval of the circuit's loss less the model's, on the same prompts.
    """

    name: str
    heads: Mapping[str, tuple[Head, ...]]
    of_circuit: Evaluation
    of_model: Evaluation
    circuit_loss: float
    model_loss: float
    circuit_loss_interval: Interval
    model_loss_interval: Interval
    interval: Interval

    @classmethod
    def of(
        cls,
        name: str,
        heads: Mapping[str, tuple[Head, ...]],
        whole: tuple[Evaluation, Evaluation],
        left: tuple[Evaluation, Evaluation],
    ) -> "Removal":
        """From circuit and model, with nothing removed and without K."""
        circuit, of_model = (
            (before.correct.cpu().numpy(), after.correct.cpu().numpy())
            for before, after in zip(whole, left, strict=True)
        )
        return cls(
            name=name,
            heads=heads,
            of_circuit=left[0],
            of_model=left[1],
            circuit_loss=whole[0].accuracy - left[0].accuracy,
            model_loss=whole[1].accuracy - left[1].accuracy,
            circuit_loss_interval=paired_difference_interval(*circuit),
            model_loss_interval=paired_difference_interval(*of_model),
            interval=paired_loss_interval(circuit, of_model),
        )

    def __str__(self) -> str:
        return (
            f"without {self.name or 'nothing'}: circuit {self.of_circuit.accuracy:.3f}, "
            f"{self.circuit_loss:.3f} {self.circuit_loss_interval} less; model "
            f"{self.of_model.accuracy:.3f}, {self.model_loss:.3f} {self.model_loss_interval} less; "
            f"of {len(self.of_model)} prompts"
        )

    @property
    def difference(self) -> float:
        """The circuit's loss less the model's: above zero where the model has heads that stand in
        for K and that the circuit lacks."""
        return self.circuit_loss - self.model_loss

    @property
    def incompleteness(self) -> float:
        """How far the losses are apart; 0 for a complete circuit."""
        return abs(self.difference)

    @property
    def published_incompleteness(self) -> float:
        """|F(C \\ K) - F(M \\ K)|, the paper's, in which what the circuit lacks with nothing
        removed counts too."""
        return abs(self.of_circuit.accuracy - self.of_model.accuracy)

    def to_json(self) -> dict[str, Any]:
        """What was removed, both accuracies without it, both losses and their difference."""
        return {
            "removed": self.name or "nothing",
            "heads": plain(self.heads),
            "circuit": self.of_circuit.to_json(),
            "model": self.of_model.to_json(),
            "circuit_loss": self.circuit_loss,
            "circuit_loss_interval": plain(self.circuit_loss_interval),
            "model_loss": self.model_loss,
            "model_loss_interval": plain(self.model_loss_interval),
            "difference": self.difference,
            "difference_interval": plain(self.interval),
            "published_incompleteness": self.published_incompleteness,
        }


@dataclass(frozen=True)
class Completeness(Result):
    """How alike circuit and model are when heads are taken from both.

    Each removal is a point of a scatter plot, the model's loss against the circuit's; those of a
    complete circuit lie on the line y = x.

    Attributes:
        whole: with nothing removed: F(C) and F(M).
        groups: each group of the circuit removed, if it has any heads.
        random: random heads of the circuit removed.
        seed: what these were drawn by.
        ablation: the kind of ablation.
    """

    whole: Removal
    groups: tuple[Removal, ...]
    random: tuple[Removal, ...]
    seed: int
    ablation: AblationKind

    def __str__(self) -> str:
        return (
            f"incompleteness {_mean(self.groups):.3f} over {len(self.groups)} groups, "
            f"{_mean(self.random):.3f} over {len(self.random)} random sets of heads "
            f"({self.ablation} ablation)"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a removal: what kind it is, how many heads, both accuracies with counts, both
        losses, and their difference, with intervals; and the paper's incompleteness."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "kind": kind,
                    "removed": removal.name,
                    "n_heads": sum(len(heads) for heads in removal.heads.values()),
                    "heads": "; ".join(
                        f"{at}: {' '.join(map(str, heads))}" for at, heads in removal.heads.items()
                    ),
                    "n_prompts": len(removal.of_model),
                    **_columns("circuit", removal.of_circuit, removal.circuit_loss),
                    "circuit_loss_low": removal.circuit_loss_interval.low,
                    "circuit_loss_high": removal.circuit_loss_interval.high,
                    **_columns("model", removal.of_model, removal.model_loss),
                    "model_loss_low": removal.model_loss_interval.low,
                    "model_loss_high": removal.model_loss_interval.high,
                    "incompleteness": removal.incompleteness,
                    "difference": removal.difference,
                    "difference_low": removal.interval.low,
                    "difference_high": removal.interval.high,
                    "published_incompleteness": removal.published_incompleteness,
                }
                for kind, removal in self.by_kind()
            ]
        )

    def by_kind(self) -> list[tuple[str, Removal]]:
        """Every removal with its kind: "whole", "group" or "random"."""
        kinds = {"whole": (self.whole,), "group": self.groups, "random": self.random}
        return [(kind, removal) for kind, removals in kinds.items() for removal in removals]

    def to_json(self) -> dict[str, Any]:
        """The kind of ablation, and one entry a removal with what kind it is."""
        entries = [{"kind": kind, **removal.to_json()} for kind, removal in self.by_kind()]
        return {"ablation": self.ablation, "entries": entries}

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """What the model loses against what the circuit loses, a point for each removal; those of a
        complete circuit lie on the dashed line.

        Args:
            title: above the figure.
            label: what the groups are called in it.
        """
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.curves import Point, loss_scatter

        kinds = {
            "a group removed": self.groups,
            "random heads of the circuit removed": self.random,
        }
        points = [
            Point(
                label(removal.name),
                Bar(removal.model_loss, *removal.model_loss_interval),
                Bar(removal.circuit_loss, *removal.circuit_loss_interval),
                kind,
            )
            for kind, removals in kinds.items()
            for removal in removals
        ]
        return loss_scatter(
            points,
            title="What circuit and model lose by the same heads" if title is None else title,
        )


@checked
def completeness(
    model: Model,
    prompts: PromptBatch,
    circuit: Circuit,
    *,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    seed: int,
    n_random: int = 20,
    random_size: int | None = None,
    **how: Unpack[RunSettings],
) -> Completeness:
    """Does a circuit lose as much as the model by the same heads K, for K each group of the circuit
    and random heads of it?

    The circuit's loss is F(C) - F(C \\ K): F(C) is the accuracy with every head at every token
    ablated but those of the circuit at their own positions. The model's loss is F(M) - F(M \\ K),
    with only K ablated. A circuit that lacks heads which stand in for K loses more than the model.
    What the circuit lacks with nothing removed, F(M) - F(C), is its faithfulness and counts for
    nothing here; the paper's |F(C \\ K) - F(M \\ K)| (Prakash et al. 2024, §3.3), in which it
    does, is `published_incompleteness`. A circuit that keeps little accuracy has little to lose, so
    completeness says nothing of one that is not faithful.

    Random K are heads of the circuit at their positions, drawn without replacement. How many is
    drawn first, each number from one to one less than the circuit has being equally likely, unless
    `random_size` says. A group without heads is no removal.

    Args:
        model: the model.
        prompts: the prompts.
        circuit: the circuit C.
        ablation: as in `evaluate`.
        mean_outputs: as in `evaluate`.
        seed: of the random heads.
        n_random: how many random K.
        random_size: heads in each random K.
        how: as in `evaluate`. One K on one prompt is two runs; there are
            2 * (1 + groups with heads + n_random) * len(prompts).

    Raises:
        InputError: as `evaluate`; if the random sets can't have that many heads, or the circuit has
            none to draw.
    """
    removed: list[tuple[str, Mapping[str, tuple[Head, ...]]]] = [("", {})]
    removed += [(group.name, {group.position: group.heads}) for group in circuit if group.heads]
    n_groups = len(removed)
    drawn = random_parts(circuit, n_random, size=random_size, seed=seed)
    removed += [(f"random {i}", part) for i, part in enumerate(drawn)]
    ablated = ablation_of(model, ablation, mean_outputs)
    parts = [heads for _, heads in removed]
    of_circuit = evaluate_circuits(
        model, prompts, [circuit] * len(parts), removed=parts, ablation=ablated, **how
    )
    of_model = evaluate_removals(model, prompts, parts, ablation=ablated, **how)
    whole = (of_circuit[0], of_model[0])
    removals = [
        Removal.of(name, heads, whole, left)
        for (name, heads), left in zip(removed, zip(of_circuit, of_model, strict=True), strict=True)
    ]
    return Completeness(
        whole=removals[0],
        groups=tuple(removals[1:n_groups]),
        random=tuple(removals[n_groups:]),
        seed=seed,
        ablation=ablated.kind,
    )


@checked
def random_parts(
    circuit: Circuit, n_parts: int, *, size: int | None = None, seed: int
) -> list[dict[str, tuple[Head, ...]]]:
    """Random parts of a circuit: heads at their positions, drawn without replacement. No part comes
    twice, unless the circuit has hardly as many.

    Args:
        circuit: the circuit.
        n_parts: how many parts.
        size: heads in each; if left out it is drawn too, from one to one less than the circuit has.
        seed: of the draws.

    Raises:
        InputError: if the circuit has fewer heads than `size`, or none.
    """
    members = [(position, head) for position, heads in circuit.heads_at().items() for head in heads]
    if n_parts > 0 and not 1 <= (1 if size is None else size) <= len(members):
        raise InputError(
            f"{1 if size is None else size} heads can't be drawn of a circuit of {len(members)}."
        )
    generator = np.random.default_rng(seed)

    def draw() -> tuple[int, ...]:
        n = int(generator.integers(1, max(2, len(members)))) if size is None else size
        return tuple(sorted(generator.permutation(len(members))[:n].tolist()))

    drawn: list[tuple[int, ...]] = []
    for _ in range(n_parts):
        indices = draw()
        # A small circuit has few parts: rather a further draw than a part twice.
        for _ in range(MOST_DRAWS):
            if indices not in drawn:
                break
            indices = draw()
        drawn.append(indices)
    parts = []
    for indices in drawn:
        part: dict[str, tuple[Head, ...]] = {}
        for position, head in (members[index] for index in indices):
            part[position] = (*part.get(position, ()), head)
        parts.append(part)
    return parts


def _columns(name: str, found: Evaluation, loss: float) -> dict[str, float]:
    low, high = found.interval
    return {
        f"{name}_correct": int(found.correct.sum()),
        f"{name}_accuracy": found.accuracy,
        f"{name}_low": low,
        f"{name}_high": high,
        f"{name}_loss": loss,
    }


def _mean(removals: tuple[Removal, ...]) -> float:
    if not removals:
        return float("nan")
    return sum(removal.incompleteness for removal in removals) / len(removals)
