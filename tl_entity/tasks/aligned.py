"""Tokens of one role in both prompts of a pair, put side by side."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch, PromptBatch


@checked
@dataclass(frozen=True)
class AlignedTokens:
    """Every token that a name stands for, prompt by prompt, and its twin in the corrupt prompt.

    Attributes:
        rows: the pair that each token is of.
        clean: the token's index in the clean prompt.
        corrupt: its twin's index in the corrupt prompt.
    """

    rows: Int[Tensor, " token"]
    clean: Int[Tensor, " token"]
    corrupt: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.rows)


@checked
@dataclass(frozen=True)
class AlignedPairs:
    """Pairs, and which corrupt token each clean token takes its values from.

    Attributes:
        pairs: the pairs.
        shifts: a number for each pair, by which tokens that share a role are moved on in the
            corrupt prompt; None to put the first beside the first, the second beside the second.
    """

    pairs: PairBatch
    shifts: Int[Tensor, " batch"] | None = None

    @classmethod
    def draw(cls, pairs: PairBatch, *, seed: int | None) -> "AlignedPairs":
        """Twins drawn at random; with None, the first token of a role goes with the first.

        A role that a prompt has several times, such as the label of a segment, tells them apart by
        their place, and the place is the same in the corrupt prompt. So each pair draws a shift,
        never zero, the same for all roles that the prompt has equally often.
        """
        if seed is None:
            return cls(pairs)
        generator = torch.Generator().manual_seed(seed)
        return cls(pairs, torch.randint(2**31, (len(pairs),), generator=generator))

    @property
    def clean(self) -> PromptBatch:
        """The prompts that are run and edited."""
        return self.pairs.clean

    @property
    def corrupt(self) -> PromptBatch:
        """The prompts that values come from."""
        return self.pairs.corrupt

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice) -> "AlignedPairs":
        """Some of the pairs."""
        return AlignedPairs(self.pairs[rows], None if self.shifts is None else self.shifts[rows])

    def to(self, device: str | torch.device) -> "AlignedPairs":
        """The same pairs on another device."""
        return replace(self, pairs=self.pairs.to(device))

    def tokens(self, name: str) -> AlignedTokens:
        """The tokens at a named position or of a role.

        Raises:
            InputError: if either prompt lacks the name, or the prompts of a pair have unequally
                many such tokens.
        """
        clean, corrupt = (batch.where(name).cpu() for batch in (self.clean, self.corrupt))
        counts = clean.sum(1)
        unequal = (counts != corrupt.sum(1)).nonzero()
        if len(unequal):
            row = int(unequal[0])
            raise InputError(
                f"Pair {row} has {int(counts[row])} clean and {int(corrupt[row].sum())} "
                f"corrupt tokens of {name!r}, so they can't be matched one to one; give pairs "
                "with equally many."
            )
        rows, at = clean.nonzero().unbind(1)
        twins = corrupt.nonzero()[:, 1]
        if self.shifts is not None:
            n = counts[rows]
            begins = (counts.cumsum(0) - counts)[rows]
            shift = 1 + self.shifts.cpu()[rows] % (n - 1).clamp(min=1)
            twins = twins[begins + (torch.arange(len(rows)) - begins + shift) % n]
        return AlignedTokens(rows, at, twins)
