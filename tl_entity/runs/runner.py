"""How runs are made: the one object that every method hands its runs to.

A method says what is edited and where, as lists of hooks for some prompts, and what is read off the
logits. The runner does the rest: it shares the prompts out over processes, takes as many at a time
as memory allows, runs them with plain hooks or recomputes only what the edits can change, and puts
together what was read.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._pieces import Alike, piece
from tl_entity._typing import checked
from tl_entity.exact.blocks import unembed
from tl_entity.exact.memory import halving, memory_budget, prompts_within
from tl_entity.exact.suffix import edited_resid_each
from tl_entity.finite import finite_logits
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.run import answer_logits
from tl_entity.ranks import SomeRows, shared_out
from tl_entity.runs.variants import Edits, KeptHeads
from tl_entity.tasks.batches import PairBatch, PromptBatch

Engine = Literal["exact", "hooks"]
"""`"exact"` recomputes only what can change; `"hooks"` runs the whole model for every edit."""

BATCH_SIZE = 32
"""Prompts run together where nothing else is said."""

PromptRows = TypeVar("PromptRows", bound=PromptBatch | PairBatch)
"""Prompts, or pairs, whose clean prompts are run."""

Choice = TypeVar("Choice")


class RunSettings(TypedDict, total=False):
    """The keywords by which public functions take a runner, or parts of one; see `Runner`."""

    engine: Engine
    batch_size: int | None
    memory: int | None
    progress: Callable[[int], object]
    ranks: bool
    runner: "Runner"


def no_progress(runs: int) -> None:
    """Tells nobody."""


@checked
@dataclass(frozen=True)
class Runner:
    """How runs are made. Results do not depend on it beyond rounding.

    Attributes:
        engine: "exact" recomputes only what the edits can change; "hooks" runs the whole model.
        batch_size: prompts run together, at most; the method's own choice if left out.
        memory: bytes that intermediate results may take; found from the device if left out.
        progress: called with the number of runs done since the last call, where one edit on one
            prompt is a run; with a negative number for runs that must be done once more.
        ranks: whether the processes that `torchrun` started share the prompts out; otherwise each
            runs all of them.
    """

    engine: Engine = "exact"
    batch_size: int | None = None
    memory: int | None = None
    progress: Callable[[int], object] = no_progress
    ranks: bool = True

    @classmethod
    def of(cls, **how: Unpack[RunSettings]) -> "Runner":
        """A runner from the keywords of a public function: `runner`, or the usual one, changed in
        whatever else is given.

        Raises:
            TypeError: if a keyword is none of these.
        """
        settings = cast("dict[str, Any]", dict(how))
        return replace(settings.pop("runner", cls()), **settings)

    def choose(self, *, exact: Choice, hooks: Choice) -> Choice:
        """That one of two ways to compute the same numbers which is this runner's engine."""
        return exact if self.engine == "exact" else hooks

    def budget(self, model: Model) -> int:
        """Bytes that intermediate results may take on the model's device."""
        return memory_budget(model.cfg.device) if self.memory is None else self.memory

    def over(
        self,
        rows: SomeRows,
        size: int,
        compute: Callable[[SomeRows], tuple[Tensor, ...]],
        *models: Model,
    ) -> tuple[Tensor, ...]:
        """`compute` on all rows, at most `size` at a time, each process taking a share.

        Args:
            rows: prompts, pairs, or anything with a length that can be sliced, such as
                `tl_entity.ranks.Together`.
            size: rows taken at a time; fewer from where memory runs out.
            compute: gives tensors whose last axis is that of the rows.
            models: worked on by nobody else meanwhile.

        Raises:
            InputError: if hooks are attached to a model.
            NotFiniteError: if a weight is not finite.
        """

        def compute_mine(mine: SomeRows) -> tuple[Tensor, ...]:
            parts = [found for _, found in halving(mine, size, compute)]
            return tuple(torch.cat(some, -1) for some in zip(*parts, strict=True))

        with guarded(*models):
            return shared_out(rows, compute_mine) if self.ranks else compute_mine(rows)

    def each(
        self,
        model: Model,
        rows: PromptRows,
        variants_of: Callable[[PromptRows], Sequence[Edits] | KeptHeads],
        read: Callable[[Tensor, PromptRows], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """What is read off the answers to prompts under each of several lists of edits.

        Args:
            model: the model.
            rows: the prompts; of pairs, the clean prompts are run.
            variants_of: gives, for some of the rows on the model's device, the lists of edits, an
                empty one for the model as it is; equally many for all rows.
            read: from the logits at `"last"` under one list of edits, `[batch d_vocab]`, and the
                rows to tensors `[batch]`.

        Returns:
            For each of these tensors `[variant batch]`; nothing if there are no lists.

        Raises:
            InputError: if a hook point does not exist, a hook does not fire, hooks are attached to
                the model, or the exact engine does not fit the model or knows no such edit.
            NotFiniteError: if weights, activations or logits are NaN or infinite, naming where.
        """
        memory = self.budget(model)
        n_pos = prompts_of(rows).tokens.shape[1]
        size = min(self.batch_size or BATCH_SIZE, prompts_within(model.cfg, n_pos, memory))

        this = object()

        @piece(alike=lambda chunk: _alike(this, chunk))
        def compute(chunk: PromptRows) -> tuple[Tensor, ...]:
            found: list[tuple[Tensor, ...]] = []
            try:
                for logits in self._logits(model, prompts_of(chunk), variants_of(chunk), memory):
                    found.append(read(finite_logits(logits), chunk))
                    self.progress(len(chunk))
            except BaseException:
                self.progress(-len(chunk) * len(found))
                raise
            return tuple(torch.stack(some) for some in zip(*found, strict=True))

        there = cast(PromptRows, rows.to(model.cfg.device or "cpu"))
        return self.over(there, size, compute, model)

    def _logits(
        self,
        model: Model,
        prompts: PromptBatch,
        variants: Sequence[Edits] | KeptHeads,
        memory: int,
    ) -> Iterable[Tensor]:
        """Logits at `"last"` under each list of edits in turn."""
        kept = isinstance(variants, KeptHeads)
        if self.engine == "exact" and (variants.by_position(prompts) if kept else any(variants)):
            if kept:
                resid = variants.resid_each(model, prompts, memory)
            else:
                resid = edited_resid_each(model, prompts, variants, memory=memory)
            return (unembed(model, final) for final in resid)
        edits_each = variants.edits(prompts) if kept else variants
        return (answer_logits(model, prompts, edits) for edits in edits_each)


def prompts_of(rows: PromptBatch | PairBatch) -> PromptBatch:
    """The prompts that are run; of pairs, the clean ones."""
    return rows if isinstance(rows, PromptBatch) else rows.clean


def _alike(run: object, chunk: PromptBatch | PairBatch) -> Alike:
    both = [chunk] if isinstance(chunk, PromptBatch) else [chunk.clean, chunk.corrupt]
    family = run, *((some.tokens.shape, some.attention_mask is None) for some in both)
    columns = [index.tolist() for some in both for index in some.positions.values()]
    places = sorted(zip(*columns, strict=True))
    # The earlier an edit is, the more tokens come after it.
    return Alike((family, tuple(places)), family, -sum(map(sum, places)))
