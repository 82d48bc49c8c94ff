"""Tokens of one role in both prompts of a pair, put side by side."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch


@checked
@dataclass(frozen=True)
class AlignedTokens:
    """Every token that a name stands for, prompt by prompt, and its twin in the corrupt prompt: the
    first token of a role goes with the first, the second with the second.

    Attributes:
        rows: the pair that each token is of.
        clean: the token's index in the clean prompt.
        corrupt: its twin's index in the corrupt prompt.
    """

    rows: Int[Tensor, " token"]
    clean: Int[Tensor, " token"]
    corrupt: Int[Tensor, " token"]

    @classmethod
    def of(cls, pairs: PairBatch, name: str) -> "AlignedTokens":
        """The tokens at a named position or of a role.

        Raises:
            InputError: if either prompt lacks the name, or the prompts of a pair have unequally
                many such tokens.
        """
        clean, corrupt = (batch.where(name).cpu() for batch in (pairs.clean, pairs.corrupt))
        unequal = (clean.sum(1) != corrupt.sum(1)).nonzero()
        if len(unequal):
            row = int(unequal[0])
            raise InputError(
                f"Pair {row} has {int(clean[row].sum())} clean and {int(corrupt[row].sum())} "
                f"corrupt tokens of {name!r}, so they can't be matched one to one; give pairs "
                "with equally many."
            )
        rows, at = clean.nonzero().unbind(1)
        return cls(rows, at, corrupt.nonzero()[:, 1])

    def __len__(self) -> int:
        return len(self.rows)

    def moved_to(
        self, values: Tensor, prompts_shape: tuple[int, int]
    ) -> tuple[Bool[Tensor, "batch pos"], Tensor]:
        """Where the tokens are in the clean prompts, and activations of the corrupt prompts
        [batch pos ...] moved there; zero elsewhere."""
        device = values.device
        where = torch.zeros(prompts_shape, dtype=torch.bool, device=device)
        where[self.rows, self.clean] = True
        moved = values.new_zeros(*prompts_shape, *values.shape[2:])
        moved[self.rows.to(device), self.clean.to(device)] = values[
            self.rows.to(device), self.corrupt.to(device)
        ]
        return where, moved
