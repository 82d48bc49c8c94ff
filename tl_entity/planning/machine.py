"""How fast this machine makes the operations that were counted: a short calibration.

Seconds are of the processor, not of the wall clock: what other processes take of the machine while
it is calibrated is no part of them.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from tl_entity._typing import checked
from tl_entity.planning.operations import Numbers, Operation, Product, Tally

Found = TypeVar("Found")

SHARE_TIMED = 0.98
"""The kinds of operations that make up so much of the work are timed; the rest is taken to be like
the nearest of them."""

LONGEST_PRODUCT = 0.01
"""Seconds that one timed product may take: larger ones are no faster, and are cut down."""

MOST_WEIGHTS = {"cpu": 2**22, "cuda": 2**26}
"""Numbers in a timed product's second matrix, at most, by kind of device."""

FEW_ROWS = 32
"""With fewer rows a product is as slow as its weights come from memory."""

LARGEST = {"cpu": 2**26, "cuda": 2**30}
"""Bytes that a timed operation may touch, by kind of device: larger ones are no faster."""

CALL = 3
"""How much longer a small operation takes in a run than in a loop, with all that the engine does in
Python to get to it: measured on a tiny model, where there is nothing else, as 2 to 4."""

OTHER_MEMORY = 2**24
"""Bytes written between two repetitions of a timed operation: more than a core's cache holds."""

SMALL = 2**13
"""An operation that moves no more bytes costs what its call costs."""


class Shape(NamedTuple):
    """A kind of matrix product: sizes to the nearest power of two, rows to that of four."""

    batch: int
    rows: int
    inner: int
    columns: int

    @classmethod
    def of(cls, product: Product) -> "Shape":
        """The kind that a product belongs to."""
        batch, rows, inner, columns = (math.log2(max(1, size)) for size in product)
        return cls(2 ** round(batch), 4 ** round(rows / 2), 2 ** round(inner), 2 ** round(columns))

    def distance(self, other: "Shape") -> float:
        """How unlike two shapes are: the sum of the ratios of their sizes, in doublings."""
        apart = sum(abs(math.log2(one / two)) for one, two in zip(self, other, strict=True))
        # A batch of small products is another kind of work than one large one.
        return apart + 100 * ((self.batch == 1) != (other.batch == 1))


class Movement(NamedTuple):
    """A kind of operation that is no product: its name, and bytes moved to the nearest power of
    four."""

    name: str
    moved: int

    @classmethod
    def of(cls, operation: Operation) -> "Movement":
        """The kind that an operation belongs to."""
        moved = 4 ** round(math.log2(max(1, operation.moved)) / 2)
        return cls(str(operation.key[0].overloadpacket), moved)

    def distance(self, other: "Movement") -> float:
        """How unlike two kinds are."""
        return abs(math.log2(self.moved / other.moved)) + 100 * (self.name != other.name)


@dataclass(frozen=True)
class Machine:
    """What a calibration found.

    Attributes:
        device: where it ran.
        threads: torch's threads for one operation.
        rates: floating-point operations a second of matrix products, by shape.
        movements: bytes a second of operations that are no product, by kind.
        bytes_per_second: of all of these together, as often as they are made.
        call_seconds: what an operation costs, however small.
    """

    device: str
    threads: int
    rates: Mapping[Shape, float]
    movements: Mapping[Movement, float]
    bytes_per_second: float
    call_seconds: float

    @checked
    def product_seconds(self, tally: Tally) -> float:
        """Seconds for the matrix products alone, at their rates when made by themselves."""
        return sum(
            count * operation.flops / _nearest(self.rates, Shape.of(operation.product))
            for (_, operation), count in tally.counts.items()
            if operation.product is not None and operation.flops
        )

    @checked
    def seconds(self, tally: Tally) -> float:
        """About how long it takes."""
        moved = sum(
            count * operation.moved / _nearest(self.movements, Movement.of(operation))
            for (_, operation), count in tally.counts.items()
            if operation.product is None and operation.moved > SMALL
        )
        return self.product_seconds(tally) + moved + tally.counts.total() * self.call_seconds


@checked
@torch.no_grad()
def calibrate(
    tallies: Sequence[Tally], *, device: str | torch.device | None, dtype: torch.dtype
) -> Machine:
    """Time the operations of these counts, and the cost of a call; about a second.

    Args:
        tallies: what is going to be computed.
        device: where.
        dtype: in what numbers.
    """
    place = torch.device(device or "cpu")
    counts: Counter[Operation] = Counter()
    for tally in tallies:
        for (_, operation), count in tally.counts.items():
            counts[operation] += count
    products = {o: n for o, n in counts.items() if o.product is not None and o.flops}
    others = {o: n for o, n in counts.items() if o.product is None and o.moved > SMALL}
    first = _time_product(Product(1, 512, 512, 512), place, dtype, longest=1)
    # Small products are slower than their operations tell, so they count for more.
    rates = {
        Shape.of(example): _time_product(example, place, dtype, longest=first * LONGEST_PRODUCT)
        for operation in _most(products, lambda o: Shape.of(o.product), lambda o: o.flops + 1e6)
        if (example := operation.product) is not None
    }
    movements: dict[Movement, float] = {}
    least = _typical(_again(Operation(_SMALLEST), place), place)
    for operation in _most(others, Movement.of, lambda o: o.moved):
        if _touched(operation.key[1:]) <= LARGEST.get(place.type, LARGEST["cpu"]):
            seconds = _typical(_again(operation, place), place) - least
            movements[Movement.of(operation)] = operation.moved / max(seconds, 1e-7)
    movements = movements or {Movement("aten.add", SMALL): 1e10}
    rates = rates or {Shape(1, 512, 512, 512): first}
    taken = sum(n * o.moved / _nearest(movements, Movement.of(o)) for o, n in others.items())
    return Machine(
        device=str(place),
        threads=torch.get_num_threads(),
        rates=rates,
        movements=movements,
        bytes_per_second=sum(n * o.moved for o, n in others.items()) / taken if taken else 1e10,
        call_seconds=CALL * _many(_again(Operation(_SMALLEST), place), place),
    )


_SMALLEST = (
    torch.ops.aten.add.Tensor,
    (Numbers(torch.Size([8]), (1,), torch.float32, False),) * 2,
    (),
)


def _most(
    counts: Mapping[Operation, int],
    kind_of: Callable[[Any], Hashable],
    work_of: Callable[[Operation], float],
) -> list[Operation]:
    """An example of each kind, the kinds of most work first, up to the share that is timed."""
    work: Counter[Hashable] = Counter()
    examples: dict[Hashable, Counter[Operation]] = {}
    for operation, count in counts.items():
        kind, each = kind_of(operation), round(count * work_of(operation))
        work[kind] += each
        examples.setdefault(kind, Counter())[operation] += each
    covered, found = 0, []
    for kind, each in work.most_common():
        found.append(examples[kind].most_common(1)[0][0])
        covered += each
        if covered > SHARE_TIMED * work.total():
            break
    return found


Kind = TypeVar("Kind", Shape, Movement)


def _nearest(known: Mapping[Kind, float], kind: Kind) -> float:
    if kind not in known:
        kind = min(known, key=lambda other: kind.distance(other))
    return known[kind]


def _time_product(
    product: Product, device: torch.device, dtype: torch.dtype, *, longest: float
) -> float:
    """Operations a second of a product like this one, of at most about `longest` operations."""
    batch, rows, inner, columns = product
    most = MOST_WEIGHTS.get(device.type, MOST_WEIGHTS["cpu"])
    if rows < FEW_ROWS:
        most *= 8  # what takes long then is to fetch the weights
    if inner * columns > most:
        columns = max(min(columns, 512), most // inner)
    if longest > 1:
        rows = min(rows, max(32, int(longest / (2 * inner * columns * min(batch, 8)))))
        batch = min(batch, max(1, int(longest / (2 * rows * inner * columns))))
    left = torch.ones(batch, rows, inner, device=device, dtype=dtype)
    right = torch.ones(batch, columns, inner, device=device, dtype=dtype).transpose(1, 2)
    multiply = (lambda: torch.mm(left[0], right[0])) if batch == 1 else lambda: left @ right
    return 2 * batch * rows * inner * columns / _typical(multiply, device)


def _again(operation: Operation, device: torch.device) -> Callable[[], object]:
    """The operation, on other numbers."""
    func, args, kwargs = operation.key

    def made(value: Any) -> Any:
        if isinstance(value, Numbers):
            fill = 1 if value.dtype.is_floating_point else 0  # numbers, or an index or a mask
            whole = torch.full((value.span,), fill, dtype=value.dtype, device=device)
            return whole.as_strided(value.shape, value.stride)
        if isinstance(value, torch.device):
            return device
        if isinstance(value, tuple):
            is_plain = len(value) == 2 and isinstance(value[0], type)
            return value[1] if is_plain else [made(part) for part in value]
        return value

    given = [made(value) for value in args]
    named = {name: made(value) for name, value in kwargs}
    return lambda: func(*given, **named)


def _touched(value: Any) -> int:
    """Bytes of memory behind all tensors of an operation."""
    if isinstance(value, Numbers):
        return value.dtype.itemsize * value.span
    return sum(map(_touched, value)) if isinstance(value, tuple) else 0


def _typical(work: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """Seconds of the second quickest of some repetitions, after a first that may set things up: the
    slower ones may have been interrupted.

    Between them other memory is written: a run never makes the same operation twice in a row, and
    finds its numbers where the operations before have left them.
    """
    other = torch.zeros(OTHER_MEMORY // 4, device=device)
    work()
    times = []
    for _ in range(repetitions):
        other.add_(1)
        start = _now(device)
        work()
        times.append(_now(device) - start)
    return max(1e-9, sorted(times)[1])


def _many(work: Callable[[], object], device: torch.device, calls: int = 2000) -> float:
    """Seconds of a call in a loop of many."""
    work()
    start = _now(device)
    for _ in range(calls):
        work()
    return (_now(device) - start) / calls


def _now(device: torch.device) -> float:
    """Seconds that the processor has worked for this process, one thread's share of them; of the
    wall clock where a GPU does the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()
