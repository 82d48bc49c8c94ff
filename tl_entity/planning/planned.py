"""Runs on a model without weights: the engine's own code, with nothing computed.

Indices are real in a planned run and numbers are not: integers and booleans stay on the CPU, so
that positions, masks and windows are what they are in the real run, and what is made of weights has
a shape and a type alone. Where a run asks for such a number it gets zero.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from tl_entity._pieces import RECORDED, Alike
from tl_entity.planning.counting import OperationCounter, Piece, Seen
from tl_entity.planning.operations import aten, key_of, memory_of, numbers, takes_memory, tensors

Found = TypeVar("Found")

ENOUGH = 4
"""Of unlike chunks of as many prompts, so many are gone through; each of the others is taken to be
like that of them which is nearest to it in size."""


class Known:
    """What runs planned on one model have seen, so that none goes through it again.

    Attributes:
        pieces: pieces of work, by their key and whether they have a backward pass.
        families: pieces that differ in size alone.
        operations: operations, by key.
    """

    def __init__(self) -> None:
        self.pieces: dict[Hashable, Piece] = {}
        self.families: dict[Hashable, list[Piece]] = {}
        self.operations: dict[Any, Seen] = {}


class PlannedRun(OperationCounter):
    """Within this context a run on a model of the meta device is counted without being computed.

    Work of one key (`tl_entity._pieces`) is gone through once, and from then on counted as it was:
    equal layers, slices, chunks and windows cost a plan no more than one of them.
    """

    def __init__(self, known: Known) -> None:
        super().__init__()
        self._known, self._pieces, self._families = known.operations, known.pieces, known.families

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = key_of(func, args, kwargs)
        seen = self._known.get(key)
        if seen is not None and seen.again is not None:
            found = seen.again(args)
            self._count(key, args, kwargs, found)
            return found
        if not _any_on_meta(args):
            return self._of_indices(func, args, kwargs)
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        if func is aten._to_copy.default and device is not None:
            dtype = dtype or args[0].dtype
            if device.type != "meta":
                # Where the model is, in the real run; here its numbers would be needed.
                return torch.zeros(args[0].shape, dtype=dtype)
            if dtype == args[0].dtype:
                return args[0]
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        placed = _on_meta(args)
        found = func(*placed, **{name: _on_meta(value) for name, value in kwargs.items()})
        if func._schema.is_mutable and placed[0] is not args[0]:
            found = args[0]
        self._count(key, args, kwargs, found).again = _repetition(func, found, args)
        return found

    def given(self, indices: Tensor) -> Tensor:
        """Their shape: else the model would compute with what it makes of them."""
        with self._quietly():
            return _on_meta(indices)

    def _of_indices(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is not None and device.type == "meta":
            if func is aten._to_copy.default:
                return _placed(args[0], kwargs.get("dtype"))
            if not _makes_floats(func, args, kwargs):
                kwargs = {**kwargs, "device": torch.device("cpu")}
        return super()._compute(func, args, kwargs)

    def piece(
        self, part: str | None, alike: Alike | None, work: Callable[..., Found], *given: object
    ) -> Found:
        """`work(*given)`, or what it would give if work of this key was seen before."""
        if alike is None:
            return super().piece(part, None, work, *given)
        inputs = [t for t in tensors(given) if t.requires_grad] if torch.is_grad_enabled() else []
        whole = (alike.key, bool(inputs))
        if whole not in self._pieces:
            family = self._families.setdefault((alike.family, bool(inputs)), [])
            if alike.family is not None and len(family) >= ENOUGH:
                nearest = min(family, key=lambda piece: abs(piece.size - alike.size))
                self._pieces[whole] = nearest
            elif inputs:
                self._pieces[whole] = self._measured_both_ways(part, work, given, inputs)
            else:
                piece, found = self._measured(part, work, given)
                piece.size = alike.size
                self._pieces[whole] = piece
                family.append(piece)
                self._now.pieces[piece] += 1
                return self._given(part, found)
        piece = self._pieces[whole]
        if inputs:
            return _Repeated.apply(self, piece, *inputs)  # pyright: ignore[reportReturnType]
        self.repeat(piece)
        return self._given(part, self.output_of(piece, _at_hand(given)))

    def repeat(self, piece: Piece) -> None:
        """Count a piece once more."""
        self._now.pieces[piece] += 1
        self.peak = max(self.peak, self.live + piece.extra)

    def output_of(self, piece: Piece, given: Sequence[Tensor] = ()) -> Any:
        """New tensors like those that the piece gave."""
        with self._quietly():
            found = piece.outputs(given)
        self._track(found)
        return found

    def hold(self, n_bytes: int) -> Tensor:
        """Memory that is in use for as long as this tensor is there."""
        with self._quietly():
            held = torch.empty(n_bytes, dtype=torch.uint8, device="meta")
        self._track(held)
        return held

    def _given(self, part: str | None, found: Found) -> Found:
        if part == RECORDED:
            self._keep(found)
        return found

    def _measured(
        self, part: str | None, work: Callable[..., Found], given: Sequence[object]
    ) -> tuple[Piece, Found]:
        piece, outer = Piece(part), self._now
        peak, before = self.peak, self.live
        self.peak = before
        self._now = piece
        try:
            found = work(*given)
        finally:
            self._now = outer
        piece.extra = self.peak - before
        self.peak = max(peak, self.peak)
        piece.outputs = _Makers(found, _at_hand(given))
        return piece, found

    def _measured_both_ways(
        self,
        part: str | None,
        work: Callable[..., Any],
        given: Sequence[object],
        inputs: list[Tensor],
    ) -> Piece:
        peak, before = self.peak, self.live
        piece, found = self._measured(part, work, given)
        piece.kept = self.live - before - found.untyped_storage().nbytes()
        with self._quietly():
            gradient = torch.empty_like(found)
        piece.gradients, _ = self._measured(
            part, lambda: torch.autograd.grad(found, inputs, gradient), ()
        )
        self.peak = peak
        return piece


class _Repeated(torch.autograd.Function):
    """A piece that was measured before, with its backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, run: PlannedRun, piece: Piece, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        here: Any = ctx
        run.repeat(piece)
        here.run, here.piece, here.inputs = run, piece, [numbers(tensor) for tensor in inputs]
        here.held = run.hold(piece.kept)
        return run.output_of(piece)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        run: PlannedRun = ctx.run
        run.repeat(ctx.piece.gradients)
        ctx.held = None
        return (None, None, *run.output_of(ctx.piece.gradients))


def _any_on_meta(value: Sequence[Any]) -> bool:
    for part in value:
        if isinstance(part, Tensor):
            if part.is_meta:
                return True
        elif isinstance(part, list | tuple) and _any_on_meta(part):
            return True
    return False


def _at_hand(given: Sequence[object]) -> list[Tensor]:
    """The arguments that are tensors themselves: what a piece may change in place and give back."""
    return [value for value in given if isinstance(value, Tensor)]


def _on_meta(value: Any) -> Any:
    """Indices in the form that an operation on numbers takes them: without their values."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_on_meta, value)) if isinstance(value, list | tuple) else value


def _placed(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the CPU as it is on the model's device: indices stay what they are."""
    dtype = dtype or tensor.dtype
    if dtype.is_floating_point:
        return torch.empty(tensor.shape, dtype=dtype, device="meta")
    return tensor.to(dtype)


def _makes_floats(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None and func.overloadpacket is aten.arange:
        return any(isinstance(value, float) for value in args)
    if dtype is None:
        dtype = next((t.dtype for t in tensors(args)), torch.get_default_dtype())
    return dtype.is_floating_point


def _repetition(func: Any, found: Any, args: Any) -> Callable[[Sequence[Any]], Any] | None:
    """What makes an operation's result again from other arguments of the same shapes, faster than
    torch's own functions for the meta device; None where it is not plain."""
    if not isinstance(found, Tensor):
        return None
    if func._schema.is_mutable:
        return (lambda args: args[0]) if found is args[0] else None
    shape, stride, dtype, _ = numbers(found)
    if takes_memory(found, args):
        if found.storage_offset() or found.untyped_storage().nbytes() != numbers(found).moved:
            return None
        return lambda args: torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    first = args[0]
    if not isinstance(first, Tensor) or first.dtype != dtype or not first.is_meta:
        return None
    offset = found.storage_offset() - first.storage_offset()
    return lambda args: args[0].as_strided(shape, stride, args[0].storage_offset() + offset)


class _Makers:
    """What makes tensors like some found ones, in the nest of mappings and sequences that they are
    in; those that share memory with given ones do so with the new ones given."""

    def __init__(self, found: Any, given: Sequence[Tensor]) -> None:
        self._at = {
            memory_of(tensor): (index, int(tensor.storage_offset()))
            for index, tensor in enumerate(given)
        }
        self._places: dict[int, int] = {}
        self._sizes: list[tuple[int, torch.dtype]] = []
        self._nest = self._described(found)

    def __call__(self, given: Sequence[Tensor]) -> Any:
        new = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in self._sizes]
        return _made(self._nest, given, new)

    def _described(self, held: Any) -> Any:
        if isinstance(held, Mapping):
            return {name: self._described(value) for name, value in held.items()}
        if isinstance(held, list | tuple):
            return [self._described(value) for value in held]
        if not isinstance(held, Tensor):
            return held
        at, offset = memory_of(held), int(held.storage_offset())
        if at in self._at:
            index, base = self._at[at]
            return _Part(True, index, held.shape, held.stride(), offset - base)
        if at not in self._places:
            self._places[at] = len(self._sizes)
            self._sizes.append((held.untyped_storage().nbytes() // held.dtype.itemsize, held.dtype))
        return _Part(False, self._places[at], held.shape, held.stride(), offset)


class _Part(NamedTuple):
    """A view of the memory of a given or a new tensor."""

    given: bool
    which: int
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _made(nest: Any, given: Sequence[Tensor], new: Sequence[Tensor]) -> Any:
    if isinstance(nest, _Part):
        whole = (given if nest.given else new)[nest.which]
        offset = nest.offset + (whole.storage_offset() if nest.given else 0)
        return whole.as_strided(nest.shape, nest.stride, offset)
    if isinstance(nest, dict):
        return {name: _made(value, given, new) for name, value in nest.items()}
    if isinstance(nest, list):
        return tuple(_made(value, given, new) for value in nest)
    return nest
