"""What a fine-tune gains on some prompts, and how much of it a model in between has."""

from typing import NamedTuple

import numpy as np

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.methods.circuits import Evaluation
from tl_entity.stats import Bootstrap, Interval, paired_difference_interval
from tl_entity.tasks.batches import PairBatch, PromptBatch


class Recovered(NamedTuple):
    """How much of the tuned model's gain in accuracy another model has.

    Attributes:
        gain: its accuracy less the base model's.
        gain_interval: 95 % interval, prompts compared in pairs.
        recovered: the gain as a share of what the tuned model gains; NaN where that is nothing.
        recovered_interval: 95 % bootstrap interval; wide, and of little worth, where the two models
            hardly differ. Draws in which they don't differ at all have no share and are left out.
    """

    gain: float
    gain_interval: Interval
    recovered: float
    recovered_interval: Interval


@checked
def recovered_gain(
    evaluation: Evaluation, base: Evaluation, tuned: Evaluation, bootstrap: Bootstrap
) -> Recovered:
    """The gain of a model that is neither base nor tuned, on the same prompts as both."""
    right, before, after = (found.correct.cpu().numpy() for found in (evaluation, base, tuned))
    gain, whole = evaluation.accuracy - base.accuracy, tuned.accuracy - base.accuracy
    recovered = bootstrap.ratio(
        *(now.astype(np.float64) - before.astype(np.float64) for now in (right, after))
    )
    if recovered.low == recovered.high and whole:
        # The same prompts as before are right, or the same as in the tuned model: no draw differs.
        reached, alike = (1.0, after) if recovered.low == 1 else (0.0, before)
        bounds = (bound / whole for bound in paired_difference_interval(right, alike))
        recovered = Interval(*(reached + bound for bound in sorted(bounds)))
    return Recovered(
        gain=gain,
        gain_interval=paired_difference_interval(right, before),
        recovered=gain / whole if whole else float("nan"),
        recovered_interval=recovered,
    )


@checked
def scored_pairs(model: Model, prompts: PromptBatch | PairBatch) -> PairBatch:
    """The prompts as a metric takes them, on the model's device; prompts by themselves are scored
    on their answers.

    Raises:
        InputError: if there are none, one has nothing to score, or one has a token that the model
            does not know.
    """
    if isinstance(prompts, PromptBatch):
        prompts = PairBatch(prompts, prompts, prompts.answers)
    pairs = prompts.to(model.cfg.device or "cpu")
    if len(pairs) == 0:
        raise InputError("There are no prompts to score.")
    if bool((pairs.targets < 0).any()):
        raise InputError("Some prompts have no answer, so there is nothing to score.")
    highest = max(int(pairs.clean.tokens[pairs.clean.mask].max()), int(pairs.targets.max()))
    if highest >= model.cfg.d_vocab:
        raise InputError(
            f"A prompt or answer has the token {highest}; the model knows {model.cfg.d_vocab}."
        )
    return pairs
