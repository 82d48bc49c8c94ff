"""The tokens that are recomputed, and their attention over those that are not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity.exact.blocks import attend, head_outputs, project, rotate, within_window
from tl_entity.hooks.points import HeadInput, kv_head
from tl_entity.tasks.batches import ANSWER_POSITION, PromptBatch

KeysAndValues = tuple[
    Float[Tensor, "batch pos kv_head d_head"], Float[Tensor, "batch pos kv_head d_head"]
]
"""Keys after the rotary embedding, and values, of whole prompts in a layer."""

QUERY_POINTS = frozenset({"q", "rot_q", "attn_scores", "z"})
"""Where an edit is made token by token of the queries: it needs all the window's, even where only
the last one's output is wanted."""

WindowEdit = Callable[[Tensor], Tensor]
"""Changes [variant member window head d_head] (q, k, v, z), or the attention scores
[member head variant window key], where keys before the window come first."""

EVERY_TOKEN = slice(None)
ANSWER_TOKEN = slice(-1, None)
"""Above the last layer's attention, only the window's final token matters."""


@dataclass(frozen=True)
class Window:
    """The last tokens, equally many, of some prompts: all from an edited token to the answer's.

    Attributes:
        members: the prompts concerned, by index.
        tokens: the window's token indices in each.
        rotary: the same tokens counted without padding.
        before: the clean tokens ahead of the window that it can see.
    """

    members: Int[Tensor, " member"]
    tokens: Int[Tensor, "member window"]
    rotary: Int[Tensor, "member window"]
    before: Bool[Tensor, "member prefix"]

    @classmethod
    def each_length(cls, prompts: PromptBatch, start: Int[Tensor, " batch"]) -> Iterator["Window"]:
        """Windows from `start` to the answer's token: prompts with equally many tokens there are
        recomputed together, so that none is computed in vain. Prompts whose start comes after the
        answer's token are in none."""
        lengths = prompts.position(ANSWER_POSITION) - start + 1
        for length in lengths.unique().tolist():
            if length < 1:
                continue
            members = (lengths == length).nonzero().squeeze(1)
            tokens = start[members, None] + torch.arange(length, device=members.device)
            mask = prompts.mask[members]
            first = tokens[:, :1]
            prefix = torch.arange(int(first.max()), device=members.device)
            yield cls(
                members=members,
                tokens=tokens,
                rotary=(mask.long().cumsum(1) - 1).gather(1, tokens),
                before=mask[:, : len(prefix)] & (prefix < first),
            )

    def __len__(self) -> int:
        """Tokens in the window of each prompt."""
        return self.tokens.shape[1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Prompts, tokens of each, and tokens ahead: what it costs depends on no more."""
        members, length = self.tokens.shape
        return members, length, self.before.shape[1]

    def to(self, device: torch.device) -> "Window":
        """The same window, its indices on a device."""
        if self.tokens.device == device:
            return self
        parts = (self.members, self.tokens, self.rotary, self.before)
        return Window(*(part.to(device) for part in parts))

    def clean(
        self, activation: Float[Tensor, "batch pos *rest"], first_token: int = 0
    ) -> Float[Tensor, "member window *rest"]:
        """What activations are in the window, given those of prompts from `first_token` on."""
        here = self.to(activation.device)
        return activation[here.members[:, None], here.tokens - first_token]

    def bytes_per_variant(self, model: Model) -> int:
        """About how much memory one variant of all members takes while it is recomputed."""
        cfg = model.cfg
        members, length = self.tokens.shape
        floats = 6 * cfg.d_model + cfg.n_heads * (
            6 * cfg.d_head + 3 * (self.before.shape[1] + length)
        )
        return members * length * floats * (torch.finfo(cfg.dtype).bits // 8)

    def attend(
        self,
        model: Model,
        layer: int,
        q: Float[Tensor, "#variant member query head d_head"],
        k: Float[Tensor, "#variant member window kv_head d_head"],
        v: Float[Tensor, "#variant member window kv_head d_head"],
        clean: KeysAndValues,
        *,
        heads: Sequence[int] | None = None,
        queries: slice = EVERY_TOKEN,
        edits: Mapping[str, WindowEdit] | None = None,
    ) -> Float[Tensor, "variant member query head d_head"]:
        """Head outputs of queries in the window, over the clean tokens ahead of it and its own.

        Queries and keys are given before the rotary embedding. With `heads`, all that is given is
        of these query heads alone. Edits at rot_q and attn_scores are made.
        """
        edits = edits or {}
        here = self.to(q.device)
        length = self.before.shape[1]
        ahead = [vectors[here.members, :length] for vectors in clean]
        if heads is not None:
            index = [kv_head(model.cfg, head) for head in heads]
            ahead = [vectors[:, :, index] for vectors in ahead]
        causal = torch.ones(len(self), len(self), dtype=torch.bool, device=q.device).tril()
        asking, prefix = here.tokens[:, queries], torch.arange(length, device=q.device)
        n = max(len(q), len(k), len(v))
        rotated = rotate(model, layer, "q", q, here.rotary[:, queries]).expand(n, -1, -1, -1, -1)
        return attend(
            edits.get("rot_q", _unchanged)(rotated),
            (ahead[0], ahead[1]),
            within_window(model, layer, here.before[:, None], asking, prefix),
            (
                rotate(model, layer, "k", k, here.rotary).expand(n, -1, -1, -1, -1),
                v.expand(n, -1, -1, -1, -1),
            ),
            within_window(model, layer, causal[None, queries], asking, here.tokens),
            model.blocks[layer].attn.attn_scale,
            edits.get("attn_scores", _unchanged),
        )

    def attention_output(
        self,
        model: Model,
        layer: int,
        resid_pre: Float[Tensor, "variant member window d_model"],
        clean: KeysAndValues,
        *,
        edits: Mapping[str, WindowEdit],
        queries: slice = EVERY_TOKEN,
    ) -> Float[Tensor, "variant member query d_model"]:
        """What all heads together write, where the whole window has changed.

        Args:
            model: the model.
            layer: the layer.
            resid_pre: the window's residual stream ahead of it.
            clean: the clean run's keys and values.
            edits: by hook point (q, k, v, rot_q, attn_scores, z). Edited keys and values have one
                entry for each query head, so that siblings that share one keep theirs.
            queries: the tokens of the window whose output is wanted.
        """
        cfg = model.cfg
        block = model.blocks[layer]
        normalized = block.ln1(resid_pre.flatten(1, 2)).view(resid_pre.shape)

        apart = "k" in edits or "v" in edits

        def projected(which: HeadInput, rows: Tensor) -> Tensor:
            vectors = project(model, layer, which, rows)
            if apart and which != "q":
                vectors = vectors[..., [kv_head(cfg, head) for head in range(cfg.n_heads)], :]
            return edits[which](vectors) if which in edits else vectors

        z = self.attend(
            model,
            layer,
            projected("q", normalized[:, :, queries]),
            projected("k", normalized),
            projected("v", normalized),
            clean,
            queries=queries,
            edits=edits,
        )
        if "z" in edits:
            z = edits["z"](z)
        return head_outputs(model, layer, z, list(range(cfg.n_heads))) + block.attn.b_O


def _unchanged(activation: Tensor) -> Tensor:
    return activation
