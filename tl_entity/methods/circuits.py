"""Is a circuit enough? Ablation, accuracy, faithfulness, random control (paper, §3.3)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.points import check_heads
from tl_entity.hooks.vocabulary import check_metric, check_pairs, check_prompts
from tl_entity.methods.ablations import mean_head_outputs as mean_head_outputs
from tl_entity.methods.random_circuits import random_circuits as random_circuits
from tl_entity.metrics import Metric, check_values, log_probability
from tl_entity.results import ROWS_SHOWN, Result, plain
from tl_entity.runs.runner import BATCH_SIZE as BATCH_SIZE
from tl_entity.runs.runner import PromptRows, Runner, RunSettings, prompts_of
from tl_entity.runs.variants import Edits, KeptHeads
from tl_entity.stats import (
    NO_INTERVAL,
    Interval,
    paired_counts,
    paired_ratio_interval,
    wilson_interval,
)
from tl_entity.tasks.batches import PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@checked
@dataclass(frozen=True)
class Evaluation(Result):
    """How a model, edited or not, answers some prompts.

    Attributes:
        predicted: the most likely token of the whole vocabulary.
        correct: whether that is the answer.
        answer_log_probability: natural log probability of the answer.
        values: of the metric that was asked for besides, one a prompt; None if there was none.
        metric: its name.
    """

    predicted: Int[Tensor, " batch"]
    correct: Bool[Tensor, " batch"]
    answer_log_probability: Float[Tensor, " batch"]
    values: Float[Tensor, " batch"] | None = None
    metric: str | None = None

    def __len__(self) -> int:
        return len(self.correct)

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.3f} {self.interval} of {len(self)} prompts"

    @property
    def accuracy(self) -> float:
        """Share of prompts answered right."""
        return int(self.correct.sum()) / len(self)

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), len(self))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a prompt: predicted token id, whether it is right, the answer's probability; the
        metric too if there was one."""
        import pandas as pd

        found = pd.DataFrame(
            {
                "prompt": range(len(self)),
                "predicted": self.predicted.tolist(),
                "correct": self.correct.tolist(),
                "answer_probability": self.answer_log_probability.exp().tolist(),
            }
        )
        if self.values is not None and self.metric is not None:
            found[self.metric] = self.values.tolist()
        return found

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The one row that sums up all prompts: how many are right of how many, the accuracy and
        its 95 % interval."""
        import pandas as pd

        low, high = self.interval
        counts = {"correct": int(self.correct.sum()), "prompts": len(self)}
        return pd.DataFrame([{**counts, "accuracy": self.accuracy, "low": low, "high": high}])

    def to_json(self) -> dict[str, Any]:
        """The counts, the accuracy and its interval; not the single prompts."""
        counts = {"correct": int(self.correct.sum()), "prompts": len(self)}
        return {**counts, "accuracy": self.accuracy, "interval": list(self.interval)}

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """How sure the model is of the answer: prompts by the answer's probability, those answered
        right and wrong apart."""
        from tl_entity.plots.histograms import probability_histogram

        probability = self.answer_log_probability.double().exp().cpu().numpy()
        right = self.correct.cpu().numpy()
        return probability_histogram(
            {"answered right": probability[right], "answered wrong": probability[~right]},
            title=f"Probability of the answer; {self}" if title is None else title,
        )


@dataclass(frozen=True)
class Faithfulness(Result):
    """How much of the model's accuracy the circuit alone has: F(C) / F(M).

    Attributes:
        of_circuit: accuracy with every other head ablated.
        of_model: accuracy of the unedited model on the same prompts.
        value: the ratio; NaN, as its interval, if the model answers nothing right.
        interval: 95 % score interval of the ratio, prompts compared in pairs
            (`paired_ratio_interval`).
    """

    of_circuit: Evaluation
    of_model: Evaluation
    value: float
    interval: Interval

    @classmethod
    def of(
        cls, of_circuit: Evaluation, of_model: Evaluation, *, seed: int | None = None
    ) -> "Faithfulness":
        """From the two evaluations on the same prompts. Nothing is drawn: `seed` is taken so that
        calls from before, when the interval was a bootstrap, still run."""
        if not of_model.accuracy:
            return cls(of_circuit, of_model, math.nan, NO_INTERVAL)
        value = of_circuit.accuracy / of_model.accuracy
        right = [found.correct.cpu().numpy() for found in (of_circuit, of_model)]
        interval = paired_ratio_interval(*paired_counts(*right))
        return cls(of_circuit, of_model, value, interval)

    def __str__(self) -> str:
        return (
            f"faithfulness {self.value:.3f} {self.interval}: circuit {self.of_circuit.accuracy:.3f}"
            f", model {self.of_model.accuracy:.3f} of {len(self.of_model)} prompts"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """Three rows: accuracy of the circuit, of the model, and their ratio, with intervals."""
        import pandas as pd

        rows = {
            "circuit": (self.of_circuit.accuracy, self.of_circuit.interval),
            "model": (self.of_model.accuracy, self.of_model.interval),
            "faithfulness": (self.value, self.interval),
        }
        return pd.DataFrame(
            [
                {"of": name, "value": value, "low": low, "high": high}
                for name, (value, (low, high)) in rows.items()
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Both accuracies, their ratio and its interval."""
        return {
            "circuit": self.of_circuit.to_json(),
            "model": self.of_model.to_json(),
            "faithfulness": plain(self.value),
            "interval": plain(self.interval),
        }

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Accuracy of the whole model and of the circuit alone, with 95 % intervals."""
        from tl_entity.plots.bars import Bar, grouped_bars

        bars = {
            name: Bar(found.accuracy, *found.interval)
            for name, found in (("whole model", self.of_model), ("circuit alone", self.of_circuit))
        }
        return grouped_bars(
            {"accuracy": bars},
            title=f"Faithfulness {self.value:.2f} {self.interval}" if title is None else title,
        )


@checked
@torch.no_grad()
def evaluate(
    model: Model,
    prompts: PromptBatch | PairBatch,
    *,
    keep: Circuit | HeadsAt | None = None,
    remove: Circuit | HeadsAt | None = None,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> Evaluation:
    """Answer the prompts, whole or with heads ablated.

    With `keep`, every head at every token is ablated, except the kept ones at their own tokens:
    F(C). With `remove`, just those are: F(M \\ K). With both, the removed ones are ablated at their
    tokens even if kept there, by whatever name: F(C \\ K) (paper, §3.3). For many circuits on the
    same prompts, `evaluate_circuits` is far quicker.

    Args:
        model: the model.
        prompts: the prompts; of pairs, the clean prompts are run, and their targets are the
            answers, for metrics that compare with a foil.
        keep: a circuit, or heads by named position, or by role at all of its tokens.
        remove: heads ablated, in the same way.
        ablation: what ablated heads put out, from `pooled_ablation`, `resample_ablation`,
            `index_ablation` or `zero_ablation`, which say what each leaves in.
        mean_outputs: the same as values by token index, from `mean_head_outputs` (the paper's).
        metric: what is read off the answers besides, such as `LOGIT_DIFFERENCE`; it is then in the
            result's `values`.
        how: engine, batch_size, memory, progress, ranks or runner: see `Runner`. "exact" computes
            only what the circuit can change, "hooks" everything.

    Raises:
        InputError: if heads are to be ablated and it is not said to what, or in two ways, the
            ablation does not fit the model or the prompts, a head, position or role does not exist,
            a prompt has no answer, the metric lacks what it needs, the model does not know a token
            or has hooks attached to it, or the exact engine does not fit the model.
        NotFiniteError: if weights, ablation values, activations or logits are NaN or infinite,
            naming where.
    """
    ablated: dict[str, Any] = {"ablation": ablation, "mean_outputs": mean_outputs, "metric": metric}
    if keep is not None:
        return evaluate_circuits(model, prompts, [keep], removed=[remove], **ablated, **how)[0]
    if remove is not None:
        return evaluate_removals(model, prompts, [remove], **ablated, **how)[0]
    _check_evaluation(model, prompts, [])
    return evaluate_each(model, prompts, lambda chunk: [()], Runner.of(**how), metric)[0]


@checked
@torch.no_grad()
def evaluate_circuits(
    model: Model,
    prompts: PromptBatch | PairBatch,
    circuits: Sequence[Circuit | HeadsAt],
    *,
    removed: Sequence[Circuit | HeadsAt | None] | None = None,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> list[Evaluation]:
    """F(C) of many circuits on the same prompts: all but a circuit's heads ablated everywhere.

    The exact engine computes what the circuits share once: the run with every head ablated. Each
    circuit then costs its own named positions only. Circuits of heads by role, which change most
    tokens, are run whole.

    Args:
        model: the model.
        prompts: as in `evaluate`.
        circuits: heads kept, by named position or role.
        removed: for each circuit heads that are ablated all the same: F(C \\ K).
        ablation: as in `evaluate`.
        mean_outputs: as in `evaluate`.
        metric: as in `evaluate`.
        how: as in `evaluate`. One circuit on one prompt is a run.

    Raises:
        InputError: as `evaluate`, or if circuits and removed are not equally many.
    """
    gone = [None] * len(circuits) if removed is None else list(removed)
    if len(gone) != len(circuits):
        raise InputError(f"{len(circuits)} circuits can't have heads removed {len(gone)} times.")
    _check_evaluation(model, prompts, [*circuits, *(heads for heads in gone if heads is not None)])
    kept = KeptHeads(ablation_of(model, ablation, mean_outputs), circuits, gone)
    return evaluate_each(model, prompts, lambda chunk: kept, Runner.of(**how), metric)


@checked
@torch.no_grad()
def evaluate_removals(
    model: Model,
    prompts: PromptBatch | PairBatch,
    removed: Sequence[Circuit | HeadsAt],
    *,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> list[Evaluation]:
    """F(M \\ K) for many K on the same prompts: only K's heads ablated, at their tokens.

    The exact engine runs the prompts once; each K then costs the tokens and layers from its first
    head on.

    Arguments and errors are those of `evaluate_circuits`, with the heads removed in place of those
    kept.
    """
    _check_evaluation(model, prompts, removed)
    ablated = ablation_of(model, ablation, mean_outputs)

    def edits_of(chunk: PromptBatch | PairBatch) -> list[Edits]:
        return [ablate_heads(ablated, prompts_of(chunk), remove=heads) for heads in removed]

    return evaluate_each(model, prompts, edits_of, Runner.of(**how), metric)


def evaluate_each(
    model: Model,
    rows: PromptRows,
    variants_of: Callable[[PromptRows], Sequence[Edits] | KeptHeads],
    runner: Runner,
    metric: Metric | None = None,
) -> list[Evaluation]:
    """The answers to prompts, or to the targets of pairs, under each of several lists of edits.

    Args:
        model: the model.
        rows: the prompts or pairs.
        variants_of: as in `Runner.each`.
        runner: how the runs are made.
        metric: what is read off the answers besides.
    """
    if metric is not None:
        check_metric(model, metric, _pairs(rows))

    def read(logits: Tensor, chunk: PromptRows) -> tuple[Tensor, ...]:
        pairs = _pairs(chunk)
        found = (logits.argmax(-1), log_probability(logits, pairs.targets))
        return found if metric is None else (*found, metric.of_logits(logits, pairs))

    found = runner.each(model, rows, variants_of, read)
    answers = _pairs(rows).targets.to(model.cfg.device or "cpu")
    if metric is not None and found:
        check_values(metric, found[-1])
    evaluations = []
    for predicted, *scores in zip(*found, strict=True):
        predicted = predicted.to(answers.device)
        evaluations.append(
            Evaluation(predicted, predicted == answers, *scores, metric=metric and metric.name)
        )
    return evaluations


def _pairs(rows: PromptBatch | PairBatch) -> PairBatch:
    """Prompts as metrics take them: as pairs with themselves, scored on their answers."""
    return rows if isinstance(rows, PairBatch) else PairBatch(rows, rows, rows.answers)


def ablation_of(model: Model, ablation: Ablation | None, mean_outputs: Tensor | None) -> Ablation:
    """What ablated heads put out, from one of the two ways to say it."""
    if ablation is not None and mean_outputs is not None:
        raise InputError("Give an ablation or mean_outputs, not both: they are two ways to ablate.")
    if ablation is None and mean_outputs is None:
        raise InputError(
            "To ablate heads, give mean_outputs (from mean_head_outputs) or an ablation (such as "
            "pooled_ablation makes)."
        )
    given = ablation if mean_outputs is None else Ablation.by_index(mean_outputs)
    assert given is not None
    return given.of_model(model.cfg)


def _check_evaluation(
    model: Model, rows: PromptBatch | PairBatch, edited_heads: Sequence[Circuit | HeadsAt]
) -> None:
    for heads in edited_heads:
        for name, at in heads_by_position(heads).items():
            check_heads(model, at)
            if at:
                prompts_of(rows).where(name)
    if isinstance(rows, PairBatch):
        check_pairs(model, rows)
    else:
        check_prompts(model, rows, answered=True)


@checked
def recall_by_group(
    found: Circuit, known: Circuit
) -> Mapping[str, tuple[Sequence[Head], Sequence[Head]]]:
    """For each group of a known circuit, which of its heads were found and which were missed."""
    return {
        group.name: (
            [head for head in group.heads if head in found[group.name]],
            [head for head in group.heads if head not in found[group.name]],
        )
        for group in known
    }
