"""Some heads of a layer as functions of their own queries, keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity.exact.blocks import rotate
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
        """The receivers' outputs with these inputs, of whole prompts. Differentiable."""
        model, layer, mask = self.model, self.nodes[0].layer, self.prompts.mask
        device = inputs["q"].device
        places = (mask.long().cumsum(1) - 1).clamp(min=0).to(device)
        q, k = (rotate(model, layer, inputs[which], places) for which in ("q", "k"))
        n = mask.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool, device=device).tril()
        # Padding sees itself, so that its softmax is of something.
        sees = (causal & mask[:, None].to(device)) | torch.eye(n, dtype=torch.bool, device=device)
        q, k, v = (vectors.transpose(1, 2) for vectors in (q, k, inputs["v"]))
        scores = (q / model.blocks[layer].attn.attn_scale) @ k.transpose(-1, -2)
        pattern = scores.masked_fill(~sees[:, None], float("-inf")).softmax(-1)
        return (pattern @ v).transpose(1, 2)

    @torch.enable_grad()
    def gradients(
        self, of_z: Float[Tensor, "batch pos receiver d_head"], reads: Bool[Tensor, "batch pos r"]
    ) -> dict[HeadInput, Float[Tensor, "batch pos receiver d_head"]]:
        """The gradient at each receiver's inputs, as its readers read them, given that at its
        output."""
        inputs: dict[HeadInput, Tensor] = {
            which: x.detach().requires_grad_() for which, x in self.inputs.items()
        }
        read = of_z * reads[..., None].to(of_z)
        found = torch.autograd.grad((self.z(inputs) * read).sum(), list(inputs.values()))
        return dict(zip(inputs, found, strict=True))


def _input_head(model: Model, which: HeadInput, node: Node) -> int:
    assert node.head is not None
    return node.head if which == "q" else kv_head(model.cfg, node.head)
