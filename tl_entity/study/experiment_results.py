"""Results of single experiments of a study: the methods' own, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from jaxtyping import Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.heads import Circuit, Group
from tl_entity.hooks.ablations import AblationKind
from tl_entity.methods.activation_patching import CarriedInformation
from tl_entity.methods.attention import AttentionSummary
from tl_entity.methods.circuits import Evaluation, Faithfulness
from tl_entity.methods.cmap import CrossModelPatching
from tl_entity.methods.dcm import MaskRun
from tl_entity.methods.minimality import Minimality
from tl_entity.results import Result, plain
from tl_entity.tasks.desiderata import MAIN_DESIDERATA

if TYPE_CHECKING:
    import pandas as pd


MOST_LIKELY, BEATS_FOIL = "answer is the most likely token", "answer beats foil"
"""What counts as right in prompts of a task."""


class ByName(Result):
    """Several results of one class, by what `COLUMN` says. A class of this kind has one field."""

    COLUMN: ClassVar[str]

    @property
    def _each(self) -> dict[Any, Result]:
        (held,) = (getattr(self, field.name) for field in fields(cast(Any, self)))
        return held

    def __str__(self) -> str:
        return "; ".join(f"{self.COLUMN} {name}: {found}" for name, found in self._each.items())

    def to_dataframe(self) -> "pd.DataFrame":
        """What each result says of itself, with a column for its name."""
        import pandas as pd

        each = self._each.items()
        frames = [self._frame(found).assign(**{self.COLUMN: name}) for name, found in each]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def to_json(self) -> dict[str, Any]:
        """Each result by its name."""
        return plain(self._each)

    @staticmethod
    def _frame(found: Result) -> "pd.DataFrame":
        """The rows of one result: an evaluation's are its sum, and not its prompts."""
        return found.table() if isinstance(found, Evaluation) else found.to_dataframe()


@dataclass(frozen=True)
class AccuracyByBoxes(ByName):
    """How a model answers prompts of two boxes and more.

    Attributes:
        evaluations: by number of boxes, the fewest first.
    """

    COLUMN = "boxes"

    evaluations: Mapping[int, Evaluation]


@dataclass(frozen=True)
class AccuracyOnTask(Result):
    """How a model answers prompts of a task.

    Attributes:
        answered: right where the most likely token is the answer.
        beats_foil: right where the answer's logit is above the foil's; None without foils.
    """

    answered: Evaluation
    beats_foil: Evaluation | None

    def __str__(self) -> str:
        return "; ".join(f"{name}: {found}" for name, found in self.evaluations.items())

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        """Both, by what counts as right."""
        found = {MOST_LIKELY: self.answered}
        return found if self.beats_foil is None else found | {BEATS_FOIL: self.beats_foil}

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each."""
        import pandas as pd

        each = self.evaluations.items()
        return pd.concat([found.table().assign(right=name) for name, found in each])

    def to_json(self) -> dict[str, Any]:
        """Each by what counts as right."""
        return plain(self.evaluations)


@checked
@dataclass(frozen=True)
class KeptPairs(Result):
    """Which pairs a circuit is found from.

    Attributes:
        tried: how many were looked at.
        kept: which of them were kept.
        answered_right_only: whether those are pairs whose clean prompt the model answers right.
    """

    tried: int
    kept: Int[Tensor, " kept"]
    answered_right_only: bool

    def __str__(self) -> str:
        return f"{len(self.kept)} of {self.tried} pairs"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a pair that is kept."""
        import pandas as pd

        return pd.DataFrame({"pair": self.kept.tolist()})

    def to_json(self) -> dict[str, Any]:
        """How many were tried and kept."""
        return {
            "tried": self.tried,
            "kept": len(self.kept),
            "answered_right_only": self.answered_right_only,
        }


@dataclass(frozen=True)
class Alone:
    """What circuits keep of a model's accuracy under one ablation of all else.

    Attributes:
        circuit: the model's own circuit.
        every_head: every head at the circuit's positions.
        others: circuits found in other models, by their role.
        random: random circuits of the same sizes.
    """

    circuit: Faithfulness
    every_head: Faithfulness
    others: Mapping[str, Faithfulness]
    random: tuple[Evaluation, ...]

    @property
    def kept(self) -> dict[str, Faithfulness]:
        """All but the random circuits, by what is kept of the model."""
        return {
            "its circuit": self.circuit,
            "every head at its positions": self.every_head,
            **{f"circuit of {role}": found for role, found in self.others.items()},
        }

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Those of the random circuits."""
        return tuple(found.accuracy for found in self.random)

    def to_json(self) -> dict[str, Any]:
        """The circuit's faithfulness, and beside it that of the others."""
        accuracies = self.accuracies
        return {
            **self.circuit.to_json(),
            "every_head": self.every_head.to_json(),
            "other_circuits": plain(self.others),
            "random": {
                "accuracies": list(accuracies),
                "mean": sum(accuracies) / len(accuracies) if accuracies else None,
                "lowest": min(accuracies, default=None),
                "highest": max(accuracies, default=None),
            },
        }


@dataclass(frozen=True)
class CircuitsAlone(Result):
    """What circuits keep of a model's accuracy.

    Attributes:
        found: by the kind of ablation; that asked for first, the paper's, "index", last.
        random_circuits: the random circuits, the same under both.
    """

    found: Mapping[AblationKind, Alone]
    random_circuits: tuple[Circuit, ...]

    @property
    def asked(self) -> Alone:
        """Under the ablation asked for."""
        return next(iter(self.found.values()))

    def __str__(self) -> str:
        return f"{self.asked.circuit} ({next(iter(self.found))} ablation)"

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for the whole model, and for each ablation and what is kept: counts, accuracy,
        faithfulness, with intervals."""
        import pandas as pd

        whole = {"ablation": "none", "kept": "everything"}
        rows = [self.asked.circuit.of_model.table().assign(**whole)]
        for ablation, alone in self.found.items():
            for kept, found in alone.kept.items():
                low, high = found.interval
                share = {"faithfulness": found.value, "faithfulness_low": low}
                row = found.of_circuit.table().assign(ablation=ablation, kept=kept, **share)
                rows.append(row.assign(faithfulness_high=high))
        return pd.concat(rows, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """What is found under the ablation asked for, and under the paper's as "by_index"."""
        parts = {kind: alone.to_json() for kind, alone in self.found.items()}
        for part in parts.values():
            part["random"]["circuits"] = plain(self.random_circuits)
        asked = next(iter(parts))
        by_index = {"by_index": parts["index"]} if "index" in parts else {}
        return {**parts[asked], "ablation": asked, **by_index}


@dataclass(frozen=True)
class MinimalityByAblation(ByName):
    """Which heads a circuit needs.

    Attributes:
        found: by the kind of ablation; that asked for first, the paper's, "index", last.
    """

    COLUMN = "ablation"

    found: Mapping[AblationKind, Minimality]

    @property
    def asked(self) -> Minimality:
        """Under the ablation asked for."""
        return next(iter(self.found.values()))

    def to_json(self) -> dict[str, Any]:
        """What is found under the ablation asked for, and under the paper's as "by_index"."""
        by_index = {"by_index": self.found["index"].to_json()} if "index" in self.found else {}
        return {**self.asked.to_json(), **by_index}


@dataclass(frozen=True)
class CircuitAttention(ByName):
    """What the heads of each group of a circuit attend to.

    Attributes:
        groups: by group.
    """

    COLUMN = "group"

    groups: Mapping[str, AttentionSummary]


@dataclass(frozen=True)
class CarriedByCircuit(ByName):
    """What patching heads that DCM selected brings.

    Attributes:
        found: by the circuit whose heads they are: "own", or the role of another model.
    """

    COLUMN = "heads_of"

    found: Mapping[str, CarriedInformation]


@dataclass(frozen=True)
class GroupMask:
    """A mask over a group's heads.

    Attributes:
        group: the group.
        desideratum: the kind of information.
        chosen: whether it is the one of the group and kind whose heads are patched later.
        run: the mask, and how it did.
    """

    group: str
    desideratum: str
    chosen: bool
    run: MaskRun


@dataclass(frozen=True)
class GroupMasks(Result):
    """Which heads of each group carry each kind of information, by DCM.

    Attributes:
        masks: by kind of information, then by group.
        left_out: why pairs of a kind could not be written with the model's tokenizer, by kind.
    """

    masks: tuple[GroupMask, ...]
    left_out: Mapping[str, str]

    def __str__(self) -> str:
        return f"{len(self.masks)} masks, {sum(mask.chosen for mask in self.masks)} chosen"

    def selected(self, circuit: Circuit, desideratum: str) -> Circuit:
        """The heads of each group in the mask that was chosen for a desideratum; the further
        desiderata for position have those of `position`."""
        kind = desideratum if desideratum in MAIN_DESIDERATA else "position"
        heads = {
            found.group: found.run.mask.selected
            for found in self.masks
            if found.desideratum == kind and found.chosen
        }
        return Circuit(tuple(Group(g.name, g.position, heads.get(g.name, ())) for g in circuit))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a mask."""
        import pandas as pd

        rows = []
        for found in self.masks:
            run = found.run
            what = {"group": found.group, "desideratum": found.desideratum, "chosen": found.chosen}
            rows.append(
                run.test.table().assign(
                    **what,
                    seed=run.seed,
                    sparsity=run.mask.sparsity,
                    candidates=len(run.mask.heads),
                    selected=" ".join(map(str, run.mask.selected)),
                    validation_accuracy=run.mask.validation_accuracy,
                    with_all_candidates=run.test_of_all.accuracy,
                    with_none=run.test_of_none.accuracy,
                )
            )
        return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()

    def to_json(self) -> dict[str, Any]:
        """One entry a mask, and what was left out."""
        masks = [
            {
                "group": found.group,
                "desideratum": found.desideratum,
                "chosen": found.chosen,
                **found.run.to_json(),
            }
            for found in self.masks
        ]
        return {"masks": masks, "left_out": dict(self.left_out)}


@dataclass(frozen=True)
class Transfer(Result):
    """Heads of one model patched into another.

    Attributes:
        into_role: of the model that answers.
        from_role: of the model that activations are taken from.
        found: what came of it.
        heads: the heads, where they are not those of the base's circuit.
    """

    into_role: str
    from_role: str
    found: CrossModelPatching
    heads: Circuit | None = None

    def __str__(self) -> str:
        return f"{self.from_role} into {self.into_role}: {self.found}"

    def to_dataframe(self) -> "pd.DataFrame":
        """The rows of what came of it."""
        return self.found.to_dataframe()

    def to_json(self) -> dict[str, Any]:
        """Both roles, what came of it, and the heads where they are said."""
        roles = {"into_role": self.into_role, "from_role": self.from_role}
        heads = {} if self.heads is None else {"heads": plain(self.heads)}
        return {**roles, **self.found.to_json(), **heads}
