"""What every method works on: tokens with answers and named positions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.shown import PROMPTS_PRINTED, PROMPTS_SHOWN, ShownPrompts

ANSWER_POSITION = "last"
"""The named position whose logits are scored."""

NO_ROLE = -1
"""The role of padding."""

FIRST, LAST = ".first", ".last"
"""What is put after a name to say the first or the last of its tokens."""


@checked
@dataclass(frozen=True, repr=False)
class PromptBatch:
    """Prompts as tokens, with their answers, named positions and roles.

    A named position is one token of each prompt. A role is what kind of token each one is, such as
    the label of a segment, whichever segment; every token has one. A position or role that depends
    on what is asked, such as the label of the segment asked about, knows the answer: heads kept
    there are told where to look.

    A name may also stand for several tokens, such as those of `very old keys`: they are a role, or,
    where they overlap with roles, a span.

    Attributes:
        tokens: token ids; shorter prompts are padded.
        answers: token id of each prompt's right continuation.
        positions: for each name the token index it has in each prompt. `"last"`, the final prompt
            token, is always there: the answer is read from its logits.
        attention_mask: 1 at prompt tokens and 0 at padding; None when nothing is padded. Padding
            may stand on either side, not inside a prompt.
        roles: index of each token's role in `role_names`, -1 at padding; None if no roles are
            known.
        role_names: names of the roles, the same for all prompts.
        knowing: names of the positions, roles and spans that depend on what is asked.
        spans: for each name its tokens, any number of them in each prompt.
        tokenizer: the one that made the tokens, to show them as text.

    Raises:
        InputError: if `"last"` is missing, a position or span falls outside its prompt, a mask has
            holes, a token follows `"last"`, tokens, answers or positions are no whole numbers, a
            token has no role or padding has one, two roles share a name, or a position, role or
            span of one name are different tokens.
    """

    # Of any type here, and told in a sentence below if it is none of whole numbers.
    tokens: Shaped[Tensor, "batch pos"]
    answers: Shaped[Tensor, " batch"]
    positions: Mapping[str, Shaped[Tensor, " batch"]] = field(default_factory=dict)
    attention_mask: Shaped[Tensor, "batch pos"] | None = None
    roles: Int[Tensor, "batch pos"] | None = None
    role_names: tuple[str, ...] = ()
    knowing: tuple[str, ...] = ()
    spans: Mapping[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _set(self, tokens=_indices("tokens", self.tokens))
        _set(self, answers=_indices("answers", self.answers))
        _set(self, positions={at: _indices(repr(at), i) for at, i in self.positions.items()})
        if self.attention_mask is not None and self.attention_mask.dtype != torch.bool:
            _set(self, attention_mask=_indices("attention_mask", self.attention_mask))
        if ANSWER_POSITION not in self.positions:
            raise InputError(f"The prompts lack the named position {ANSWER_POSITION!r}.")
        mask = self.mask
        for name, indices in self.positions.items():
            if indices.shape != self.answers.shape:
                raise InputError(
                    f"Position {name!r} has shape {tuple(indices.shape)}; "
                    f"one index a prompt is needed ({tuple(self.answers.shape)})."
                )
            inside = (indices >= 0) & (indices < self.tokens.shape[1])
            clamped = indices.clamp(0, self.tokens.shape[1] - 1)
            inside &= mask.gather(1, clamped[:, None]).squeeze(1)
            if not bool(inside.all()):
                row = int((~inside).nonzero()[0])
                raise InputError(
                    f"Position {name!r} of prompt {row} is {int(indices[row])}, "
                    "which is not a token of that prompt."
                )
        steps = mask.int().diff(dim=1)
        if bool(((steps == 1).sum(1) + mask[:, 0] > 1).any()):
            raise InputError("The attention mask of a prompt has holes; pad only at the ends.")
        after_last = (
            torch.arange(self.tokens.shape[1]) > self.positions[ANSWER_POSITION].cpu()[:, None]
        )
        if bool((mask.cpu() & after_last).any()):
            raise InputError(f"A prompt has tokens after its position {ANSWER_POSITION!r}.")
        self._check_roles()
        self._check_spans()

    def _check_roles(self) -> None:
        if self.roles is None:
            if self.role_names:
                raise InputError("The prompts name roles, but say of no token which one it has.")
            return
        if len(set(self.role_names)) < len(self.role_names):
            raise InputError(f"Two roles share a name: {', '.join(self.role_names)}.")
        right = (self.roles >= 0) & (self.roles < len(self.role_names))
        right = torch.where(self.mask, right, self.roles == NO_ROLE)
        if not bool(right.all()):
            row, at = (~right).nonzero()[0].tolist()
            raise InputError(
                f"Token {at} of prompt {row} has role {int(self.roles[row, at])}; tokens have one "
                f"of the {len(self.role_names)} roles named, padding has {NO_ROLE}."
            )
        for name in set(self.role_names) & set(self.positions):
            if not torch.equal(self._at_role(name), self._at_position(name)):
                raise InputError(
                    f"{name!r} names a position and a role, and they are not the same tokens."
                )

    def _check_spans(self) -> None:
        for name, where in self.spans.items():
            if where.shape != self.tokens.shape or bool((where & ~self.mask).any()):
                raise InputError(f"The span {name!r} has tokens that are not of its prompt.")
            others = [self._at_position(name)] if name in self.positions else []
            others += [self._at_role(name)] if name in self.role_names else []
            if not all(torch.equal(where, other) for other in others):
                raise InputError(
                    f"{name!r} names a span and a position or role, and they are not the same "
                    "tokens."
                )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def mask(self) -> Bool[Tensor, "batch pos"]:
        """True at prompt tokens, False at padding."""
        if self.attention_mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.attention_mask.bool()

    @checked
    def position(self, name: str) -> Int[Tensor, " batch"]:
        """The token index that `name` has in each prompt: that of a named position, or of a role or
        span of one token.

        Raises:
            InputError: if the batch has no such name, or it stands for several tokens of a prompt
                or for none.
        """
        if name in self.positions:
            return self.positions[name]
        where = self._named(name)
        if where is None:
            raise InputError(f"The prompts have no position {name!r}; they have {self._there()}.")
        counts = where.sum(1)
        if not bool((counts == 1).all()):
            row = int((counts != 1).nonzero()[0])
            ends = [name + end for end in (FIRST, LAST) if name + end in self.positions]
            take = f"; take {' or '.join(ends)}" if ends else ""
            raise InputError(
                f"{name!r} stands for {int(counts[row])} tokens of prompt {row}, not one, so it is "
                f"no position{take}."
            )
        return where.int().argmax(1)

    @checked
    def where(self, name: str) -> Bool[Tensor, "batch pos"]:
        """The tokens that a name stands for: the one at a named position, or all of a role or span.

        Raises:
            InputError: if the batch has no such name.
        """
        where = self._named(name)
        if where is None:
            roles = f"; its roles are {', '.join(self.role_names)}" if self.role_names else ""
            raise InputError(
                f"The prompts have no position {name!r}; they have {self._there()}{roles}."
            )
        return where

    @checked
    def first_token(self, name: str) -> Int[Tensor, " batch"]:
        """The first token of each prompt that a name stands for; the one after `"last"` where a
        prompt has none.

        Raises:
            InputError: as `where`.
        """
        if name in self.positions:
            return self.positions[name]
        where = self.where(name)
        return torch.where(where.any(1), where.int().argmax(1), self.positions[ANSWER_POSITION] + 1)

    def _named(self, name: str) -> Tensor | None:
        if name in self.positions:
            return self._at_position(name)
        if name in self.spans:
            return self.spans[name]
        if name in self.role_names:
            return self._at_role(name)
        # A mark that is one token in all prompts is its own first and last.
        stem = name.removesuffix(FIRST).removesuffix(LAST)
        return self._at_position(stem) if stem in self.positions else None

    def _there(self) -> str:
        return ", ".join([*self.positions, *self.spans])

    def _at_position(self, name: str) -> Tensor:
        tokens = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return tokens == self.positions[name].to(self.tokens.device)[:, None]

    def _at_role(self, name: str) -> Tensor:
        assert self.roles is not None
        return self.roles == self.role_names.index(name)

    def __getitem__(self, rows: slice | Tensor) -> "PromptBatch":
        """Some of the prompts: a slice, or a tensor of indices or booleans."""
        return replace(
            self,
            tokens=self.tokens[rows],
            answers=self.answers[rows],
            positions={name: indices[rows] for name, indices in self.positions.items()},
            attention_mask=None if self.attention_mask is None else self.attention_mask[rows],
            roles=None if self.roles is None else self.roles[rows],
            spans={name: where[rows] for name, where in self.spans.items()},
        )

    def to(self, device: str | torch.device) -> "PromptBatch":
        """The same prompts on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            answers=self.answers.to(device),
            positions={name: indices.to(device) for name, indices in self.positions.items()},
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device),
            roles=None if self.roles is None else self.roles.to(device),
            spans={name: where.to(device) for name, where in self.spans.items()},
        )

    def chunks(self, size: int) -> Iterator["PromptBatch"]:
        """The prompts in order, at most `size` at a time."""
        for start in _starts(len(self), size):
            yield self[start : start + size]

    @checked
    def show(self, evaluation: Any = None, *, n: int = PROMPTS_SHOWN) -> ShownPrompts:
        """The first `n` prompts as text, with what is named in them and their roles in colour.

        Args:
            evaluation: what `evaluate` says of these prompts, to show probabilities too.
            n: how many prompts.

        Raises:
            InputError: if the evaluation is of more or fewer prompts.
        """
        return ShownPrompts("PromptBatch", {"prompt": self}, _answers(self), evaluation, n)

    def __repr__(self) -> str:
        return repr(self.show(n=PROMPTS_PRINTED))

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()  # pyright: ignore[reportPrivateUsage]


@checked
@dataclass(frozen=True, repr=False)
class PairBatch:
    """Clean and corrupt prompts, pair by pair, and the token scored on the clean run.

    The two prompts of a pair may differ in length: each has its own named positions.

    Attributes:
        clean: the prompts that are run and edited.
        corrupt: the prompts that edits come from.
        targets: the token scored on the clean run.
        foils: the wrong token that a logit difference compares the target with.

    Raises:
        InputError: if the numbers of clean and corrupt prompts, targets or foils differ, or targets
            or foils are no whole numbers.
    """

    clean: PromptBatch
    corrupt: PromptBatch
    targets: Shaped[Tensor, " batch"]
    foils: Shaped[Tensor, " batch"] | None = None

    def __post_init__(self) -> None:
        _set(self, targets=_indices("targets", self.targets))
        if self.foils is not None:
            _set(self, foils=_indices("foils", self.foils))
        if not len(self.clean) == len(self.corrupt) == len(self.targets):
            raise InputError(
                f"{len(self.clean)} clean prompts, {len(self.corrupt)} corrupt prompts and "
                f"{len(self.targets)} targets do not make pairs."
            )
        if self.foils is not None and len(self.foils) != len(self.targets):
            raise InputError(f"{len(self.targets)} pairs can't have {len(self.foils)} foils.")

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: slice | Tensor) -> "PairBatch":
        """Some of the pairs: a slice, or a tensor of indices or booleans."""
        foils = None if self.foils is None else self.foils[rows]
        return PairBatch(self.clean[rows], self.corrupt[rows], self.targets[rows], foils)

    def same_as(self, other: "PairBatch") -> bool:
        """Whether these are the same prompts, in the same pairs and order."""
        return all(
            torch.equal(ours.tokens * ours.mask, theirs.tokens * theirs.mask)
            for ours, theirs in ((self.clean, other.clean), (self.corrupt, other.corrupt))
        )

    def to(self, device: str | torch.device) -> "PairBatch":
        """The same pairs on another device."""
        return PairBatch(
            clean=self.clean.to(device),
            corrupt=self.corrupt.to(device),
            targets=self.targets.to(device),
            foils=None if self.foils is None else self.foils.to(device),
        )

    def chunks(self, size: int) -> Iterator["PairBatch"]:
        """The pairs in order, at most `size` at a time."""
        for start in _starts(len(self), size):
            yield self[start : start + size]

    @checked
    def show(self, evaluation: Any = None, *, n: int = PROMPTS_SHOWN) -> ShownPrompts:
        """The first `n` pairs as text, side by side, with the answer, what is scored and its foil.

        Args:
            evaluation: what `evaluate` says of the clean prompts, to show probabilities too.
            n: how many pairs.

        Raises:
            InputError: if the evaluation is of more or fewer prompts.
        """
        words = _answers(self.clean)
        if not torch.equal(self.targets, self.clean.answers):
            words["target"] = self.targets
        if self.foils is not None:
            words["foil"] = self.foils
        texts = {"clean": self.clean, "corrupt": self.corrupt}
        return ShownPrompts("PairBatch", texts, words, evaluation, n)

    def __repr__(self) -> str:
        return repr(self.show(n=PROMPTS_PRINTED))

    def _repr_html_(self) -> str:
        return self.show()._repr_html_()  # pyright: ignore[reportPrivateUsage]


def _answers(prompts: PromptBatch) -> dict[str, Tensor]:
    return {"answer": prompts.answers} if bool((prompts.answers >= 0).any()) else {}


def _indices(name: str, given: Tensor) -> Tensor:
    """Token ids or indices as torch looks them up: to it narrower integers mean other things."""
    kind = given.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool:
        raise InputError(
            f"The {name} of a batch are {str(kind).removeprefix('torch.')}, and must be whole "
            "numbers, such as torch.long."
        )
    return given.long()


def _set(batch: object, **values: object) -> None:
    """Set attributes of a frozen dataclass while it is made."""
    for name, value in values.items():
        object.__setattr__(batch, name, value)


def _starts(length: int, size: int) -> range:
    if size < 1:
        raise InputError(f"The batch size must be at least 1, not {size}.")
    return range(0, length, size)
