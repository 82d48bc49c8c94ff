"""What a fine-tune gains on some prompts, and how much of it a model in between has."""

from typing import NamedTuple

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.hooks.vocabulary import check_pairs, check_prompts
from tl_entity.methods.circuits import Evaluation
from tl_entity.stats import Interval, paired_difference_interval, paired_share
from tl_entity.tasks.batches import PairBatch, PromptBatch


class Recovered(NamedTuple):
    """How much of the tuned model's gain in accuracy another model has.

    Attributes:
        gain: its accuracy less the base model's.
        gain_interval: 95 % interval, prompts compared in pairs.
        recovered: the gain as a share of what the tuned model gains; NaN where that is nothing.
        recovered_interval: its 95 % score interval (`paired_share`); NaN, with `recovered`, where
            the gain can't be told from nothing.
    """

    gain: float
    gain_interval: Interval
    recovered: float
    recovered_interval: Interval


@checked
def recovered_gain(evaluation: Evaluation, base: Evaluation, tuned: Evaluation) -> Recovered:
    """The gain of a model that is neither base nor tuned, on the same prompts as both."""
    right, before, after = (found.correct.cpu().numpy() for found in (evaluation, base, tuned))
    recovered, interval = paired_share(before, right, after)
    return Recovered(
        gain=evaluation.accuracy - base.accuracy,
        gain_interval=paired_difference_interval(right, before),
        recovered=recovered,
        recovered_interval=interval,
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
        check_prompts(model, prompts, answered=True)
        prompts = PairBatch(prompts, prompts, prompts.answers)
    pairs = prompts.to(model.cfg.device or "cpu")
    check_pairs(model, pairs)
    return pairs
