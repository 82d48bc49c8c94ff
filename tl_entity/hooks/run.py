"""Plain runs of a hooked model: edits that must fire, and caches of only what is asked for."""

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._pieces import RECORDED, given, piece
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import FINAL_NORMALIZED
from tl_entity.hooks.vocabulary import check_readable, readable
from tl_entity.hooks.watch import (
    ScoreWatch,
    Watch,
    points_are_finite,
    watching_hooks,
    watching_rows,
)
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch

_IN_BLOCK = re.compile(r"blocks\.(\d+)\.")


class _NamedAs:
    """A hook point under the name it was asked for. On a TransformerBridge, where some of
    HookedTransformer's names are aliases, its own name is another."""

    def __init__(self, hook: Any, name: str) -> None:
        self.hook, self.name = hook, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.hook, attribute)


HookFunction = Callable[..., Tensor | None]
"""Called as `function(activation, hook=hook)`; what it returns, if anything, replaces the
activation."""


@contextmanager
def must_fire(
    model: Model, hooks: Iterable[tuple[str, HookFunction]]
) -> Generator[list[tuple[str, HookFunction]], None, None]:
    """The same hooks, watched: it is an error if one is at no hook point of the model, or the
    context ends without it having been called. Each is called with the hook point under the name
    given here, which on a TransformerBridge may be an alias.

        with must_fire(model, hooks) as watched:
            model.run_with_hooks(tokens, fwd_hooks=watched)

    Raises:
        InputError: naming the unknown hook point, or those that never fired.
    """
    hooks = list(hooks)
    for name, _ in hooks:
        if name not in model.hook_dict:
            raise InputError(f"The model has no hook point {name!r}.")
    fired = [False] * len(hooks)

    def watched(index: int, name: str, function: HookFunction) -> HookFunction:
        def call(activation: Tensor, hook: Any) -> Tensor | None:
            fired[index] = True
            return function(activation, hook=hook if hook.name == name else _NamedAs(hook, name))

        return call

    yield [(name, watched(index, name, function)) for index, (name, function) in enumerate(hooks)]
    silent = sorted({name for (name, _), was in zip(hooks, fired, strict=True) if not was})
    if silent:
        raise InputError(
            f"The hook at {', '.join(silent)} never fired: the run did not pass there, "
            "or the model needs a flag set for that hook point."
        )


@checked
def answer_logits(
    model: Model,
    prompts: PromptBatch,
    hooks: Sequence[tuple[str, HookFunction]] = (),
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at each prompt's `"last"` token, under the given hooks.

    Only that token is unembedded: a whole prompt's logits would need the most memory of all.

    Raises:
        InputError: if a hook point does not exist, a hook does not fire, hooks of others are
            attached to the model, or it does not know a token of the prompts.
        NotFiniteError: naming the first hook point whose activation is not finite.
    """
    last = prompts.position(ANSWER_POSITION)

    def keep_last(normalized: Tensor, hook: Any) -> Tensor:
        rows = torch.arange(len(last), device=normalized.device)
        return normalized[rows, last.to(normalized.device)][:, None]

    with must_fire(model, [*hooks, (FINAL_NORMALIZED, keep_last)]) as watched:
        return _forward(model, prompts, watched, lambda logits: {"logits": logits})[:, 0]


def _recorded_alike(
    model: Model,
    prompts: PromptBatch,
    points: Mapping[str, str | slice | None],
    *,
    hooks: Sequence[tuple[str, HookFunction]] = (),
) -> object:
    if hooks:
        return None
    where = [(name, str(at) if isinstance(at, slice) else type(at)) for name, at in points.items()]
    return prompts.tokens.shape, prompts.attention_mask is None, tuple(where)


@piece(RECORDED, alike=_recorded_alike)
@checked
def record(
    model: Model,
    prompts: PromptBatch,
    points: Mapping[str, str | slice | None],
    *,
    hooks: Sequence[tuple[str, HookFunction]] = (),
) -> dict[str, Tensor]:
    """Run the prompts once and return the activations at some hook points, and nothing else.

    Layers above the highest point are not run.

    Args:
        model: the model.
        prompts: the prompts.
        points: for each full hook point name the named position to keep of each prompt (the pos
            axis is dropped), the tokens to keep of all prompts, or None to keep all tokens.
        hooks: edits made in the run; a recorded point is read after its edits.

    Raises:
        InputError: if a hook point or position does not exist, or as `answer_logits`.
        NotFiniteError: as `answer_logits`.
    """
    cache: dict[str, Tensor] = {}
    positions = {at: prompts.position(at) for at in points.values() if isinstance(at, str)}

    def keep(activation: Tensor, hook: Any) -> None:
        at = points[hook.name]
        activation = activation.detach()
        if isinstance(at, str):
            rows = torch.arange(len(prompts), device=activation.device)
            activation = activation[rows, positions[at].to(activation.device)]
        elif at is not None:
            # A copy, so that the rest is not kept with it.
            activation = activation[:, at].clone()
        cache[hook.name] = activation

    watching = [*hooks, *((name, keep) for name in points)]
    inside = [_IN_BLOCK.match(name) for name, _ in watching]
    # Past the highest block that is looked at, there is nothing to see.
    stop = max((int(match[1]) + 1 if match else model.cfg.n_layers for match in inside), default=0)
    with must_fire(model, watching) as watched:
        _forward(
            model,
            prompts,
            watched,
            lambda _: cache,
            stop_at_layer=None if None in inside else stop,
        )
    return cache


@checked
def embed(model: Model, prompts: PromptBatch) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream ahead of the first block.

    Raises:
        InputError: as `answer_logits`.
        NotFiniteError: as `answer_logits`.
    """
    return _forward(model, prompts, [], lambda resid: {"resid_pre": resid}, stop_at_layer=0)


def _forward(
    model: Model,
    prompts: PromptBatch,
    hooks: list[tuple[str, HookFunction]],
    wanted: Callable[[Tensor], Mapping[str, Tensor]],
    stop_at_layer: int | None = None,
) -> Tensor:
    """Run the model. `wanted` is what must be finite of the run, given what the model puts out."""
    length = prompts.tokens.shape[1]
    if length > model.cfg.n_ctx:
        raise InputError(
            f"The prompts have up to {length} tokens, and the model takes {model.cfg.n_ctx}."
        )
    check_readable(model, prompts)
    tokens, mask = readable(model, prompts), prompts.mask.long()

    def run(
        ahead: Sequence[tuple[Any, Callable[..., None]]],
        behind: Sequence[tuple[Any, Callable[..., None]]],
    ) -> Tensor:
        return model.run_with_hooks(
            given(tokens),
            # Given always: without one, TransformerLens guesses a mask from the pad token of
            # tokenizers that pad on the left.
            attention_mask=given(mask),
            fwd_hooks=[*ahead, *hooks, *behind],
            return_type="logits",
            stop_at_layer=stop_at_layer,
        )

    with guarded(model):
        scores = ScoreWatch(prompts.mask)
        output = run([scores.ahead], [scores.behind])
        if scores.is_finite and points_are_finite(wanted(output)):
            return output
        watch = Watch()
        with torch.no_grad():
            run(watching_rows(model, watch, prompts.mask), watching_hooks(model, watch))
        raise watch.error()
