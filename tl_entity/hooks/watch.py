"""Where a run first stops being finite, found by running it once more with every step looked at."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

from tl_entity._model import Model
from tl_entity.finite import NotFiniteError, are_finite, in_one_place, is_true, places
from tl_entity.hooks.points import FINAL_NORMALIZED, hook_point

STEPS = (
    *("resid_pre", "q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z"),
    *("attn_out", "resid_mid", "mlp_out", "resid_post"),
)
"""What is looked at in every layer."""

_SCORES = ".attn.hook_attn_scores"
"""Ending of the points where tokens that can't be seen have a score of minus infinity."""

Found = TypeVar("Found")


class Watch:
    """The first activation that is not finite, of those that are seen.

    Attributes:
        point: its hook point; None while all were finite.
        places: how many of its numbers are not, and which is the first.
    """

    def __init__(self) -> None:
        self.point: str | None = None
        self.places = ""

    def see(self, point: str, activation: Tensor) -> None:
        """Look at an activation, unless one before was not finite."""
        if self.point is None and not points_are_finite({point: activation}):
            wrong = ~activation.detach().isfinite()
            if point.endswith(_SCORES):
                wrong &= ~activation.detach().isneginf()
            self.point, self.places = point, places(activation, wrong)

    def error(self) -> NotFiniteError:
        """What to raise about it."""
        where = "the run's result" if self.point is None else self.point
        seen = f" ({self.places})" if self.places else ""
        return NotFiniteError(
            f"The run is not finite from {where} on{seen}; the weights may be damaged, or numbers "
            "too large for the model's dtype.",
            where,
        )


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


def see(name: str, layer: int, activation: Tensor) -> None:
    """Show an activation of a recomputation, such as `see("z", 3, z)`, to whoever is watching."""
    watch = _watch.get()
    if watch is not None:
        watch.see(hook_point(name, layer), activation)


def assure_finite(result: Tensor) -> Tensor:
    """The same result of a recomputation.

    Raises:
        NotFiniteError: if it is not finite; `located` finds out where that began.
    """
    if not are_finite([result]):
        raise NotFiniteError("A recomputation is not finite.")
    return result


def located(compute: Callable[[], Found]) -> Found:
    """What `compute` gives. If it turns out not to be finite, it is run once more to say from where
    on.

    Raises:
        NotFiniteError: naming the first point that is not finite.
    """
    try:
        return compute()
    except NotFiniteError as error:
        if error.point is not None:
            raise
    with _watching() as watch:
        try:
            return compute()
        except NotFiniteError:
            raise watch.error() from None


@contextmanager
def _watching() -> Generator[Watch, None, None]:
    watch = Watch()
    token = _watch.set(watch)
    try:
        yield watch
    finally:
        _watch.reset(token)


def points_are_finite(activations: Mapping[str, Tensor]) -> bool:
    """Whether activations, by hook point, are finite; scores of what can't be seen need not be."""
    scores = [at for name, at in activations.items() if name.endswith(_SCORES)]
    others = [at for name, at in activations.items() if not name.endswith(_SCORES)]
    return are_finite(others) and scores_are_finite([at.detach().amax() for at in scores])


def scores_are_finite(largest: list[Tensor]) -> bool:
    """Whether all attention scores are finite or minus infinity, given the largest of each layer,
    which is NaN where one of them is."""
    if not largest:
        return True
    return is_true((in_one_place(largest) < float("inf")).all())


class ScoreWatch:
    """Notes the largest attention score of every layer of a run.

    Both kinds of model put zeros in the place of an attention pattern that is NaN, so that what
    comes after may look sound.
    """

    def __init__(self) -> None:
        self._largest: list[Tensor] = []

    @property
    def hook(self) -> tuple[Callable[[str], bool], Callable[..., None]]:
        """For `run_with_hooks`, behind all edits."""
        return (lambda name: name.endswith(_SCORES)), self._note

    @property
    def is_finite(self) -> bool:
        """Whether all scores were finite, or minus infinity."""
        return scores_are_finite(self._largest)

    def _note(self, activation: Tensor, hook: Any) -> None:
        if activation.numel():
            self._largest.append(activation.detach().amax())


def watching_hooks(model: Model, watch: Watch) -> list[tuple[str, Callable[..., None]]]:
    """Hooks, for behind all edits, that show a watch every step of a run."""
    layers = range(model.cfg.n_layers)
    points = [hook_point(name, layer) for layer in layers for name in STEPS]
    there = model.hook_dict

    def looking(point: str) -> Callable[..., None]:
        return lambda activation, hook: watch.see(point, activation)

    return [
        (point, looking(point))
        for point in ("hook_embed", *points, FINAL_NORMALIZED)
        if point in there
    ]
