"""What torch is asked to do, without the numbers: operations by their shapes, and sums of them."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
READS_SOME = {aten.index, aten.gather, aten.embedding, aten.index_select}
"""Operations that read as much of their first argument as they give."""
WRITES_SOME = {aten.index_put_, aten.scatter_}
"""Operations that write as much of their first argument as they are given."""


class Numbers(NamedTuple):
    """A tensor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_meta: bool

    @property
    def moved(self) -> int:
        """Bytes of the different numbers that it shows."""
        bytes_ = self.dtype.itemsize
        for size, step in zip(self.shape, self.stride, strict=True):
            bytes_ *= size if step or size == 0 else 1
        return bytes_

    @property
    def span(self) -> int:
        """Numbers of memory from its first to its last."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


class Product(NamedTuple):
    """A matrix product, or `batch` of them: [rows inner] times [inner columns]."""

    batch: int
    rows: int
    inner: int
    columns: int


@dataclass(frozen=True, eq=False)
class Operation:
    """What torch is asked to do once, on tensors of some shapes; one object for each key.

    Attributes:
        key: function and arguments, tensors as `Numbers`.
        flops: floating-point operations, two for each multiply-add of a matrix product.
        moved: bytes read and written; 0 where no number is touched.
        product: the matrix product that it is, if it is one.
    """

    key: tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]]
    flops: int = 0
    moved: int = 0
    product: Product | None = None

    @classmethod
    def of(cls, key: Any, args: Any, kwargs: Any, found: Any, *, is_view: bool) -> "Operation":
        """The one that gave `found`."""
        if is_view:
            return cls(key)
        packet, product, flops = key[0].overloadpacket, None, 0
        if packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=found))
            left, *right = [value for value in args if isinstance(value, Tensor)][-2:]
            if right and left.ndim in (2, 3):
                batch = left.shape[0] if left.ndim == 3 else 1
                product = Product(batch, left.shape[-2], left.shape[-1], right[0].shape[-1])
        read, written = list(tensors(args)), list(tensors(found))
        if packet in READS_SOME:
            read = [*written, *read[1:]]
        elif packet in WRITES_SOME:
            read, written = read[1:], read[-1:]
        return cls(key, flops, sum(numbers(t).moved for t in (*read, *written)), product)


@dataclass
class Tally:
    """How often each operation is made.

    Attributes:
        counts: by part and operation.
    """

    counts: Counter[tuple[str, Operation]] = field(default_factory=Counter)

    def __sub__(self, other: "Tally") -> "Tally":
        """What this one has more than another."""
        return Tally(self.counts - other.counts)

    @property
    def operations(self) -> dict[str, int]:
        """Floating-point operations of matrix products, by part."""
        by_part: Counter[str] = Counter()
        for (part, operation), count in self.counts.items():
            if operation.flops:
                by_part[part] += operation.flops * count
        return dict(by_part)

    @property
    def total_operations(self) -> int:
        """Floating-point operations of all parts."""
        return sum(self.operations.values())

    @property
    def moved(self) -> int:
        """Bytes read and written by everything that is no matrix product."""
        return sum(
            operation.moved * count
            for (_, operation), count in self.counts.items()
            if operation.product is None
        )


def numbers(tensor: Tensor) -> Numbers:
    """A tensor without its numbers."""
    return Numbers(tensor.shape, tensor.stride(), tensor.dtype, tensor.is_meta)


def key_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operation costs depends on no more."""
    named = tuple((name, _hashable(value)) for name, value in kwargs.items()) if kwargs else ()
    return func, tuple(map(_hashable, args)), named


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Numbers(value.shape, value.stride(), value.dtype, value.is_meta)
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    # 1, 1.0 and True are one key, and give tensors of three types.
    return (type(value), value) if isinstance(value, bool | int | float) else value


def tensors(held: Any) -> Iterator[Tensor]:
    """All tensors in a nest of dataclasses, mappings and sequences."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from tensors(value)
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        for part in dataclasses.fields(held):
            yield from tensors(getattr(held, part.name))


def memory_of(tensor: Tensor) -> int:
    """What two tensors have in common exactly if they share memory."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def takes_memory(found: Any, args: Any) -> bool:
    """Whether a result has memory that is not its arguments'."""
    old = {memory_of(tensor) for tensor in tensors(args)}
    return any(memory_of(tensor) not in old for tensor in tensors(found))
