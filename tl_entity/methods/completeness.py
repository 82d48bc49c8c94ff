"""Is a circuit all there is? The circuit and the model must lose as much by the same heads
(Prakash et al. 2024, §3.3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, without
from tl_entity.methods.circuits import (
    BATCH_SIZE,
    Evaluation,
    evaluate_circuits,
    evaluate_removals,
)
from tl_entity.methods.path_patching import Engine
from tl_entity.results import Result
from tl_entity.stats import Interval, paired_difference_interval
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
        difference_interval: 95 % interval of F(C \\ K) - F(M \\ K), prompts compared in pairs.
    """

    name: str
    heads: Mapping[str, tuple[Head, ...]]
    of_circuit: Evaluation
    of_model: Evaluation
    difference_interval: Interval

    def __str__(self) -> str:
        return (
            f"without {self.name or 'nothing'}: circuit {self.of_circuit.accuracy:.3f} "
            f"{self.of_circuit.interval}, model {self.of_model.accuracy:.3f} "
            f"{self.of_model.interval}, of {len(self.of_model)} prompts"
        )

    @property
    def difference(self) -> float:
        """F(C \\ K) - F(M \\ K): below zero where the model has means that the circuit lacks."""
        return self.of_circuit.accuracy - self.of_model.accuracy

    @property
    def incompleteness(self) -> float:
        """|F(C \\ K) - F(M \\ K)|; 0 for a complete circuit."""
        return abs(self.difference)


@dataclass(frozen=True)
class Completeness(Result):
    """How alike circuit and model are when heads are taken from both.

    Each removal is a point of a scatter plot, the model's accuracy against the circuit's; those of
    a complete circuit lie on the line y = x.

    Attributes:
        whole: with nothing removed: F(C) and F(M).
        groups: each group of the circuit removed.
        random: random heads of the circuit removed.
        seed: what these were drawn by.
    """

    whole: Removal
    groups: tuple[Removal, ...]
    random: tuple[Removal, ...]
    seed: int

    def __str__(self) -> str:
        return (
            f"incompleteness {_mean(self.groups):.3f} over {len(self.groups)} groups, "
            f"{_mean(self.random):.3f} over {len(self.random)} random sets of heads"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a removal: what kind it is, how many heads, both accuracies with counts and
        intervals, and their difference."""
        import pandas as pd

        kinds = {"whole": (self.whole,), "group": self.groups, "random": self.random}
        return pd.DataFrame(
            [
                {
                    "kind": kind,
                    "removed": removal.name,
                    "n_heads": sum(len(heads) for heads in removal.heads.values()),
                    "n_prompts": len(removal.of_model),
                    "circuit_correct": int(removal.of_circuit.correct.sum()),
                    "circuit_accuracy": removal.of_circuit.accuracy,
                    "circuit_low": removal.of_circuit.interval.low,
                    "circuit_high": removal.of_circuit.interval.high,
                    "model_correct": int(removal.of_model.correct.sum()),
                    "model_accuracy": removal.of_model.accuracy,
                    "model_low": removal.of_model.interval.low,
                    "model_high": removal.of_model.interval.high,
                    "incompleteness": removal.incompleteness,
                    "difference": removal.difference,
                    "difference_low": removal.difference_interval.low,
                    "difference_high": removal.difference_interval.high,
                }
                for kind, removals in kinds.items()
                for removal in removals
            ]
        )

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Accuracy of the model against that of the circuit, a point for each removal; those of a
        complete circuit lie on the dashed line."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.curves import Point, accuracy_scatter

        kinds = {
            "nothing removed": (self.whole,),
            "a group removed": self.groups,
            "random heads of the circuit removed": self.random,
        }
        points = [
            Point(
                removal.name,
                Bar(removal.of_model.accuracy, *removal.of_model.interval),
                Bar(removal.of_circuit.accuracy, *removal.of_circuit.interval),
                kind,
            )
            for kind, removals in kinds.items()
            for removal in removals
        ]
        return accuracy_scatter(
            points,
            title="Circuit and model without the same heads K" if title is None else title,
            x_axis="accuracy of the model without K",
            y_axis="accuracy of the circuit without K",
        )


@checked
def completeness(
    model: Model,
    prompts: PromptBatch,
    circuit: Circuit,
    *,
    mean_outputs: Float[Tensor, "layer pos head d_head"],
    seed: int,
    n_random: int = 20,
    random_size: int | None = None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> Completeness:
    """|F(C \\ K) - F(M \\ K)| for K each group of the circuit and random heads of it (Prakash et
    al. 2024, §3.3).

    F(C \\ K) is the accuracy with every head at every token ablated but those of the circuit, less
    K, at their own positions; F(M \\ K) is the accuracy with only K ablated. Ablated heads put out
    their means.

    Random K are heads of the circuit at their positions, drawn without replacement. How many is
    drawn first, each number from one to one less than the circuit has being equally likely, unless
    `random_size` says.

    Args:
        model: the model.
        prompts: the prompts.
        circuit: the circuit C.
        mean_outputs: as in `evaluate`.
        seed: of the random heads.
        n_random: how many random K.
        random_size: heads in each random K.
        engine: as in `evaluate`.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.
        progress: called with the number of runs done since the last call, where one K on one prompt
            is two runs; there are 2 * (1 + number of groups + n_random) * len(prompts).

    Raises:
        InputError: as `evaluate`; if the random sets can't have that many heads, or the circuit has
            none to draw.
    """
    removed: dict[str, dict[str, tuple[Head, ...]]] = {"": {}}
    removed |= {group.name: {group.position: group.heads} for group in circuit}
    drawn = random_parts(circuit, n_random, size=random_size, seed=seed)
    n_groups = len(removed)
    parts = [*removed.items(), *((f"random {i}", part) for i, part in enumerate(drawn))]
    how: dict[str, Any] = {
        "mean_outputs": mean_outputs,
        "engine": engine,
        "batch_size": batch_size,
        "memory": memory,
        "progress": progress,
    }
    of_circuit = evaluate_circuits(
        model, prompts, [without(circuit, heads) for _, heads in parts], **how
    )
    of_model = evaluate_removals(model, prompts, [heads for _, heads in parts], **how)
    removals = [
        Removal(
            name,
            heads,
            left,
            rest,
            paired_difference_interval(left.correct.cpu().numpy(), rest.correct.cpu().numpy()),
        )
        for (name, heads), left, rest in zip(parts, of_circuit, of_model, strict=True)
    ]
    return Completeness(removals[0], tuple(removals[1:n_groups]), tuple(removals[n_groups:]), seed)


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


def _mean(removals: tuple[Removal, ...]) -> float:
    if not removals:
        return float("nan")
    return sum(removal.incompleteness for removal in removals) / len(removals)
