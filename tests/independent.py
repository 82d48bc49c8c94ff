"""A Llama forward written from scratch: loops over prompts and heads, no TransformerLens code.

It reads only `state_dict()` and sizes, and knows path patching by its definition alone.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

Z = dict[tuple[int, int], Tensor]
"""Head outputs [pos, d_head] by (layer, head)."""


class Forward:
    """One prompt through the model, with every quantity open to an edit."""

    def __init__(self, model: HookedTransformer) -> None:
        self.cfg = model.cfg
        self.weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        self.n_kv = model.cfg.n_key_value_heads or model.cfg.n_heads

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt() * self.weights[name]

    def rotate(self, x: Tensor) -> Tensor:
        half = self.cfg.d_head // 2
        angles = torch.arange(len(x)).double()[:, None] / self.cfg.rotary_base ** (
            torch.arange(half).double() / half
        )
        a, b = x[:, :half], x[:, half:]
        return torch.cat(
            [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 1
        )

    def head_input(self, layer: int, which: str, head: int, normed: Tensor) -> Tensor:
        """q, k or v [pos, d_head] that query head `head` works with."""
        index, name = head, which.upper()
        if which != "q" and self.n_kv != self.cfg.n_heads:
            index, name = head * self.n_kv // self.cfg.n_heads, name
            prefix = f"blocks.{layer}.attn._"
        else:
            prefix = f"blocks.{layer}.attn."
        return (
            normed @ self.weights[f"{prefix}W_{name}"][index]
            + self.weights[f"{prefix}b_{name}"][index]
        )

    def run(
        self,
        tokens: Tensor,
        edit_input: Callable[[int, int, str, Tensor], Tensor] = lambda layer, head, which, x: x,
        edit_z: Callable[[int, int, Tensor], Tensor] = lambda layer, head, z: z,
    ) -> tuple[Tensor, Z, dict[tuple[int, int, str], Tensor]]:
        """Log probabilities [pos, d_vocab], head outputs, and head inputs (before any edit)."""
        n = len(tokens)
        x = self.weights["embed.W_E"][tokens]
        zs: Z = {}
        inputs = {}
        for layer in range(self.cfg.n_layers):
            block = f"blocks.{layer}"
            normed = self.norm(x, f"{block}.ln1.w")
            out = self.weights[f"{block}.attn.b_O"].clone().expand(n, -1)
            for head in range(self.cfg.n_heads):
                vectors = {}
                for which in "qkv":
                    seen = self.head_input(layer, which, head, normed)
                    inputs[layer, head, which] = seen
                    vectors[which] = edit_input(layer, head, which, seen.clone())
                q, k = self.rotate(vectors["q"]), self.rotate(vectors["k"])
                scores = q @ k.T / math.sqrt(self.cfg.d_head)
                hidden = torch.ones(n, n).triu(1).bool()
                pattern = scores.masked_fill(hidden, float("-inf")).softmax(-1)
                zs[layer, head] = edit_z(layer, head, pattern @ vectors["v"])
                out = out + zs[layer, head] @ self.weights[f"{block}.attn.W_O"][head]
            x = x + out
            normed = self.norm(x, f"{block}.ln2.w")
            gate = normed @ self.weights[f"{block}.mlp.W_gate"]
            hidden = gate * gate.sigmoid() * (normed @ self.weights[f"{block}.mlp.W_in"])
            hidden = hidden + self.weights[f"{block}.mlp.b_in"]
            x = x + hidden @ self.weights[f"{block}.mlp.W_out"] + self.weights[f"{block}.mlp.b_out"]
        logits = self.norm(x, "ln_final.w") @ self.weights["unembed.W_U"]
        return (logits + self.weights["unembed.b_U"]).log_softmax(-1), zs, inputs

    def path_patch(
        self,
        clean: Tensor,
        corrupt: Tensor,
        target: int,
        sender: tuple[int, int],
        at: int,
        corrupt_at: int,
        receivers: Collection[tuple[int, int]] | None = None,
        receiver_input: str | None = None,
    ) -> float:
        """One sender's score on one pair of unpadded prompts, step by step as defined."""
        clean_log, clean_z, _ = self.run(clean)
        _, corrupt_z, _ = self.run(corrupt)

        def hold(layer: int, head: int, z: Tensor) -> Tensor:
            z = torch.cat([z[:at], clean_z[layer, head][at:]])
            if (layer, head) == sender:
                z[at] = corrupt_z[sender][corrupt_at]
            return z

        patched_log, _, inputs = self.run(clean, edit_z=hold)
        if receivers is not None:

            def overwrite(layer: int, head: int, which: str, x: Tensor) -> Tensor:
                if which == receiver_input and (layer, head) in receivers:
                    x[at] = inputs[layer, head, which][at]
                return x

            patched_log, _, _ = self.run(clean, edit_input=overwrite)
        before, after = clean_log[-1, target].exp(), patched_log[-1, target].exp()
        return ((after - before) / before).item()
