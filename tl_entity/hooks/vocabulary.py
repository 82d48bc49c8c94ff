"""Whether a model can read what it is given: there are prompts, and it knows their tokens."""

import torch
from jaxtyping import Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.metrics import Metric
from tl_entity.tasks.batches import PairBatch, PromptBatch


@checked
def check_readable(model: Model, prompts: PromptBatch, *, kind: str = "prompt") -> None:
    """Make sure that there are prompts, and that the model has an embedding for all their tokens.

    Padding may be any number: it is not read.

    Args:
        model: the model.
        prompts: the prompts.
        kind: what messages call them.

    Raises:
        InputError: naming the prompt and the token.
    """
    if len(prompts) == 0:
        raise InputError("There are no prompts: the batch is empty.")
    size = model.cfg.d_vocab
    unknown = prompts.mask & ((prompts.tokens < 0) | (prompts.tokens >= size))
    if bool(unknown.any()):
        row, at = unknown.nonzero()[0].tolist()
        raise InputError(
            f"The {kind} {row} has at {at} the token {int(prompts.tokens[row, at])}, and the "
            f"model's vocabulary has {size}, counted from 0; use the model's own tokenizer."
        )


@checked
def check_prompts(
    model: Model, prompts: PromptBatch, *, answered: bool = False, kind: str = "prompt"
) -> None:
    """`check_readable`, and the same of the answers.

    Args:
        model: the model.
        prompts: the prompts.
        answered: whether each needs an answer; otherwise a negative number says that there is none.
        kind: what messages call them.

    Raises:
        InputError: naming the prompt and the token.
    """
    check_readable(model, prompts, kind=kind)
    missing = prompts.answers < 0
    if answered and bool(missing.any()):
        raise InputError(
            f"The {kind} {int(missing.nonzero()[0])} has no answer, so there is no accuracy to "
            "measure."
        )
    check_tokens(model, prompts.answers.clamp(min=0), f"answer of {kind}")


@checked
def check_pairs(model: Model, pairs: PairBatch, *, scored: bool = True) -> None:
    """Make sure that there are pairs, and that the model knows all their tokens.

    Args:
        model: the model.
        pairs: the pairs.
        scored: whether each needs a target.

    Raises:
        InputError: naming the pair and the token.
    """
    if len(pairs) == 0:
        raise InputError("There are no pairs: the batch is empty.")
    missing = pairs.targets < 0
    if scored and bool(missing.any()):
        row = int(missing.nonzero()[0])
        raise InputError(
            f"Pair {row} has no target: {int(pairs.targets[row])} is no token; every target must "
            "be a token of the vocabulary."
        )
    check_tokens(model, pairs.targets.clamp(min=0), "target of pair")
    if pairs.foils is not None:
        check_tokens(model, pairs.foils, "foil of pair")
    check_prompts(model, pairs.clean, kind="clean prompt")
    check_prompts(model, pairs.corrupt, kind="corrupt prompt")


@checked
def check_tokens(
    model: Model, tokens: Int[Tensor, " batch"] | Int[Tensor, "batch wanted"], kind: str
) -> None:
    """Make sure that the model has a logit for each of these tokens, one or a few a prompt.

    Args:
        model: the model.
        tokens: token ids.
        kind: names them in the message, ahead of the prompt's number: "foil of pair".

    Raises:
        InputError: naming the prompt and the token.
    """
    size = model.cfg.d_vocab_out if model.cfg.d_vocab_out > 0 else model.cfg.d_vocab
    unknown = (tokens < 0) | (tokens >= size)
    if bool(unknown.any()):
        first = unknown.nonzero()[0].tolist()
        raise InputError(
            f"The {kind} {first[0]} is the token {int(tokens[tuple(first)])}, and the model's "
            f"vocabulary has {size}, counted from 0; use the model's own tokenizer."
        )


@checked
def check_metric(model: Model, metric: Metric, pairs: PairBatch) -> None:
    """Make sure that the pairs have the tokens that a metric reads, and the model a logit for each.

    Raises:
        InputError: if the metric lacks what it needs, or naming the pair and the token.
    """
    if metric.tokens is not None:
        check_tokens(model, metric.tokens(pairs), f"{metric.name} of pair")


@checked
def readable(model: Model, prompts: PromptBatch) -> Int[Tensor, "batch pos"]:
    """The prompts' tokens for the model to embed: padding that it has no embedding for is another
    token, masked as before."""
    unknown = (prompts.tokens < 0) | (prompts.tokens >= model.cfg.d_vocab)
    return torch.where(unknown & ~prompts.mask, 0, prompts.tokens)
