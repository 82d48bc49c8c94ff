"""Operations, bytes and calls of the exact engine's pieces, counted from shapes and summed."""

import math
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from transformer_lens import HookedTransformerConfig

from tl_entity.errors import InputError
from tl_entity.exact.blocks import mlp_rows_together
from tl_entity.exact.memory import block_bytes
from tl_entity.exact.path_patching import LOGITS_CHUNK_BYTES
from tl_entity.exact.window import Window
from tl_entity.hooks.points import HeadInput, n_kv_heads
from tl_entity.metrics import Metric
from tl_entity.tasks.batches import PairBatch, PromptBatch

RECORDED, CHAIN, SUFFIX, ATTENTION, LOGITS = (
    "recorded runs",
    "MLP chain",
    "recomputed layers",
    "recomputed attention",
    "logits",
)
"""The parts that operations are counted by: runs of whole prompts; the MLPs that held senders pass;
projections and MLPs of recomputed tokens; their attention; the unembedding."""

Piece = Literal["block", "mlp", "attention", "edit", "run"]
"""What has a cost for each call, however small: a layer of a recorded run, an MLP, an attention
over a window, an edit at a hook point, a whole recorded run."""


class Product(NamedTuple):
    """A matrix product, or `batch` of them: [rows inner] times [inner columns]."""

    part: str
    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        """Floating-point operations: two for each multiply-add."""
        return 2 * self.batch * self.rows * self.inner * self.columns


@dataclass
class Tally:
    """What a job computes, in all.

    Attributes:
        products: how often each matrix product is made.
        moved: numbers read and written by everything that is no matrix product.
        calls: how often each piece of the engine is called.
    """

    products: Counter[Product] = field(default_factory=Counter)
    moved: int = 0
    calls: Counter[Piece] = field(default_factory=Counter)

    def add(self, other: "Tally", times: int = 1) -> None:
        """Count all of another tally so many times."""
        for product, count in other.products.items():
            self.products[product] += count * times
        for piece, count in other.calls.items():
            self.calls[piece] += count * times
        self.moved += other.moved * times

    @property
    def operations(self) -> dict[str, int]:
        """Floating-point operations of matrix products, by part."""
        by_part: Counter[str] = Counter()
        for product, count in self.products.items():
            by_part[product.part] += product.operations * count
        return dict(by_part)


class ShapeCounter:
    """Counts the engine's pieces for a model of some sizes; `tally` holds the sum."""

    def __init__(self, cfg: HookedTransformerConfig, *, trained: bool = False) -> None:
        if cfg.num_experts is not None:
            raise InputError(
                "What a mixture of experts will take can't be counted: which experts a token "
                "goes through depends on the prompts."
            )
        self.cfg = cfg
        self.tally = Tally()
        self.part = RECORDED
        # Backward, weights are frozen: a projection's gradient costs one more product like it.
        self.passes = 2 if trained else 1
        self.d_mlp = cfg.d_mlp or 4 * cfg.d_model
        self.width = cfg.n_heads * cfg.d_head
        self.kv_width = n_kv_heads(cfg) * cfg.d_head
        self.itemsize = torch.finfo(cfg.dtype).bits // 8

    @property
    def model(self) -> Any:
        """Stands in where an engine function reads nothing of a model but its configuration."""
        return SimpleNamespace(cfg=self.cfg)

    def product(
        self,
        rows: int,
        inner: int,
        columns: int,
        *,
        batch: int = 1,
        part: str | None = None,
        times: int | None = None,
    ) -> None:
        if batch * rows * inner * columns:
            product = Product(part or self.part, batch, rows, inner, columns)
            self.tally.products[product] += self.passes if times is None else times

    def move(self, numbers: int) -> None:
        self.tally.moved += numbers * self.passes

    def call(self, piece: Piece, times: int = 1) -> None:
        # A backward pass has about twice the calls of its forward pass.
        self.tally.calls[piece] += times * (3 if self.passes == 2 else 1)

    def whole_run(self, prompts: PromptBatch, layers: int | None = None) -> None:
        """A plain run of whole prompts up to a layer, without logits."""
        cfg = self.cfg
        batch, pos = prompts.tokens.shape
        layers = cfg.n_layers if layers is None else layers
        rows = batch * pos * layers
        for inner, columns, times in (
            (cfg.d_model, self.width, 1),
            (cfg.d_model, self.kv_width, 2),
            (self.width, cfg.d_model, 1),
            (cfg.d_model, self.d_mlp, 2 if cfg.gated_mlp else 1),
            (self.d_mlp, cfg.d_model, 1),
        ):
            self.product(batch * pos, inner, columns, times=times * layers * self.passes)
        each = 2 * layers * (3 if self.passes == 2 else 1) // 2
        self.product(pos, cfg.d_head, pos, batch=batch * cfg.n_heads, times=each)
        self.product(pos, pos, cfg.d_head, batch=batch * cfg.n_heads, times=each)
        self.move(rows * (24 * cfg.d_model + 16 * self.width + 7 * self.d_mlp))
        self.move(layers * batch * cfg.n_heads * pos * pos * 14)
        self.call("block", layers)
        self.call("run")

    def mlp(self, rows: int) -> None:
        cfg = self.cfg
        if not rows:
            return
        for _ in range(2 if cfg.gated_mlp else 1):
            self.product(rows, cfg.d_model, self.d_mlp)
        self.product(rows, self.d_mlp, cfg.d_model)
        self.move(rows * (11 * cfg.d_model + 9 * self.d_mlp))
        slices = math.ceil(rows / mlp_rows_together(cfg))
        self.call("mlp", 1 if self.passes == 2 else slices)

    def project(self, which: HeadInput, rows: int, heads: int) -> None:
        self.product(rows, self.cfg.d_model, heads * self.cfg.d_head)
        if which != "v":
            self.move(10 * rows * heads * self.cfg.d_head)

    def head_outputs(self, rows: int, heads: int) -> None:
        self.product(rows, heads * self.cfg.d_head, self.cfg.d_model)
        self.move(rows * (2 * heads * self.cfg.d_head + 3 * self.cfg.d_model))

    def attend(
        self, variants: int, batch: int, queries: int, heads: int, shared: int, own: int
    ) -> None:
        """Attention of each variant's queries over the shared keys and its own."""
        size, kv = self.cfg.d_head, max(1, heads * n_kv_heads(self.cfg) // self.cfg.n_heads)
        rows = variants * queries * (heads // kv)
        # The own keys and values have gradients too, those that are shared have none.
        backward = 3 if self.passes == 2 else 1
        self.product(rows, size, shared, batch=batch * kv, part=ATTENTION)
        self.product(rows, shared, size, batch=batch * kv, part=ATTENTION)
        each = (heads // kv) * queries
        some = batch * kv * variants
        self.product(each, size, own, batch=some, part=ATTENTION, times=backward)
        self.product(each, own, size, batch=some, part=ATTENTION, times=backward)
        vectors = variants * batch * queries * heads
        self.move(vectors * (14 * (shared + own) + 16 * size))

    def window_attention(self, window: Window, variants: int, queries: int) -> None:
        """All heads over a window that has changed as a whole."""
        cfg, (members, length) = self.cfg, window.tokens.shape
        kv = n_kv_heads(cfg)
        rows = variants * members
        self.project("q", rows * queries, cfg.n_heads)
        self.project("k", rows * length, kv)
        self.project("v", rows * length, kv)
        self.attend(variants, members, queries, cfg.n_heads, window.before.shape[1], length)
        self.head_outputs(rows * queries, cfg.n_heads)
        self.move(rows * (7 * length + 3 * queries) * cfg.d_model)
        self.call("attention")

    def unembed(self, rows: int, wanted: int | None = None) -> None:
        cfg = self.cfg
        if wanted is None:
            self.product(rows, cfg.d_model, cfg.d_vocab_out, part=LOGITS)
            self.move(rows * 6 * cfg.d_vocab_out)
        else:
            self.product(wanted, cfg.d_model, 1, batch=rows, part=LOGITS)
            self.move(rows * wanted * 2 * cfg.d_model)

    def score(self, rows: int, pairs: PairBatch, metric: Metric) -> None:
        """A metric of so many runs of these pairs."""
        if metric.tokens is None:
            self.unembed(rows)
            return
        self.unembed(rows, metric.tokens(pairs).shape[1])
        if metric.log_probabilities:
            self.product(rows, self.cfg.d_model, self.cfg.d_vocab_out, part=LOGITS)
            # A block's logits are read and written once while the cache holds them.
            self.move(rows * self.cfg.d_vocab_out)

    def run_bytes(self, prompts: PromptBatch) -> int:
        """What a plain run takes at its largest, in a layer."""
        cfg = self.cfg
        batch, pos = prompts.tokens.shape
        mlp = 4 * cfg.d_model + 4 * self.d_mlp
        attention = 3 * cfg.d_model + 4 * self.width + 4 * cfg.n_heads * pos
        return batch * pos * max(mlp, attention) * self.itemsize

    def mlp_bytes(self, rows: int) -> int:
        """What the hidden activations of a slice of rows take."""
        each = (4 * self.d_mlp + 3 * self.cfg.d_model) * self.itemsize
        return min(rows, mlp_rows_together(self.cfg)) * each

    def logits_bytes(self, rows: int, metric: Metric) -> int:
        """What the logits of a slice of rows take."""
        if metric.tokens is not None:
            return block_bytes(self.cfg.device) if metric.log_probabilities else 0
        return min(rows * 3 * self.cfg.d_vocab_out * self.itemsize, LOGITS_CHUNK_BYTES)
