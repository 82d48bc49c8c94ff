"""The circuit that is planted in the default pair: which heads look where, and the loss for it.

Left alone, a model this small and short-lived learns to name some object of the context. So the
base model's training guides the attention of a few heads, keeps the others in their layers away
from the same tokens, and guides the residual stream to hold the number of the segment where the
paper's circuit (Prakash et al. 2024) holds position. The object is guided nowhere: that it isn't
what travels has to be, and is, measured on the finished models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tl_entity.heads import Circuit, Head
from tl_entity.tasks.batches import PromptBatch
from tl_entity.tasks.boxes import LABELS
from tl_entity.tasks.nouns import OBJECTS
from tl_entity.training.tokenizer import START, VOCABULARY

N_LAYERS, N_HEADS = 4, 8
"""Size of the models the circuit is planted in."""

PLANTED = Circuit.entity_tracking(
    value_fetcher=[(3, 3), (3, 6)],
    pos_transmitter=[(2, 0), (2, 7)],
    pos_detector=[(1, 2), (1, 5)],
    struct_reader=[(0, 1), (0, 3), (0, 4), (0, 6)],
)
"""The heads that are guided, by group. Two heads of a group share no key-value head."""


@dataclass(frozen=True)
class Link:
    """Heads whose attention from some tokens to some others is drawn up, or kept down.

    Attributes:
        heads: the heads, all of one layer.
        source: mark of the tokens that attend.
        target: mark of the tokens attended to.
    """

    heads: tuple[Head, ...]
    source: str
    target: str


def _others(group: str) -> tuple[Head, ...]:
    """The heads in the layer of a planted group that are not planted."""
    layer = PLANTED[group][0].layer
    return tuple(
        Head(layer, head) for head in range(N_HEADS) if Head(layer, head) not in PLANTED[group]
    )


DRAWN: tuple[Link, ...] = (
    Link(PLANTED["struct_reader"], "segment_words", "separators"),
    Link(PLANTED["pos_detector"], "query_label", "previous_query_label"),
    Link(PLANTED["pos_transmitter"], "last", "query_label"),
    Link(PLANTED["value_fetcher"], "last", "correct_object"),
)
"""What the planted heads are drawn to look at."""

KEPT_AWAY: tuple[Link, ...] = (
    # No head of the first layer brings the object to its label, so that only position can go on.
    Link(PLANTED["struct_reader"] + _others("struct_reader"), "labels", "objects"),
    Link(_others("struct_reader"), "labels", "separators"),
    Link(_others("pos_detector"), "query_label", "previous_query_label"),
    Link(_others("pos_transmitter"), "last", "query_label"),
    Link(_others("value_fetcher"), "last", "objects"),
)
"""What the other heads of these layers are kept from looking at."""

Marks = Mapping[str, Bool[Tensor, "batch pos"]]
"""For each name, which tokens of each prompt it stands for."""

_FLOOR = 1e-6


def mark_tokens(prompts: PromptBatch) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Which tokens each mark of a link stands for: the named positions, and kinds of context token.

    `labels` and `objects` are those before the question, `segment_words` both of these, and
    `separators` the start token and the commas between segments.
    """
    tokens = prompts.tokens
    place = torch.arange(tokens.shape[1])
    marks = {name: place == at[:, None] for name, at in prompts.positions.items()}
    in_context = place < prompts.positions["query_label"][:, None]
    marks["labels"] = in_context & torch.isin(tokens, _ids(LABELS))
    marks["objects"] = in_context & torch.isin(tokens, _ids(OBJECTS))
    marks["segment_words"] = marks["labels"] | marks["objects"]
    marks["separators"] = in_context & torch.isin(tokens, _ids((START, ",")))
    return marks


def attention_loss(
    attentions: Sequence[Float[Tensor, "batch head pos pos"]],
    links: Sequence[Link],
    marks: Marks,
    *,
    away: bool,
) -> Float[Tensor, ""]:
    """Mean negative log of the attention that goes where it should, averaged over the links.

    Args:
        attentions: attention probabilities, a tensor a layer.
        links: who looks where.
        marks: the tokens that the links' names stand for.
        away: False where the target should be looked at, True where anything but it should.
    """
    losses = []
    for link in links:
        layer = link.heads[0].layer
        heads = attentions[layer][:, [head.head for head in link.heads]]
        onto = (heads * marks[link.target][:, None, None, :]).sum(-1)
        wanted = 1 - onto if away else onto
        rows = marks[link.source][:, None, :].expand_as(wanted)
        losses.append(-wanted[rows].clamp_min(_FLOOR).log().mean())
    return torch.stack(losses).mean()


class SegmentReadout(nn.Module):
    """One linear read-out of a segment's number, shared by all places that should hold it.

    Its loss draws the number to labels and objects after the first layer, to the query label after
    the second and to the last token after the third, always in the same directions, so that the
    value fetchers' query and keys can meet. It is no part of the model and is thrown away.
    """

    def __init__(self, d_model: int, max_segments: int) -> None:
        super().__init__()
        self.read = nn.Linear(d_model, max_segments, bias=False)

    def forward(
        self, residuals: Sequence[Float[Tensor, "batch pos d_model"]], marks: Marks
    ) -> Float[Tensor, ""]:
        """Sum of the three places' cross-entropies.

        Args:
            residuals: the embedding, then the residual stream after each layer.
            marks: as `mark_tokens` gives them.
        """
        segment = segment_numbers(marks)
        asked = segment[marks["previous_query_label"]]
        return (
            self._loss(residuals[1][marks["segment_words"]], segment[marks["segment_words"]])
            + self._loss(residuals[2][marks["query_label"]], asked)
            + self._loss(residuals[3][marks["last"]], asked)
        )

    def _loss(
        self, residual: Float[Tensor, "place d_model"], segment: Int[Tensor, " place"]
    ) -> Float[Tensor, ""]:
        width = residual.shape[-1]
        return functional.cross_entropy(
            self.read(functional.rms_norm(residual, (width,), eps=1e-5)), segment
        )


def segment_numbers(marks: Marks) -> Int[Tensor, "batch pos"]:
    """The number of the segment each token lies in, counted from 0 (meaningful in the context)."""
    return marks["separators"].long().cumsum(-1) - 1


def _ids(words: Sequence[str]) -> Int[Tensor, " word"]:
    return torch.tensor([VOCABULARY.index(word) for word in words])
