"""How fast this machine computes the engine's pieces: a short calibration."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.exact.blocks import add_mlp
from tl_entity.exact.tally import Piece, Product, Tally
from tl_entity.exact.window import Window
from tl_entity.hooks.edits import ReplaceHeads
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch

SHARE_TIMED = 0.97
"""The shapes of so much of the work are timed; the rest is taken to be like the nearest of them."""

LONGEST_PRODUCT = 0.01
"""Seconds that one timed product may take: larger ones are no faster, and are cut down."""

MOST_WEIGHTS = {"cpu": 2**22, "cuda": 2**26}
"""Numbers in a timed product's second matrix, at most, by kind of device."""

MOVED_NUMBERS = 2**20
"""Numbers in each array by which elementwise operations are timed."""


class Shape(NamedTuple):
    """A kind of matrix product: sizes to the nearest power of two, rows to that of four."""

    batch: int
    rows: int
    inner: int
    columns: int

    @classmethod
    def of(cls, product: Product) -> "Shape":
        """The kind that a product belongs to."""
        batch, rows, inner, columns = (math.log2(size) for size in product[1:])
        return cls(2 ** round(batch), 4 ** round(rows / 2), 2 ** round(inner), 2 ** round(columns))

    def distance(self, other: "Shape") -> float:
        """How unlike two shapes are: the sum of the ratios of their sizes, in doublings."""
        apart = sum(abs(math.log2(one / two)) for one, two in zip(self, other, strict=True))
        # A batch of small products is another kind of work than one large one.
        return apart + 100 * ((self.batch == 1) != (other.batch == 1))


@dataclass(frozen=True)
class Machine:
    """What a calibration found.

    Attributes:
        device: where it ran.
        threads: torch's threads for one operation.
        rates: floating-point operations a second of matrix products, by shape.
        bytes_per_second: memory read and written by operations that are no matrix product.
        call_seconds: what a call of each of the engine's pieces costs, however small.
    """

    device: str
    threads: int
    rates: Mapping[Shape, float]
    bytes_per_second: float
    call_seconds: Mapping[Piece, float]

    @checked
    def product_seconds(self, tally: Tally) -> float:
        """Seconds for the matrix products alone, at their rates when made by themselves."""
        return sum(
            count * product.operations / self._rate(Shape.of(product))
            for product, count in tally.products.items()
        )

    @checked
    def seconds(self, tally: Tally, *, bytes_per_number: int) -> float:
        """About how long it takes."""
        moved = tally.moved * bytes_per_number / self.bytes_per_second
        calls = sum(self.call_seconds[piece] * count for piece, count in tally.calls.items())
        return self.product_seconds(tally) + moved + calls

    def _rate(self, shape: Shape) -> float:
        if shape not in self.rates:
            shape = min(self.rates, key=shape.distance)
        return self.rates[shape]


@checked
@torch.no_grad()
def calibrate(
    tallies: Sequence[Tally], *, device: str | torch.device | None, dtype: torch.dtype
) -> Machine:
    """Time the matrix products of these counts, memory, and the cost of a call; about a second.

    Args:
        tallies: what is going to be computed.
        device: where.
        dtype: in what numbers.
    """
    place = torch.device(device or "cpu")
    weights: Counter[Shape] = Counter()
    examples: dict[Shape, Counter[Product]] = {}
    for tally in tallies:
        for product, count in tally.products.items():
            shape = Shape.of(product)
            # Small products are slower than their operations tell, so they count for more.
            work = count * (product.operations + 1e6)
            weights[shape] += round(work)
            examples.setdefault(shape, Counter())[product] += round(work)
    first = _time_product(Product("", 1, 512, 512, 512), place, dtype, longest=1)
    rates: dict[Shape, float] = {}
    covered, total = 0, sum(weights.values())
    for shape, work in weights.most_common():
        example = examples[shape].most_common(1)[0][0]
        rates[shape] = _time_product(example, place, dtype, longest=first * LONGEST_PRODUCT)
        covered += work
        if covered > SHARE_TIMED * total:
            break
    if not rates:
        rates[Shape(1, 512, 512, 512)] = first
    return Machine(
        device=str(place),
        threads=torch.get_num_threads(),
        rates=rates,
        bytes_per_second=_time_memory(place, dtype),
        call_seconds=_time_calls(place, dtype),
    )


def _time_product(
    product: Product, device: torch.device, dtype: torch.dtype, *, longest: float
) -> float:
    """Operations a second of a product like this one, of at most about `longest` operations."""
    _, batch, rows, inner, columns = product
    most = MOST_WEIGHTS.get(device.type, MOST_WEIGHTS["cpu"])
    if inner * columns > most:
        columns = max(min(columns, 512), most // inner)
    if longest > 1:
        rows = min(rows, max(32, int(longest / (2 * inner * columns * min(batch, 8)))))
        batch = min(batch, max(1, int(longest / (2 * rows * inner * columns))))
    if batch == 1:
        left = torch.ones(rows, inner, device=device, dtype=dtype)
        right = torch.ones(columns, inner, device=device, dtype=dtype)
        seconds = _typical(lambda: F.linear(left, right), device)
    else:
        left = torch.ones(batch, rows, inner, device=device, dtype=dtype)
        right = torch.ones(batch, inner, columns, device=device, dtype=dtype)
        seconds = _typical(lambda: torch.bmm(left, right), device)
    return 2 * batch * rows * inner * columns / seconds


def _time_memory(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second of elementwise operations, results in new memory: an activation and a
    product, which an MLP has after its matrix products."""
    left, right = (torch.ones(MOVED_NUMBERS, device=device, dtype=dtype) for _ in range(2))
    seconds = _typical(lambda: F.silu(left) * right, device)
    return 5 * left.numel() * left.element_size() / seconds


def _time_calls(device: torch.device, dtype: torch.dtype) -> dict[Piece, float]:
    """What each piece costs where there is next to nothing to compute: on a tiny model."""
    short, tall = (_tiny_model(layers, device, dtype) for layers in (1, 5))
    index = torch.zeros(1, dtype=torch.long, device=device)
    prompts = PromptBatch(index[:, None].expand(-1, 2), index, {ANSWER_POSITION: index + 1})

    def run(model: Model) -> Callable[[], object]:
        points = {
            hook_point(name, layer): ANSWER_POSITION
            for layer in range(model.cfg.n_layers)
            for name in ("z", "attn_out", "resid_mid")
        }
        return lambda: record(model, prompts, points)

    one, five = _typical(run(short), device), _typical(run(tall), device)
    block = max(0.0, (five - one) / (tall.cfg.n_layers - 1))
    rows = torch.zeros(1, 1, 1, tall.cfg.d_model, device=device, dtype=dtype)
    (window,) = Window.each_length(prompts, index + 1)
    keys = rows.view(1, 1, 1, -1).expand(1, 2, 1, -1)

    def attend() -> Tensor:
        return window.attention_output(tall, 0, rows, (keys, keys), edits={})

    vectors = rows.view(1, 1, 1, -1)
    edit = ReplaceHeads(index, index, vectors[:, 0])
    point = SimpleNamespace(name=hook_point("z", 0))

    return {
        "edit": _typical(lambda: edit(vectors, point), device),
        "block": block,
        "run": max(0.0, one - block),
        "mlp": _typical(lambda: add_mlp(tall, 0, rows), device),
        "attention": _typical(attend, device),
    }


def _tiny_model(n_layers: int, device: torch.device, dtype: torch.dtype) -> Model:
    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=8,
        n_heads=1,
        d_head=8,
        d_mlp=8,
        d_vocab=8,
        n_ctx=8,
        act_fn="silu",
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=8,
        rotary_adjacent_pairs=False,
        default_prepend_bos=False,
        init_weights=False,
        dtype=dtype,
        device=str(device),
    )
    model = HookedTransformer(cfg)
    for parameter in model.parameters():
        parameter.zero_()
    return model.requires_grad_(False).eval()


def _typical(work: Callable[[], object], device: torch.device, repetitions: int = 5) -> float:
    """Median seconds of some repetitions, after a first that may set things up.

    The median and not the least: a machine that is shared now will be so during the long run.
    """
    return statistics.median(_each_time(work, device, repetitions))


def _each_time(
    work: Callable[[], object], device: torch.device, repetitions: int
) -> Iterator[float]:
    work()
    for _ in range(repetitions):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        yield max(1e-9, time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
