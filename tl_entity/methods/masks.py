"""Learned masks over heads, of one training and of several."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head
from tl_entity.methods.circuits import Evaluation
from tl_entity.methods.masked_forward import (
    SELECTED_BELOW,
    selected_heads,
)
from tl_entity.methods.path_patching import Engine
from tl_entity.results import Result, plain
from tl_entity.stats import Interval, wilson_interval

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class MaskStep(NamedTuple):
    """Where a training stands, for a progress bar.

    Attributes:
        step: steps done, in all trainings of the call.
        n_steps: steps there are in all.
        loss: of this step.
        n_selected: heads selected after it.
        sparsity: the price of a head in this training.
    """

    step: int
    n_steps: int
    loss: float
    n_selected: int
    sparsity: float


@checked
@dataclass(frozen=True)
class HeadMask(Result):
    """A trained mask, and how its training went.

    Attributes:
        heads: the candidates.
        position: named position of their outputs.
        values: m of each candidate, in [0, 1]: 1 keeps the base's output, 0 takes the
            counterfactual's. With validation pairs these are the mask after `best_step`, otherwise
            after the last step.
        losses: of each step, at the mask that the step began with.
        trajectory: m of each candidate after each step.
        best_step: the step, from 0, that `values` are taken after.
        validation_correct: validation pairs answered with the target by the rounded mask after each
            step; None without validation pairs.
        n_validation: number of validation pairs.
        sparsity: the price of a head.
        engine: what ran the model.
    """

    heads: tuple[Head, ...]
    position: str
    values: Float[Tensor, " candidate"]
    losses: Float[Tensor, " step"]
    trajectory: Float[Tensor, "step candidate"]
    best_step: int
    validation_correct: Int[Tensor, " step"] | None
    n_validation: int
    sparsity: float
    engine: Engine

    def __str__(self) -> str:
        chosen = " ".join(map(str, self.selected)) or "none"
        text = f"{len(self.selected)} of {len(self.heads)} heads at {self.position}: {chosen}"
        if self.validation_accuracy is None:
            return text
        return f"{text}; validation accuracy {self.validation_accuracy:.3f}"

    @property
    def selected(self) -> tuple[Head, ...]:
        """The candidates with m below one half, in the candidates' order."""
        return selected_heads(self.heads, self.values)

    @property
    def validation_accuracy(self) -> float | None:
        """Share of validation pairs answered with the target by the rounded mask."""
        if self.validation_correct is None:
            return None
        return int(self.validation_correct[self.best_step]) / self.n_validation

    @property
    def validation_interval(self) -> Interval | None:
        """Wilson's 95 % interval of that share. The mask was chosen by it, so it flatters."""
        if self.validation_correct is None:
            return None
        return wilson_interval(int(self.validation_correct[self.best_step]), self.n_validation)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a candidate."""
        import pandas as pd

        return pd.DataFrame(
            {
                "head": [str(head) for head in self.heads],
                "layer": [head.layer for head in self.heads],
                "index": [head.head for head in self.heads],
                "position": self.position,
                "value": self.values.tolist(),
                "selected": (self.values < SELECTED_BELOW).tolist(),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The candidates, the mask's value of each and those selected, and the losses."""
        return {
            "position": self.position,
            "sparsity": self.sparsity,
            "candidates": plain(self.heads),
            "values": plain(self.values),
            "selected": plain(self.selected),
            "losses": plain(self.losses),
            "validation_accuracy": self.validation_accuracy,
        }

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """m of every candidate after each step, from dark (taken from the counterfactual) to
        light; selected heads by name in bold."""
        from tl_entity.plots.heatmaps import share_heatmap

        shares = 1 - self.trajectory.double().cpu().numpy()
        chosen = set(self.selected)
        names = [f"<b>{head}</b>" if head in chosen else str(head) for head in self.heads]
        return share_heatmap(
            names,
            [str(step) for step in range(len(shares))],
            shares.T,
            title=str(self) if title is None else title,
            name="1 - m",
            joint="step ",
        ).update_xaxes(title_text="step")

    def history(self) -> "pd.DataFrame":
        """One row a step: loss, number of heads selected after it, validation accuracy."""
        import pandas as pd

        correct = self.validation_correct
        return pd.DataFrame(
            {
                "step": range(len(self.losses)),
                "loss": self.losses.tolist(),
                "n_selected": (self.trajectory < SELECTED_BELOW).sum(1).tolist(),
                "validation_accuracy": float("nan")
                if correct is None
                else (correct / self.n_validation).tolist(),
            }
        )


@dataclass(frozen=True)
class MaskRun:
    """A mask trained on half of some pairs, chosen on a quarter, tested on the last quarter.

    Attributes:
        seed: of the draw.
        mask: the mask.
        test: the test pairs with the selected heads taken from the counterfactual; right is the
            target.
        test_of_all: the same with all candidates taken.
        test_of_none: the same with none taken.
    """

    seed: int
    mask: HeadMask
    test: Evaluation
    test_of_all: Evaluation
    test_of_none: Evaluation

    def __str__(self) -> str:
        return f"seed {self.seed}, sparsity {self.mask.sparsity:g}: {self.mask}; test {self.test}"

    def to_json(self) -> dict[str, Any]:
        """The mask, how it was trained, and its test."""
        return {
            "seed": self.seed,
            **self.mask.to_json(),
            "test": self.test.to_json(),
            "test_of_all": self.test_of_all.to_json(),
            "test_of_none": self.test_of_none.to_json(),
        }


@dataclass(frozen=True)
class LearnedMasks(Result):
    """The masks of several draws and several prices of a head.

    Attributes:
        runs: by seed, then by sparsity, in the order they were asked for.
    """

    runs: tuple[MaskRun, ...]

    def __str__(self) -> str:
        if not self.runs:
            return "no masks"
        best = max(self.runs, key=lambda run: run.test.accuracy)
        return f"{len(self.runs)} masks; highest test accuracy: {best}"

    def selection_share(self, sparsity: float) -> dict[Head, float]:
        """For each candidate, the share of the draws in which it is selected at this sparsity.

        Raises:
            InputError: if no mask was trained at this sparsity.
        """
        masks = [run.mask for run in self.runs if run.mask.sparsity == sparsity]
        if not masks:
            raise InputError(f"No mask was trained at sparsity {sparsity:g}.")
        return {
            head: sum(head in mask.selected for mask in masks) / len(masks)
            for head in masks[0].heads
        }

    def to_json(self) -> dict[str, Any]:
        """One entry a mask."""
        return {"masks": [run.to_json() for run in self.runs]}

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Share of the draws in which each head is selected (columns), by sparsity (rows); heads
        that never are are left out."""
        from tl_entity.plots.heatmaps import share_heatmap

        rows = list(dict.fromkeys(run.mask.sparsity for run in self.runs))
        shares = [self.selection_share(sparsity) for sparsity in rows]
        heads = sorted({head for share in shares for head, s in share.items() if s > 0})
        return share_heatmap(
            [f"{sparsity:g}" for sparsity in rows],
            [str(head) for head in heads],
            np.array([[share[head] for head in heads] for share in shares]).reshape(
                len(rows), len(heads)
            ),
            title="Share of the draws that select a head" if title is None else title,
            name="share",
        ).update_yaxes(title_text="sparsity")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a run."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "seed": run.seed,
                    "sparsity": run.mask.sparsity,
                    "position": run.mask.position,
                    "n_candidates": len(run.mask.heads),
                    "n_selected": len(run.mask.selected),
                    "selected": " ".join(map(str, run.mask.selected)),
                    "validation_accuracy": run.mask.validation_accuracy,
                    "test_correct": int(run.test.correct.sum()),
                    "n_test": len(run.test),
                    "test_accuracy": run.test.accuracy,
                    "low": run.test.interval.low,
                    "high": run.test.interval.high,
                    "test_accuracy_of_all": run.test_of_all.accuracy,
                    "test_accuracy_of_none": run.test_of_none.accuracy,
                }
                for run in self.runs
            ]
        )
