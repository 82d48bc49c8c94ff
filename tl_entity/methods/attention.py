"""What heads attend to: over one prompt, and the mean weight on each named position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import record
from tl_entity.hooks.vocabulary import check_prompts
from tl_entity.results import Label, Result, plain
from tl_entity.tasks.batches import PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FIRST_TOKEN = "first_token"
ELSEWHERE = "elsewhere"


@checked
@dataclass(frozen=True)
class AttentionSummary(Result):
    """Where some heads look from one named position.

    Attributes:
        heads: the heads.
        from_position: the named position that looks.
        names: what is looked at: the named positions, the first token, and all the rest.
        weights: mean attention weight of each head on each of these; a row sums to one.
        common_offset: the distance back to the token looked at most, in the most prompts.
        offset_share: the share of prompts in which it is that distance.
    """

    heads: tuple[Head, ...]
    from_position: str
    names: tuple[str, ...]
    weights: Float[Tensor, "head name"]
    common_offset: Int[Tensor, " head"]
    offset_share: Float[Tensor, " head"]

    def __str__(self) -> str:
        most = [self.names[i] for i in self.weights.argmax(1).tolist()] if self.heads else []
        return f"from {self.from_position}, most attention: " + (
            ", ".join(f"{head} {name}" for head, name in zip(self.heads, most, strict=True))
            or "no heads"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a head: its mean weight on each name, and the distance it most often looks back
        with the share of prompts in which it does."""
        import pandas as pd

        weights = dict(zip(self.names, self.weights.T.tolist(), strict=True))
        return pd.DataFrame(
            {
                "head": [str(head) for head in self.heads],
                **weights,
                "common_offset": self.common_offset.tolist(),
                "offset_share": self.offset_share.tolist(),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """Where each head looks from, and how much at what."""
        return {
            "from": self.from_position,
            "heads": plain(self.heads),
            "to": list(self.names),
            "weights": plain(self.weights),
            "common_offset": plain(self.common_offset),
            "offset_share": plain(self.offset_share),
        }

    def plot(self, *, title: str | None = None, label: Label = str) -> "go.Figure":
        """Heads by names, darker for more weight.

        Args:
            title: above the figure.
            label: what the positions are called in it.
        """
        from tl_entity.plots.heatmaps import attention_heatmap

        if title is None:
            title = f"Mean attention from {label(self.from_position)}"
        return attention_heatmap(
            [str(head) for head in self.heads],
            [label(name) for name in self.names],
            self.weights.double().cpu().numpy(),
            title=title,
        )


@checked
@torch.no_grad()
def summarize_attention(
    model: Model,
    prompts: PromptBatch,
    heads: Sequence[Head],
    *,
    from_position: str,
    batch_size: int = 32,
) -> AttentionSummary:
    """Mean attention weights of some heads, from one named position to the others.

    A named position that comes after `from_position` in every prompt is left out; where two names
    fall on one token of a prompt, its weight counts for the first.

    Raises:
        InputError: if a head or the position does not exist, the model does not know a token or has
            hooks attached to it.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    check_heads(model, heads)
    check_prompts(model, prompts)
    prompts = prompts.to(model.cfg.device or "cpu")
    seer = prompts.position(from_position)
    seen = {name: index for name, index in prompts.positions.items() if bool((index <= seer).any())}
    first = prompts.mask.int().argmax(1)
    seen[FIRST_TOKEN] = first.to(seer)
    layers = sorted({head.layer for head in heads})
    points: dict[str, str | None] = {hook_point("pattern", layer): None for layer in layers}
    rows = []
    for chunk in prompts.chunks(batch_size):
        cache = record(model, chunk, points)
        batch = torch.arange(len(chunk))
        at = chunk.position(from_position)
        rows.append(
            torch.stack(
                [cache[hook_point("pattern", h.layer)][batch, h.head, at].float() for h in heads]
            )
            if heads
            else torch.empty(0, *chunk.tokens.shape)
        )
    pattern = torch.cat(rows, 1)  # head batch key
    left = pattern.clone()
    weights = []
    for index in seen.values():
        where = index[None, :, None].expand(len(heads), -1, 1)
        weights.append(left.gather(2, where).squeeze(2).mean(1))
        left.scatter_(2, where, 0.0)
    weights.append(left.sum(2).mean(1))
    offsets = seer - pattern.argmax(2)
    common = offsets.mode(1)[0] if heads else offsets.new_empty(0)
    return AttentionSummary(
        heads=tuple(heads),
        from_position=from_position,
        names=(*seen, ELSEWHERE),
        weights=torch.stack(weights, 1),
        common_offset=common,
        offset_share=(offsets == common[:, None]).float().mean(1),
    )


@checked
@dataclass(frozen=True)
class AttentionOverPrompt(Result):
    """Where some heads look, from every token of one prompt, in one model or several.

    Attributes:
        models: names of the models.
        heads: the heads.
        tokens: the prompt's tokens as text, without padding.
        positions: index of each named position among these.
        weights: attention weights; each token's sum to one.
    """

    models: tuple[str, ...]
    heads: tuple[Head, ...]
    tokens: tuple[str, ...]
    positions: Mapping[str, int]
    weights: Float[Tensor, "model head query key"]

    def __str__(self) -> str:
        return (
            f"{' '.join(map(str, self.heads)) or 'no heads'} in {', '.join(self.models)} over "
            f"{len(self.tokens)} tokens"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row a model, head and named position: the three tokens it looks at most, with their
        weights."""
        import pandas as pd

        rows = []
        for i, model in enumerate(self.models):
            for j, head in enumerate(self.heads):
                for name, at in self.positions.items():
                    row = {"model": model, "head": str(head), "from": name}
                    most, keys = self.weights[i, j, at].topk(min(3, at + 1))
                    for k, (weight, key) in enumerate(
                        zip(most.tolist(), keys.tolist(), strict=True)
                    ):
                        row |= {f"token_{k + 1}": self.tokens[key], f"weight_{k + 1}": weight}
                    rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """A row of panels a head, a column a model; lines mark the named positions."""
        from tl_entity.plots.patterns import Pattern, attention_patterns

        weights = self.weights.double().cpu().numpy()
        rows = [
            [
                Pattern(f"{head}, {model}" if len(self.models) > 1 else str(head), weights[i, j])
                for i, model in enumerate(self.models)
            ]
            for j, head in enumerate(self.heads)
        ]
        title = "Attention over a prompt" if title is None else title
        return attention_patterns(rows, self.tokens, self.positions, title=title)


@checked
@torch.no_grad()
def attention_over_prompt(
    models: Model | Mapping[str, Model],
    prompts: PromptBatch,
    heads: Sequence[Head],
    *,
    index: int = 0,
) -> AttentionOverPrompt:
    """Where some heads look over one of the prompts.

    Args:
        models: a model, or several by name, such as a base and its fine-tune, that read the same
            tokens.
        prompts: the prompts.
        heads: the heads.
        index: which prompt.

    Raises:
        InputError: if a head does not exist, there is no such prompt, or as `summarize_attention`.
        NotFiniteError: as `summarize_attention`.
    """
    if not 0 <= index < len(prompts):
        raise InputError(f"There is no prompt {index}: there are {len(prompts)}, counted from 0.")
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    one = prompts[index : index + 1]
    layers = sorted({head.layer for head in heads})
    points: dict[str, str | None] = {hook_point("pattern", layer): None for layer in layers}
    kept = one.mask[0].nonzero().squeeze(1)
    found = []
    for model in named.values():
        check_heads(model, heads)
        check_prompts(model, prompts)
        cache = record(model, one.to(model.cfg.device or "cpu"), points) if heads else {}
        patterns = [cache[hook_point("pattern", h.layer)][0, h.head].float().cpu() for h in heads]
        whole = torch.stack(patterns) if patterns else torch.empty(0, *[one.tokens.shape[1]] * 2)
        found.append(whole[:, kept][:, :, kept])
    tokenizer = next((m.tokenizer for m in named.values() if m.tokenizer is not None), None)
    ids = one.tokens[0][kept].tolist()
    start = int(kept[0])
    return AttentionOverPrompt(
        models=tuple(named),
        heads=tuple(heads),
        tokens=tuple(str(i if tokenizer is None else tokenizer.decode([i])) for i in ids),
        positions={name: int(at[0]) - start for name, at in one.positions.items()},
        weights=torch.stack(found),
    )
