"""Some heads of a layer as functions of their own queries, keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity.exact.blocks import rotate, within_window
from tl_entity.heads import Node
from tl_entity.hooks.points import HeadInput, hook_point, kv_head
from tl_entity.tasks.batches import PromptBatch

HEAD_INPUTS: tuple[HeadInput, ...] = ("q", "k", "v")
"""What a head reads."""


@dataclass(frozen=True)
class Receivers:
    """The inputs of some heads in a layer in the clean run, an entry a receiver node.

    Attributes:
        model: the model.
        prompts: the prompts.
        nodes: the receivers.
        inputs: q, k and v before the rotary embedding; one head's own for each receiver.
    """

    model: Model
    prompts: PromptBatch
    nodes: tuple[Node, ...]
    inputs: Mapping[HeadInput, Float[Tensor, "batch pos receiver d_head"]]

    @classmethod
    def of(
        cls, model: Model, prompts: PromptBatch, nodes: Sequence[Node], points: Mapping[str, Tensor]
    ) -> "Receivers":
        """The receivers, all heads of one layer, with inputs from recorded q, k and v."""
        layer = nodes[0].layer
        inputs: dict[HeadInput, Tensor] = {}
        for which in HEAD_INPUTS:
            index = [_input_head(model, which, node) for node in nodes]
            inputs[which] = points[hook_point(which, layer)][:, :, index]
        return cls(model, prompts, tuple(nodes), inputs)

    def z(
        self, inputs: Mapping[HeadInput, Float[Tensor, "batch pos receiver d_head"]]
    ) -> Float[Tensor, "batch pos receiver d_head"]:
        """The receivers' outputs with these inputs, of whole prompts."""
        q, k = self.rotated("q", inputs["q"]), self.rotated("k", inputs["k"])
        q, k, v = (vectors.transpose(1, 2) for vectors in (q, k, inputs["v"]))
        scores = (q / self.scale) @ k.transpose(-1, -2)
        pattern = scores.masked_fill(~self.sees[:, None], float("-inf")).softmax(-1)
        return (pattern @ v).transpose(1, 2)

    def rotated(
        self, which: HeadInput, vectors: Float[Tensor, "batch pos receiver d_head"]
    ) -> Float[Tensor, "batch pos receiver d_head"]:
        """Queries or keys after the rotary embedding."""
        return rotate(self.model, self.nodes[0].layer, which, vectors, self.places)

    @property
    def scale(self) -> float:
        """What attention scores are divided by."""
        return self.model.blocks[self.nodes[0].layer].attn.attn_scale

    @property
    def places(self) -> Int[Tensor, "batch pos"]:
        """Token indices counted without padding."""
        places = (self.prompts.mask.long().cumsum(1) - 1).clamp(min=0)
        return places.to(self.inputs["q"].device)

    @property
    def sees(self) -> Bool[Tensor, "batch pos pos"]:
        """Which tokens each token sees. Padding sees itself, so that its softmax is of
        something."""
        mask = self.prompts.mask.to(self.inputs["q"].device)
        n = mask.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
        sees = (causal & mask[:, None]) | torch.eye(n, dtype=torch.bool, device=mask.device)
        every = torch.arange(n, device=mask.device)
        return within_window(self.model, self.nodes[0].layer, sees, every, every)


def _input_head(model: Model, which: HeadInput, node: Node) -> int:
    assert node.head is not None
    return node.head if which == "q" else kv_head(model.cfg, node.head)
