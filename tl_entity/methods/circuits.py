"""Is a circuit enough? Ablation, accuracy, faithfulness, random control (paper, §3.3)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import Alike, piece
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.ablation import AblatedRun
from tl_entity.exact.blocks import unembed
from tl_entity.exact.memory import halving, memory_budget, prompts_within
from tl_entity.exact.suffix import CleanRun
from tl_entity.heads import Circuit, Group, Head, HeadsAt, heads_by_position, without
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import log_probability
from tl_entity.ranks import share_of, shared_out, summed
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.stats import Bootstrap, Interval, wilson_interval
from tl_entity.tasks.batches import PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

AnsweredRows = TypeVar("AnsweredRows", PromptBatch, PairBatch)
"""What has an answer each: prompts, or pairs with their targets."""

BATCH_SIZE = 32
"""Prompts run together where nothing else is said."""


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
        interval: 95 % bootstrap interval, prompts resampled in pairs; where no resample differs, as
            with a circuit that answers nothing or just what the model does, Bonett and Price's
            (`Bootstrap.ratio_of_proportions`).
    """

    of_circuit: Evaluation
    of_model: Evaluation
    value: float
    interval: Interval

    @classmethod
    def of(cls, of_circuit: Evaluation, of_model: Evaluation, *, seed: int) -> "Faithfulness":
        """From the two evaluations; `seed` is that of the bootstrap."""
        if not of_model.accuracy:
            return cls(of_circuit, of_model, math.nan, Interval(math.nan, math.nan))
        value = of_circuit.accuracy / of_model.accuracy
        interval = Bootstrap.draw(len(of_model), seed=seed).ratio_of_proportions(
            of_circuit.correct.cpu().numpy(), of_model.correct.cpu().numpy()
        )
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
def mean_head_outputs(
    model: Model,
    tokens: PromptBatch | Int[Tensor, "batch pos"],
    *,
    batch_size: int = BATCH_SIZE,
) -> Float[Tensor, "layer pos head d_head"]:
    """Mean `hook_z` of every head at every token position, over prompts of one form.

    These are the values that ablated heads get (paper, §3.3). A padded position counts only the
    prompts that have a token there.

    Args:
        model: the model.
        tokens: prompts, or unpadded tokens.
        batch_size: prompts run together.

    Raises:
        InputError: if a batch is padded on the left, where positions do not line up.
    """
    if not isinstance(tokens, PromptBatch):
        n, length = tokens.shape
        last = torch.full((n,), length - 1, device=tokens.device)
        tokens = PromptBatch(tokens, torch.zeros_like(last), {"last": last})
    if not bool(tokens.mask[:, 0].all()):
        raise InputError("Mean head outputs need prompts padded on the right, not the left.")
    tokens = tokens.to(model.cfg.device or "cpu")
    points: dict[str, str | None] = {
        hook_point("z", layer): None for layer in range(model.cfg.n_layers)
    }
    sums: dict[str, Tensor] = {}
    share = share_of(len(tokens))
    for chunk in tokens[share.rows].chunks(batch_size):
        there = chunk.mask[:, :, None, None] & (share.n > 0)
        for name, z in record(model, chunk, points).items():
            total = (z.to(torch.float64) * there.to(z.device)).sum(0)
            sums[name] = sums[name] + total if name in sums else total
    sums = {name: summed(total) for name, total in sums.items()}
    counts = tokens.mask.sum(0).clamp(min=1)[:, None, None]
    means = [sums[name].to(counts.device) / counts for name in points]
    return torch.stack(means).to(model.cfg.dtype)


@checked
@torch.no_grad()
def evaluate(
    model: Model,
    prompts: PromptBatch,
    *,
    keep: Circuit | HeadsAt | None = None,
    remove: Circuit | HeadsAt | None = None,
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None = None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
) -> Evaluation:
    """Answer the prompts, whole or with heads ablated to their mean outputs.

    With `keep`, every head at every token is ablated, except the kept ones at their own positions:
    F(C). With `remove`, just those are: F(M \\ K). With both, the removed ones are ablated even if
    kept: F(C \\ K) (paper, §3.3). For many circuits on the same prompts, `evaluate_circuits` is
    far quicker.

    Args:
        model: the model.
        prompts: the prompts.
        keep: a circuit, or heads by named position.
        remove: heads ablated at their positions.
        mean_outputs: what ablated heads put out, from `mean_head_outputs` of other prompts of the
            same form.
        engine: "exact" computes only what the circuit can change, "hooks" everything.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.

    Raises:
        InputError: if heads are to be ablated without `mean_outputs` or with another model's, a
            head or position does not exist, a prompt has no answer, the prompts are longer than the
            mean outputs or padded on the left, or the exact engine does not fit the model.
    """
    if keep is not None:
        kept = keep if remove is None else without(keep, remove)
        if remove is not None:
            _check_evaluation(model, prompts, [remove], mean_outputs)
        return evaluate_circuits(
            model,
            prompts,
            [kept],
            mean_outputs=mean_outputs,
            engine=engine,
            batch_size=batch_size,
            memory=memory,
        )[0]
    if remove is not None:
        return evaluate_removals(
            model,
            prompts,
            [remove],
            mean_outputs=mean_outputs,
            engine=engine,
            batch_size=batch_size,
            memory=memory,
        )[0]
    _check_evaluation(model, prompts, [], mean_outputs)
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
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> list[Evaluation]:
    """F(C) of many circuits on the same prompts: all but a circuit's heads ablated everywhere.

    The exact engine computes what the circuits share once: the run with every head ablated. Each
    circuit then costs its own named positions only.

    Args:
        model: the model.
        prompts: the prompts.
        circuits: heads kept, by named position.
        mean_outputs: as in `evaluate`.
        engine: as in `evaluate`.
        batch_size: prompts run together, at most.
        memory: as in `evaluate`.
        progress: called with the number of runs done since the last call, where one circuit on one
            prompt is a run.

    Raises:
        InputError: as `evaluate`.
    """
    values = _check_evaluation(model, prompts, circuits, mean_outputs, edited=True)

    def logits_of(chunk: PromptBatch) -> Iterable[Tensor]:
        if engine == "exact":
            resid = AblatedRun.record(model, chunk, values).answer_resid_each(
                circuits, memory=memory
            )
            return (unembed(model, final) for final in resid)
        return (
            answer_logits(model, chunk, ablate_heads(values, chunk, keep=circuit))
            for circuit in circuits
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
    mean_outputs: Float[Tensor, "layer pos head d_head"] | None,
    engine: Engine = "exact",
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
    progress: Callable[[int], object] = lambda runs: None,
) -> list[Evaluation]:
    """F(M \\ K) for many K on the same prompts: only K's heads ablated, at their positions.

    The exact engine runs the prompts once; each K then costs the tokens and layers from its first
    head on.

    Arguments and errors are those of `evaluate_circuits`, with the heads removed in place of those
    kept.
    """
    values = _check_evaluation(model, prompts, removed, mean_outputs, edited=True)
    by_position = [heads_by_position(heads) for heads in removed]
    positions = [name for at in by_position for name, heads in at.items() if heads]
    heads_of = [[head for some in at.values() for head in some] for at in by_position]
    lowest = [min(head.layer for head in heads) for heads in heads_of if heads]

    def logits_of(chunk: PromptBatch) -> Iterable[Tensor]:
        hooks = [ablate_heads(values, chunk, remove=heads) for heads in removed]
        if engine == "exact" and positions:
            run = CleanRun.record(
                model, chunk, first_layer=min(lowest), positions=positions, begins=lowest
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

    this = object()

    def alike(chunk: AnsweredRows) -> Alike:
        both = [chunk] if isinstance(chunk, PromptBatch) else [chunk.clean, chunk.corrupt]
        family = this, *((some.tokens.shape, some.attention_mask is None) for some in both)
        columns = [index.tolist() for some in both for index in some.positions.values()]
        places = sorted(zip(*columns, strict=True))
        # The earlier an edit is, the more tokens come after it.
        return Alike((family, tuple(places)), family, -sum(map(sum, places)))

    @piece(alike=alike)
    def compute(chunk: AnsweredRows) -> tuple[Tensor, Tensor]:
        wanted = chunk.answers if isinstance(chunk, PromptBatch) else chunk.targets
        chosen: list[Tensor] = []
        scores: list[Tensor] = []
        try:
            for logits in logits_of(chunk):
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

    chosen, scores = shared_out(prompts, compute_mine)
    chosen = chosen.to(answers.device)
    return [
        Evaluation(predicted, predicted == answers, score)
        for predicted, score in zip(chosen, scores, strict=True)
    ]


@checked
def judge(logits: Float[Tensor, "batch d_vocab"], prompts: PromptBatch) -> Evaluation:
    """The answers that these logits at `"last"` give to the prompts."""
    predicted = logits.argmax(-1).to(prompts.answers.device)
    return Evaluation(
        predicted, predicted == prompts.answers, log_probability(logits, prompts.answers)
    )


def _check_evaluation(
    model: Model,
    prompts: PromptBatch,
    edited_heads: Sequence[Circuit | HeadsAt],
    mean_outputs: Tensor | None,
    *,
    edited: bool = False,
) -> Tensor:
    """The mean outputs, if everything fits together."""
    if mean_outputs is None:
        if edited:
            raise InputError("To ablate heads, give mean_outputs (from mean_head_outputs).")
        mean_outputs = torch.empty(0)
    else:
        cfg = model.cfg
        sizes = (cfg.n_layers, cfg.n_heads, cfg.d_head)
        given = (mean_outputs.shape[0], *mean_outputs.shape[2:])
        if given != sizes:
            raise InputError(
                f"The mean outputs are of {given} layers, heads and d_head, the model has {sizes}."
            )
    for heads in edited_heads:
        for at in heads_by_position(heads).values():
            check_heads(model, at)
    if bool((prompts.answers < 0).any()):
        raise InputError("Some prompts have no answer, so there is no accuracy to measure.")
    return mean_outputs


@checked
def random_circuits(model: Model, circuit: Circuit, n_circuits: int, *, seed: int) -> list[Circuit]:
    """Circuits of the same group sizes and positions, of heads drawn at random from the model.

    Heads are drawn without replacement: within a circuit, no head comes twice at one position.

    Raises:
        InputError: if the circuit has more heads at a position than the model has.
    """
    generator = np.random.default_rng(seed)
    n_heads = model.cfg.n_heads
    total = model.cfg.n_layers * n_heads
    for position, heads in circuit.heads_at().items():
        if len(heads) > total:
            raise InputError(
                f"{len(heads)} different heads at {position!r} can't be drawn: "
                f"the model has {total}."
            )
    circuits = []
    for _ in range(n_circuits):
        order = {position: generator.permutation(total) for position in circuit.heads_at()}
        groups = []
        for group in circuit:
            drawn, order[group.position] = np.split(order[group.position], [len(group.heads)])
            heads = tuple(sorted(Head(*divmod(int(index), n_heads)) for index in drawn))
            groups.append(Group(group.name, group.position, heads))
        circuits.append(Circuit(tuple(groups)))
    return circuits


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
