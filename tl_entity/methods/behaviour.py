"""What changed that needs no look inside: accuracy by what is asked, and the kinds of errors.

A story about a mechanism that these tables already tell is not a deep one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.cross_model import check_same_architecture
from tl_entity.methods.circuits import BATCH_SIZE, Evaluation, evaluate
from tl_entity.results import Result
from tl_entity.stats import Interval, paired_difference_interval, wilson_interval
from tl_entity.tasks.boxes import BoxPrompt, mark_sentence
from tl_entity.tasks.marked import tokenize_marked

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

RIGHT, FORM, OBJECT, LABEL, OTHER = (
    "right",
    "form of the answer",
    "another object",
    "label",
    "other",
)

ANSWER_KINDS: Mapping[str, str] = {
    RIGHT: "the answer's token",
    FORM: "the answer in another form: other case, no space ahead, or only its beginning",
    OBJECT: "another object of the context, or its beginning",
    LABEL: "the label of a box of the context",
    OTHER: "anything else",
}
"""The kinds of answers, and what is one; the first that fits counts."""

BOXES, INDEX, ANSWER = "boxes", "segment asked", "answer"
"""What the rows of the table are by."""


class Compared(NamedTuple):
    """One proportion in both models, on the same prompts.

    Attributes:
        n_prompts: how many prompts there are.
        base: in the base model.
        base_interval: Wilson's 95 % interval.
        tuned: in the tuned model.
        tuned_interval: Wilson's 95 % interval.
        difference: tuned less base.
        difference_interval: 95 % interval, prompts compared in pairs.
    """

    n_prompts: int
    base: float
    base_interval: Interval
    tuned: float
    tuned_interval: Interval
    difference: float
    difference_interval: Interval

    @classmethod
    def of(cls, base: np.ndarray, tuned: np.ndarray) -> "Compared":
        """From whether it holds for each prompt."""
        n = len(base)
        each = [(int(x.sum()) / n, wilson_interval(int(x.sum()), n)) for x in (base, tuned)]
        (before, before_interval), (after, after_interval) = each
        return cls(
            n_prompts=n,
            base=before,
            base_interval=before_interval,
            tuned=after,
            tuned_interval=after_interval,
            difference=after - before,
            difference_interval=paired_difference_interval(tuned, base),
        )


@checked
@dataclass(frozen=True)
class Behaviour(Result):
    """How two models answer the same box prompts.

    Attributes:
        base: the base model's answers.
        tuned: the tuned model's.
        n_boxes: boxes in each prompt.
        index: the segment that each prompt asks about, counted from 0.
        base_kinds: of each answer of the base model, its place among `ANSWER_KINDS`.
        tuned_kinds: of the tuned model.
    """

    base: Evaluation
    tuned: Evaluation
    n_boxes: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    base_kinds: Int[Tensor, " batch"]
    tuned_kinds: Int[Tensor, " batch"]

    def __str__(self) -> str:
        most = max(
            (kind for kind in ANSWER_KINDS if kind != RIGHT),
            key=lambda kind: abs(self.by_answer()[kind].difference),
        )
        found = self.by_answer()[most]
        return (
            f"base {self.base.accuracy:.3f}, tuned {self.tuned.accuracy:.3f} of {len(self.base)} "
            f"prompts; the error that changes most, {most}: {found.base:.3f} to {found.tuned:.3f}"
        )

    def by_boxes(self) -> dict[int, Compared]:
        """Accuracy by the number of boxes."""
        return self._accuracy_by(self.n_boxes)

    def by_index(self) -> dict[int, Compared]:
        """Accuracy by the segment asked about, counted from 0."""
        return self._accuracy_by(self.index)

    def by_answer(self) -> dict[str, Compared]:
        """How often the models' answers are of each kind."""
        base, tuned = (kinds.cpu().numpy() for kinds in (self.base_kinds, self.tuned_kinds))
        return {
            kind: Compared.of(base == number, tuned == number)
            for number, kind in enumerate(ANSWER_KINDS)
        }

    def _accuracy_by(self, key: Tensor) -> dict[int, Compared]:
        base, tuned = (found.correct.cpu().numpy() for found in (self.base, self.tuned))
        keys = key.cpu().numpy()
        return {
            int(value): Compared.of(base[keys == value], tuned[keys == value])
            for value in np.unique(keys)
        }

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a number of boxes, segment asked about, and kind of answer: the proportion in
        both models, and the difference, with intervals."""
        import pandas as pd

        groups: list[tuple[str, dict[Any, Compared]]] = [
            (BOXES, self.by_boxes()),
            (INDEX, self.by_index()),
            (ANSWER, self.by_answer()),
        ]
        rows = [
            {
                "by": by,
                "value": str(value),
                "n_prompts": found.n_prompts,
                "base": found.base,
                "base_low": found.base_interval.low,
                "base_high": found.base_interval.high,
                "tuned": found.tuned,
                "tuned_low": found.tuned_interval.low,
                "tuned_high": found.tuned_interval.high,
                "difference": found.difference,
                "difference_low": found.difference_interval.low,
                "difference_high": found.difference_interval.high,
            }
            for by, compared in groups
            for value, found in compared.items()
        ]
        return pd.DataFrame(rows)

    def table(self, n: int | None = None) -> "pd.DataFrame":
        """Both proportions and the difference with its interval."""
        rows = self.to_dataframe()
        rows = rows.drop(columns=["base_low", "base_high", "tuned_low", "tuned_high"])
        return rows if n is None else rows.head(n)

    def plot(self, *, by: str = ANSWER, title: str | None = None) -> "go.Figure":
        """Base beside tuned model, with 95 % intervals.

        Args:
            by: "boxes", "segment asked" or "answer".
            title: above the figure.

        Raises:
            InputError: if `by` is something else.
        """
        from tl_entity.plots.bars import Bar, grouped_bars

        choices: dict[str, Callable[[], dict[Any, Compared]]] = {
            BOXES: self.by_boxes,
            INDEX: self.by_index,
            ANSWER: self.by_answer,
        }
        if by not in choices:
            raise InputError(f"Behaviour is shown by {', '.join(choices)}, not by {by!r}.")
        found = choices[by]()
        series = {
            "base": {str(key): Bar(c.base, *c.base_interval) for key, c in found.items()},
            "tuned": {str(key): Bar(c.tuned, *c.tuned_interval) for key, c in found.items()},
        }
        axis = "share of the answers" if by == ANSWER else "accuracy"
        title = f"Base and tuned model by {by}" if title is None else title
        return grouped_bars(series, title=title, axis=axis)


@checked
def compare_behaviour(
    base: Model,
    tuned: Model,
    prompts: Sequence[BoxPrompt],
    *,
    batch_size: int = BATCH_SIZE,
    memory: int | None = None,
) -> Behaviour:
    """How the two models answer box prompts: by boxes, by segment asked about, by kind of answer.

    Args:
        base: the model before, which has a tokenizer.
        tuned: the model after.
        prompts: the prompts, such as `sample_prompts` gives them, of one or several numbers of
            boxes; objects and labels must be one token each.
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take; found from the device if left out.

    Raises:
        InputError: if the models differ in architecture or tokenizer, the base has no tokenizer, a
            prompt has no answer, or there is none.
    """
    check_same_architecture(base, tuned)
    tokenizer = base.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError("The base model has no tokenizer to write the prompts with.")
    if not prompts:
        raise InputError("There are no prompts to answer.")
    asked = [prompt.query_index for prompt in prompts]
    batch = tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], tokenizer)
    found = [
        evaluate(model, batch, batch_size=batch_size, memory=memory) for model in (base, tuned)
    ]
    kinds = [
        [
            kind_of_answer(str(tokenizer.decode([token])), right, prompt)
            for token, right, prompt in zip(
                one.predicted.tolist(), one.correct.tolist(), prompts, strict=True
            )
        ]
        for one in found
    ]
    numbers = {kind: number for number, kind in enumerate(ANSWER_KINDS)}
    new = batch.answers.new_tensor
    base_kinds, tuned_kinds = (new([numbers[kind] for kind in some]) for some in kinds)
    return Behaviour(
        base=found[0],
        tuned=found[1],
        n_boxes=new([len(prompt.labels) for prompt in prompts]),
        index=new(asked),
        base_kinds=base_kinds,
        tuned_kinds=tuned_kinds,
    )


def kind_of_answer(text: str, right: bool, prompt: BoxPrompt) -> str:
    """Of which of `ANSWER_KINDS` a predicted token is.

    Args:
        text: what the token reads as.
        right: whether it is the answer's token.
        prompt: what was asked.
    """
    word = text.strip().casefold()
    answer = prompt.answer or ""
    if right:
        return RIGHT
    if not word:
        return OTHER
    # A label is a letter, and may be how an object begins: as a capital letter it is the label.
    if text.strip() in prompt.labels:
        return LABEL
    if answer.casefold().startswith(word):
        return FORM
    if any(noun.casefold().startswith(word) for noun in prompt.objects):
        return OBJECT
    return OTHER
