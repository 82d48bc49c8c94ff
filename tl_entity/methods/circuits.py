"""Is a circuit enough? Ablation, accuracy, faithfulness, random control (paper, §3.3)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.ablation import AblatedRun
from tl_entity.exact.blocks import unembed
from tl_entity.exact.memory import halving, memory_budget, prompts_within
from tl_entity.exact.suffix import CleanRun
from tl_entity.finite import NotFiniteError, are_finite
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import check_heads
from tl_entity.hooks.run import answer_logits
from tl_entity.hooks.vocabulary import check_prompts
from tl_entity.methods.ablations import BATCH_SIZE as BATCH_SIZE
from tl_entity.methods.ablations import mean_head_outputs as mean_head_outputs
from tl_entity.methods.path_patching import Engine
from tl_entity.methods.random_circuits import random_circuits as random_circuits
from tl_entity.metrics import log_probability
from tl_entity.ranks import shared_out
from tl_entity.results import ROWS_SHOWN, Result
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

AnsweredRows = TypeVar("AnsweredRows", PromptBatch, PairBatch)
"""What has an answer each: prompts, or pairs with their targets."""


@checked
@dataclass(frozen=True)
class Evaluation(Result):
    """How a model, edited or not, answers some prompts.

    Attributes:
        predicted: the most likely token of the whole vocabulary.
        correct: whether that is the answer.
        answer_log_probability: natural log probability of the answer.
    """

    predicted: Int[Tensor, " batch"]
    correct: Bool[Tensor, " batch"]
    answer_log_probability: Float[Tensor, " batch"]

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
        """One row a prompt: predicted token id, whether it is right, the answer's probability."""
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": range(len(self)),
                "predicted": self.predicted.tolist(),
                "correct": self.correct.tolist(),
                "answer_probability": self.answer_log_probability.exp().tolist(),
            }
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The one row that sums up all prompts: how many are right of how many, the accuracy and
        its 95 % interval."""
        import pandas as pd

        low, high = self.interval
        counts = {"correct": int(self.correct.sum()), "prompts": len(self)}
        return pd.DataFrame([{**counts, "accuracy": self.accuracy, "low": low, "high": high}])

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
    prompts: PromptBatch,
    *,
    keep: Circuit | HeadsAt | None = None,
    remove: Circuit | HeadsAt | None = None,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
) -> Evaluation:
    """Answer the prompts, whole or with heads ablated.

    With `keep`, every head at every token is ablated, except the kept ones at their own tokens:
    F(C). With `remove`, just those are: F(M \\ K). With both, the removed ones are ablated at their
    tokens even if kept there, by whatever name: F(C \\ K) (paper, §3.3). For many circuits on the
    same prompts, `evaluate_circuits` is far quicker.

    Args:
        model: the model.
        prompts: the prompts.
        keep: a circuit, or heads by named position, or by role at all of its tokens.
        remove: heads ablated, in the same way.
        ablation: what ablated heads put out, from `pooled_ablation`, `resample_ablation`,
            `index_ablation` or `zero_ablation`, which say what each leaves in.
        mean_outputs: the same as values by token index, from `mean_head_outputs` (the paper's).
        engine: "exact" computes only what the circuit can change, "hooks" everything.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.

    Raises:
        InputError: if heads are to be ablated and it is not said to what, or in two ways, the
            ablation does not fit the model or the prompts, a head, position or role does not exist,
            a prompt has no answer, the model does not know a token or has hooks attached to it, or
            the exact engine does not fit the model.
        NotFiniteError: if weights, ablation values, activations or logits are NaN or infinite,
            naming where.
    """
    how: dict[str, Any] = {
        "ablation": ablation,
        "mean_outputs": mean_outputs,
        "engine": engine,
        "batch_size": batch_size,
        "memory": memory,
    }
    if keep is not None:
        return evaluate_circuits(model, prompts, [keep], removed=[remove], **how)[0]
    if remove is not None:
        return evaluate_removals(model, prompts, [remove], **how)[0]
    _check_evaluation(model, prompts, [])
    return evaluate_each(
        model,
        prompts,
        1,
        lambda chunk: [answer_logits(model, chunk)],
        batch_size=batch_size,
        memory=memory,
    )[0]


@checked
@torch.no_grad()
def evaluate_circuits(
    model: Model,
    prompts: PromptBatch,
    circuits: Sequence[Circuit | HeadsAt],
    *,
    removed: Sequence[Circuit | HeadsAt | None] | None = None,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> list[Evaluation]:
    """F(C) of many circuits on the same prompts: all but a circuit's heads ablated everywhere.

    The exact engine computes what the circuits share once: the run with every head ablated. Each
    circuit then costs its own named positions only. Circuits of heads by role, which change most
    tokens, are run whole.

    Args:
        model: the model.
        prompts: the prompts.
        circuits: heads kept, by named position or role.
        removed: for each circuit heads that are ablated all the same: F(C \\ K).
        ablation: as in `evaluate`.
        mean_outputs: as in `evaluate`.
        engine: as in `evaluate`.
        batch_size: prompts run together, at most.
        memory: as in `evaluate`.
        progress: called with the number of runs done since the last call, where one circuit on one
            prompt is a run.

    Raises:
        InputError: as `evaluate`, or if circuits and removed are not equally many.
    """
    gone = [None] * len(circuits) if removed is None else list(removed)
    if len(gone) != len(circuits):
        raise InputError(f"{len(circuits)} circuits can't have heads removed {len(gone)} times.")
    edited = [*circuits, *(heads for heads in gone if heads is not None)]
    _check_evaluation(model, prompts, edited)
    ablated = ablation_of(model, ablation, mean_outputs)
    by_token = all(
        name in prompts.positions or not heads
        for some in edited
        for name, heads in heads_by_position(some).items()
    )

    def logits_of(chunk: PromptBatch) -> Iterable[Tensor]:
        if engine == "exact" and by_token:
            resid = AblatedRun.record(model, chunk, ablated).answer_resid_each(
                circuits, removed=gone, memory=memory
            )
            return (unembed(model, final) for final in resid)
        return (
            answer_logits(model, chunk, ablate_heads(ablated, chunk, keep=circuit, remove=heads))
            for circuit, heads in zip(circuits, gone, strict=True)
        )

    return evaluate_each(
        model,
        prompts,
        len(circuits),
        logits_of,
        batch_size=batch_size,
        memory=memory,
        progress=progress,
    )


@checked
@torch.no_grad()
def evaluate_removals(
    model: Model,
    prompts: PromptBatch,
    removed: Sequence[Circuit | HeadsAt],
    *,
    ablation: Ablation | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> list[Evaluation]:
    """F(M \\ K) for many K on the same prompts: only K's heads ablated, at their tokens.

    The exact engine runs the prompts once; each K then costs the tokens and layers from its first
    head on.

    Arguments and errors are those of `evaluate_circuits`, with the heads removed in place of those
    kept.
    """
    _check_evaluation(model, prompts, removed)
    ablated = ablation_of(model, ablation, mean_outputs)
    by_name = [heads_by_position(heads) for heads in removed]
    names = [name for at in by_name for name, heads in at.items() if heads]
    heads_of = [[head for some in at.values() for head in some] for at in by_name]
    lowest = [min(head.layer for head in heads) for heads in heads_of if heads]

    def logits_of(chunk: PromptBatch) -> Iterable[Tensor]:
        hooks = [ablate_heads(ablated, chunk, remove=heads) for heads in removed]
        if engine == "exact" and names:
            run = CleanRun.record(
                model, chunk, first_layer=min(lowest), positions=names, begins=lowest
            )
            return (unembed(model, final) for final in run.answer_resid_each(hooks, memory=memory))
        return (answer_logits(model, chunk, some) for some in hooks)

    return evaluate_each(
        model,
        prompts,
        len(removed),
        logits_of,
        batch_size=batch_size,
        memory=memory,
        progress=progress,
    )


def evaluate_each(
    model: Model,
    prompts: AnsweredRows,
    n_edits: int,
    logits_of: Callable[[AnsweredRows], Iterable[Tensor]],
    *,
    batch_size: int,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> list[Evaluation]:
    """The answers to prompts, or to the targets of pairs, under each of several edits; processes
    share them, and a batch that runs out of memory is halved.

    Args:
        model: the model.
        prompts: the prompts or pairs.
        n_edits: how many edits there are.
        logits_of: gives, for some of the prompts on the model's device, the logits at `"last"`
            under each edit in turn.
        batch_size: prompts run together, at most.
        memory: bytes that kept runs may take; found from the device if left out.
        progress: called with the number of runs done since the last call, where one edit on one
            prompt is a run; with a negative number for runs that must be done once more.
    """
    if n_edits == 0:
        return []
    prompts = prompts.to(model.cfg.device or "cpu")
    answers = prompts.answers if isinstance(prompts, PromptBatch) else prompts.targets
    tokens = prompts.tokens if isinstance(prompts, PromptBatch) else prompts.clean.tokens
    memory = memory_budget(model.cfg.device) if memory is None else memory
    size = min(batch_size, prompts_within(model.cfg, tokens.shape[1], memory))

    def compute(chunk: AnsweredRows) -> tuple[Tensor, Tensor]:
        wanted = chunk.answers if isinstance(chunk, PromptBatch) else chunk.targets
        chosen: list[Tensor] = []
        scores: list[Tensor] = []
        try:
            for logits in logits_of(chunk):
                if not are_finite([logits]):
                    raise NotFiniteError(
                        "The logits are not finite; numbers are too large for the model's dtype.",
                        "logits",
                    )
                chosen.append(logits.argmax(-1))
                scores.append(log_probability(logits, wanted))
                progress(len(chunk))
        except BaseException:
            progress(-len(chunk) * len(scores))
            raise
        return torch.stack(chosen), torch.stack(scores)

    def compute_mine(mine: AnsweredRows) -> tuple[Tensor, Tensor]:
        found = [some for _, some in halving(mine, size, compute)]
        return torch.cat([c for c, _ in found], -1), torch.cat([s for _, s in found], -1)

    with guarded(model):
        chosen, scores = shared_out(prompts, compute_mine)
    chosen = chosen.to(answers.device)
    return [
        Evaluation(predicted, predicted == answers, score)
        for predicted, score in zip(chosen, scores, strict=True)
    ]


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
    model: Model, prompts: PromptBatch, edited_heads: Sequence[Circuit | HeadsAt]
) -> None:
    for heads in edited_heads:
        for name, at in heads_by_position(heads).items():
            check_heads(model, at)
            if at:
                prompts.where(name)
    check_prompts(model, prompts, answered=True)


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
