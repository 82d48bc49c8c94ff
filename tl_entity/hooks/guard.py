"""A model while it is worked on: by one thread, without hooks that somebody else left on it, and
with weights that are numbers."""

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from tl_entity._model import Model
from tl_entity.errors import InputError
from tl_entity.finite import are_finite, check_finite

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where torch keeps a module's hooks; those that TransformerLens adds are among them."""

OWN_HOOKS = ("transformer_lens.model_bridge.", "transformers.", "accelerate.")
"""Modules whose hooks belong to a TransformerBridge, which sets them in its first run."""

CALLED_ALIKE = "embed"
"""The module that every engine calls once for each run, so that a hook on it does no harm."""

NAMED = 3
"""Hook points that a message names."""


@dataclass
class _Guard:
    """What is known of a model.

    Attributes:
        lock: held by the thread that works on it.
        depth: how many contexts that thread is in.
        finite: identifies the weights that were found to be finite.
    """

    lock: Any = field(default_factory=threading.RLock)
    depth: int = 0
    finite: tuple[tuple[int, int], ...] | None = None


_guards: WeakKeyDictionary[nn.Module, _Guard] = WeakKeyDictionary()
_guards_lock = threading.Lock()


@contextmanager
def guarded(*models: Model) -> Generator[None, None, None]:
    """Within this context no other thread works on these models: one that wants to waits.

    Runs set hooks and flags on the model itself, so two at a time would see each other's. Contexts
    within a context, in the same thread, do nothing.

    Raises:
        InputError: if hooks are attached to a model, naming the hook points; a recomputation would
            not pass by all of them, so no method takes them.
        NotFiniteError: if a weight is not finite, naming it. The weights are read once, and again
            when they have changed.
    """
    # In one order in all threads, so that none waits for another that waits for it.
    chosen = sorted({id(model): model for model in models}.items())
    with ExitStack() as stack:
        for _, model in chosen:
            guard = _guard_of(model)
            stack.enter_context(guard.lock)
            if guard.depth == 0:
                _check_hooks(model)
                _check_weights(model, guard)
            stack.callback(_leave, guard)
            guard.depth += 1
        yield


def _guard_of(model: Model) -> _Guard:
    with _guards_lock:
        return _guards.setdefault(model, _Guard())


def _leave(guard: _Guard) -> None:
    guard.depth -= 1


def _check_hooks(model: Model) -> None:
    # At hook points, or on modules, which the exact engine calls in part, or not at all.
    points = model.hook_dict
    at_points = {id(point) for point in points.values()}
    names = [name for name, point in points.items() if any(getattr(point, at) for at in _HOOKS)]
    names += [
        _plain(name) or "the model itself"
        for name, module in model.named_modules()
        if id(module) not in at_points
        and name != CALLED_ALIKE
        and any(not _is_own(hook) for at in _HOOKS for hook in getattr(module, at).values())
    ]
    if not names:
        return
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    raise InputError(
        "The model can't be worked on: hooks are attached to it for good at "
        f"{', '.join(names[:NAMED])}{more}, which a recomputation would pass over; take them off "
        "with model.reset_hooks(including_permanent=True)."
    )


def _is_own(hook: Any) -> bool:
    """Whether a hook on a module is of the libraries that run it: they look, and change nothing."""
    return str(getattr(hook, "__module__", "")).startswith(OWN_HOOKS)


def _check_weights(model: Model, guard: _Guard) -> None:
    named = [(name, weight) for name, weight in model.named_parameters() if not weight.is_meta]
    # A change in place has another version, a new tensor another address.
    now = tuple((weight.data_ptr(), _version(weight)) for _, weight in named)
    if now == guard.finite:
        return
    if not are_finite([weight for _, weight in named]):
        for name, weight in named:
            check_finite(
                f"The model's weight {_plain(name)}", weight, "load the model anew, or mend it"
            )
    guard.finite = now


def _version(weight: Tensor) -> int:
    # Tensors made in inference mode count no changes.
    return 0 if weight.is_inference() else weight._version  # pyright: ignore[reportPrivateUsage]


def _plain(name: str) -> str:
    """A module's name without the wrappers that a TransformerBridge puts around each."""
    return name.replace("_original_component.", "").removesuffix("._original_component")
