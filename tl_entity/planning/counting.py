"""A run's operations and memory, seen by torch's dispatcher as it computes."""

import weakref
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tl_entity._pieces import BACKWARD, CHAIN, NOTEBOOK, RECORDED, Alike
from tl_entity.planning.operations import Operation, Tally, key_of, memory_of, takes_memory, tensors

Found = TypeVar("Found")


class Seen:
    """An operation that came before.

    Attributes:
        operation: it.
        new: whether its result takes new memory.
        again: makes a result like its own from other arguments of the same shapes, in a plan.
    """

    __slots__ = ("again", "new", "operation")

    def __init__(self, operation: Operation, new: bool) -> None:
        self.operation, self.new = operation, new
        self.again: Callable[[Sequence[Any]], Any] | None = None


class Piece:
    """The operations of a piece of work, those of the pieces within it apart.

    Attributes:
        part: what they count as; None for the part in which the piece comes.
        own: how often each is made.
        backward: how often each is made in a backward pass.
        pieces: how often each piece within it comes.
        extra: the most memory it takes beyond what was there before.
        kept: what it holds until its backward pass.
        outputs: what it gives, to be made again.
        gradients: its backward pass.
        size: what unlike ones are compared by.
    """

    def __init__(self, part: str | None = None) -> None:
        self.part = part
        self.own: Counter[Operation] = Counter()
        self.backward: Counter[Operation] = Counter()
        self.pieces: Counter[Piece] = Counter()
        self.extra = self.kept = 0
        self.outputs: Callable[[Sequence[Tensor]], Any] = lambda given: None
        self.gradients: Piece | None = None
        self.size = 0.0

    def expand(self, into: Counter[tuple[str, Operation]], part: str, times: int = 1) -> None:
        """Add all its operations, and those of the pieces within it, so many times."""
        part = self.part or part
        for where, counts in ((part, self.own), (BACKWARD, self.backward)):
            for operation, count in counts.items():
                into[where, operation] += count * times
        for piece, count in self.pieces.items():
            piece.expand(into, part, count * times)


class OperationCounter(TorchDispatchMode):
    """Within this context every operation of a run is counted, and its memory followed.

    Attributes:
        live: bytes of the tensors made in the run that are there now.
        peak: the most that were there at a time.
        cache_peak: the most that recorded runs gave and was there at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.cache_peak = 0
        self._cached = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._kept: set[int] = set()
        self._quiet = False
        self._top = self._now = Piece(CHAIN)
        self._known: dict[Any, Seen] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the guard around each operation takes long

    def __enter__(self) -> "OperationCounter":
        self._token = NOTEBOOK.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        NOTEBOOK.reset(self._token)
        super().__exit__(*error)

    @property
    def tally(self) -> Tally:
        """What was counted."""
        counts: Counter[tuple[str, Operation]] = Counter()
        self._top.expand(counts, CHAIN)
        return Tally(counts)

    def piece(
        self, part: str | None, alike: Alike | None, work: Callable[..., Found], *given: object
    ) -> Found:
        """`work(*given)`, its operations counted as this part."""
        with self._within(Piece(part)):
            found = work(*given)
        if part == RECORDED:
            self._keep(found)
        return found

    def given(self, indices: Tensor) -> Tensor:
        """Tokens, or a mask, as the model takes them."""
        return indices

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        return self._compute(func, args, kwargs)

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = func(*args, **kwargs)
        self._count(key_of(func, args, kwargs), args, kwargs, found)
        return found

    def _count(self, key: Any, args: Any, kwargs: Any, found: Any) -> Seen:
        """Take note of an operation, and of the memory of what it gives."""
        seen = self._known.get(key)
        if seen is None:
            new = takes_memory(found, args)
            is_view = not new and not key[0]._schema.is_mutable
            operation = Operation.of(key, args, kwargs, found, is_view=is_view)
            seen = self._known[key] = Seen(operation, new)
        counts = self._now.backward if _in_backward_pass() else self._now.own
        counts[seen.operation] += 1
        if seen.new:
            self._track(found)
        return seen

    @contextmanager
    def _within(self, piece: Piece) -> Generator[None, None, None]:
        outer, self._now = self._now, piece
        try:
            yield
        finally:
            self._now = outer
            outer.pieces[piece] += 1

    @contextmanager
    def _quietly(self) -> Generator[None, None, None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _track(self, found: Any) -> None:
        for tensor in (found,) if isinstance(found, Tensor) else tensors(found):
            storage, at = tensor.untyped_storage(), memory_of(tensor)
            size = storage.nbytes()
            if size and at not in self._sizes:
                self._sizes[at] = size
                self.live += size
                self._watched[at] = weakref.ref(storage, lambda gone, at=at: self._free(at))
        self.peak = max(self.peak, self.live)

    def _free(self, at: int) -> None:
        size = self._sizes.pop(at)
        del self._watched[at]
        self.live -= size
        if at in self._kept:
            self._kept.remove(at)
            self._cached -= size

    def _keep(self, found: object) -> None:
        """Take note that these are recorded activations."""
        for tensor in tensors(found):
            at = memory_of(tensor)
            if at in self._sizes and at not in self._kept:
                self._kept.add(at)
                self._cached += self._sizes[at]
        self.cache_peak = max(self.cache_peak, self._cached)


def _in_backward_pass() -> bool:
    node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
    return node is not None
