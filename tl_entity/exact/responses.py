"""What a head's output gains in some direction when one of its inputs changes, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity.exact.blocks import rotate
from tl_entity.exact.held import Rows
from tl_entity.exact.receivers import Receivers
from tl_entity.hooks.points import HeadInput


@dataclass(frozen=True)
class Response:
    """A receiver in the clean run, and directions in which its output is looked at.

    Attributes:
        receivers: this receiver alone.
        q: its queries after the rotary embedding, divided by the scale.
        k: its keys after the rotary embedding.
        v: its values.
        scores: its attention scores; minus infinity where a token is not seen.
        directions: gradients at its output, zero at tokens that don't count for keys and values.
        own: the tokens of its role.
        along: what each value would put out along the directions at each query.
    """

    receivers: Receivers
    q: Float[Tensor, "batch pos d_head"]
    k: Float[Tensor, "batch pos d_head"]
    v: Float[Tensor, "batch pos d_head"]
    scores: Float[Tensor, "batch pos pos"]
    directions: Float[Tensor, "direction batch pos d_head"]
    own: Bool[Tensor, "batch pos"]
    along: Float[Tensor, "direction batch pos pos"]

    @classmethod
    def of(
        cls,
        receivers: Receivers,
        directions: Float[Tensor, "direction batch pos d_head"],
        reads: Bool[Tensor, "batch pos"],
    ) -> "Response":
        """From a receiver's clean inputs, and the tokens that read its keys and values."""
        inputs = receivers.inputs
        q = receivers.rotated("q", inputs["q"])[:, :, 0] / receivers.scale
        k, v = receivers.rotated("k", inputs["k"])[:, :, 0], inputs["v"][:, :, 0]
        own = receivers.prompts.where(receivers.nodes[0].role).to(q.device)
        directions = directions * (reads.to(q.device) | own)[..., None].to(directions)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~receivers.sees, float("-inf"))
        along = directions @ v.transpose(-1, -2)
        return cls(receivers, q, k, v, scores, directions, own, along)

    def gain(
        self, which: HeadInput, new: Float[Tensor, "sender row d_head"], rows: Rows
    ) -> Float[Tensor, "direction sender batch"]:
        """Change of the output along each direction, summed over tokens, when the input at some
        tokens becomes another one.

        Args:
            which: the input.
            new: for each sender what it becomes at each of the tokens.
            rows: the tokens.
        """
        if which == "k":
            return self._from_keys(new, rows)
        at = (rows.prompt.to(new.device), rows.token.to(new.device))
        every = (slice(None), *at)
        if which == "v":
            weight = self.scores.softmax(-1).transpose(-1, -2)
            change = new - self.v[at]
            gained = torch.einsum("snd,gnd->gsn", change, (weight @ self.directions)[every])
        else:
            query = self._rotated("q", new, at) / self.receivers.scale
            scores = torch.einsum("snd,nud->snu", query, self.k[at[0]])
            seen = self.scores[at].isfinite()
            pattern = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            before = self.scores[at].softmax(-1)
            gained = torch.einsum("snu,gnu->gsn", pattern - before, self.along[every])
            gained = gained * self.own[at].to(gained)
        total = gained.new_zeros(*gained.shape[:2], len(self.scores))
        return total.index_add_(2, at[0], gained)

    def _from_keys(
        self, new: Float[Tensor, "sender row d_head"], rows: Rows
    ) -> Float[Tensor, "direction sender batch"]:
        """All other keys stay: they enter as one, with their common weight and their mean."""
        at = (rows.prompt.to(new.device), rows.token.to(new.device))
        slots, there = _slots(rows, len(self.scores))
        slots, there = slots.to(new.device), there.to(new.device)
        keys = new.new_zeros(len(new), *slots.shape, new.shape[-1])
        keys[:, there] = self._rotated("k", new, at)
        changed = torch.zeros_like(self.own)
        changed[at] = True
        rest = self.scores.masked_fill(changed[:, None], float("-inf"))
        of_rest = (rest.softmax(-1).nan_to_num() * self.along).sum(-1)
        # [batch pos slot]: which changed keys a query sees, and what their values put out.
        index = slots[:, None].expand(-1, self.scores.shape[1], -1)
        seen = self.scores.gather(2, index).isfinite() & there[:, None]
        of_slots = self.along.gather(3, index.expand(len(self.along), -1, -1, -1))
        scores = torch.einsum("btd,sbkd->sbtk", self.q, keys)
        scores = scores.masked_fill(~seen, float("-inf"))
        others = rest.logsumexp(-1)[..., None].expand(len(new), -1, -1, -1)
        pattern = torch.cat([others, scores], -1).softmax(-1)
        options = torch.cat([of_rest[..., None], of_slots], -1)
        after = torch.einsum("sbtk,gbtk->gsb", pattern, options)
        before = (self.scores.softmax(-1) * self.along).sum((-1, -2))
        return after - before[:, None]

    def _rotated(
        self, which: HeadInput, new: Float[Tensor, "sender row d_head"], at: Sequence[Tensor]
    ) -> Float[Tensor, "sender row d_head"]:
        here = self.receivers
        places = here.places[at[0], at[1]].expand(len(new), -1)
        return rotate(here.model, here.nodes[0].layer, which, new[:, :, None], places)[:, :, 0]


def _slots(
    rows: Rows, n_prompts: int
) -> tuple[Int[Tensor, "batch slot"], Bool[Tensor, "batch slot"]]:
    """The tokens of each prompt side by side, and which of these places are taken; rows are in
    order of prompts."""
    counts = torch.bincount(rows.prompt, minlength=n_prompts)
    ordinal = torch.arange(len(rows.prompt)) - (counts.cumsum(0) - counts)[rows.prompt]
    slots = torch.zeros(n_prompts, int(counts.max()), dtype=torch.long)
    slots[rows.prompt, ordinal] = rows.token
    return slots, torch.arange(slots.shape[1]) < counts[:, None]
