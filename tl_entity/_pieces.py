"""Named pieces of work, so that a plan can say what a run is made of. Outside a plan a piece is
just its function."""

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from functools import wraps
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from torch import Tensor

RECORDED, CHAIN, SUFFIX, ATTENTION, LOGITS, BACKWARD = (
    "recorded runs",
    "MLP chain",
    "recomputed layers",
    "recomputed attention",
    "logits",
    "backward passes",
)
"""The parts that operations are counted by: runs of whole prompts; the MLPs that held senders pass;
projections and MLPs of recomputed tokens; their attention; the unembedding; gradients."""

Arguments = ParamSpec("Arguments")
Found = TypeVar("Found")


class Alike(NamedTuple):
    """What a call costs.

    Attributes:
        key: calls of one key make the same operations on the same shapes.
        family: calls of one family, if they have one, differ in their size alone.
        size: how much there is to do.
    """

    key: Hashable
    family: Hashable = None
    size: float = 0


class Notebook(Protocol):
    """What takes note of the pieces that are run."""

    def piece(
        self, part: str | None, alike: "Alike | None", work: Callable[..., Found], *given: object
    ) -> Found:
        """`work(*given)`; None is like no other."""
        ...

    def given(self, indices: Tensor) -> Tensor:
        """Tokens, or a mask, in the form that the model takes them in."""
        ...


NOTEBOOK: ContextVar[Notebook | None] = ContextVar("NOTEBOOK", default=None)
"""The notebook of the plan that is being made."""


def given(indices: Tensor) -> Tensor:
    """Tokens, or a mask, for a run of the whole model; in a plan the model takes their shape."""
    notebook = NOTEBOOK.get()
    return indices if notebook is None else notebook.given(indices)


def piece(
    part: str | None = None, *, alike: Callable[Arguments, Alike | Hashable] | None = None
) -> Callable[[Callable[Arguments, Found]], Callable[Arguments, Found]]:
    """Decorator: the function's operations count as this part, or as the part it is called in.

    Args:
        part: one of the names above.
        alike: from the function's arguments to what a call costs, or just to its key. A plan runs
            one call of each key and counts the others like it. None where a call is like no other.
    """

    def decorate(function: Callable[Arguments, Found]) -> Callable[Arguments, Found]:
        @wraps(function)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Found:
            notebook = NOTEBOOK.get()
            if notebook is None:
                return function(*args, **kwargs)
            cost = None if alike is None else alike(*args, **kwargs)
            if cost is not None:
                name, cost = function.__qualname__, cost if isinstance(cost, Alike) else Alike(cost)
                family = None if cost.family is None else (name, cost.family)
                cost = Alike((name, cost.key), family, cost.size)
            return notebook.piece(part, cost, lambda *given: function(*given, **kwargs), *args)

        return run

    return decorate
