"""Senders at the tokens of their roles, all of them in one pass with attention held.

With attention outputs held clean, a change at a token stays at that token. So every sender at every
one of its tokens is one row, and the rows of all senders pass the MLPs as one growing batch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity.exact.blocks import add_mlp, device_of
from tl_entity.heads import Node
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.tasks.aligned import AlignedPairs


class Rows(NamedTuple):
    """Which sender, prompt and token each row is of.

    Attributes:
        sender: index of the sender among all.
        prompt: index of the prompt.
        token: index of the token in the clean prompt.
    """

    sender: Int[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    token: Int[Tensor, " row"]

    def at(self, activation: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "row *rest"]:
        """An activation of whole prompts, at each row's token."""
        device = activation.device
        return activation[self.prompt.to(device), self.token.to(device)]

    def first(self, n: int) -> "Rows":
        """The first `n` rows."""
        return Rows(*(index[:n] for index in self))


@dataclass(frozen=True)
class HeldPass:
    """A clean run and the corrupt outputs of some senders; made by `record`.

    Attributes:
        model: the model.
        senders: the senders, in order of where in the model they are.
        rows: what each row is.
        deltas: for each sender its corrupt minus its clean output at each of its tokens.
        points: the clean run's activations by hook point name.
        moved: the prompts and tokens at which a sender's corrupt output differs at all.
    """

    model: Model
    senders: tuple[Node, ...]
    rows: Rows
    deltas: tuple[Float[Tensor, "token width"], ...]
    points: Mapping[str, Tensor]
    moved: Bool[Tensor, "sender batch pos"]

    @classmethod
    def record(
        cls,
        model: Model,
        pairs: AlignedPairs,
        senders: Sequence[Node],
        *,
        top: int,
        inputs_of: Collection[int] = (),
    ) -> "HeldPass":
        """Run both prompts of each pair, and keep what the pass up to layer `top` needs; of the
        clean run also the queries, keys and values of some layers.

        Raises:
            InputError: as `AlignedPairs.tokens`.
        """
        ordered = tuple(sorted(set(senders), key=_place))
        tokens = {role: pairs.tokens(role) for role in {s.role for s in ordered}}
        sent = dict.fromkeys(_output_point(sender) for sender in ordered)
        points = dict(sent) | {hook_point(w, layer): None for w in "qkv" for layer in inputs_of}
        for layer in range(min((s.layer for s in ordered), default=top), top):
            points |= {hook_point(name, layer): None for name in ("attn_out", "resid_mid")}
            if any(s.layer == layer and s.head is None for s in ordered):
                points[hook_point("resid_post", layer)] = None
        clean = record(model, pairs.clean, points) if points else {}
        corrupt = record(model, pairs.corrupt, sent) if sent else {}
        moved = torch.zeros(len(ordered), *pairs.clean.tokens.shape, dtype=torch.bool)
        deltas = []
        for index, sender in enumerate(ordered):
            here = tokens[sender.role]
            name = _output_point(sender)
            new, old = (
                _of_sender(run[name], sender)[here.rows, at]
                for run, at in ((corrupt, here.corrupt), (clean, here.clean))
            )
            deltas.append(new - old)
            moved[index, here.rows, here.clean] = (new != old).any(-1).cpu()
        lengths = [len(tokens[sender.role]) for sender in ordered]
        of = [tokens[sender.role] for sender in ordered]
        none = torch.zeros(0, dtype=torch.long)
        rows = Rows(
            torch.arange(len(ordered)).repeat_interleave(torch.tensor(lengths, dtype=torch.long)),
            torch.cat([none, *(here.rows for here in of)]),
            torch.cat([none, *(here.clean for here in of)]),
        )
        return cls(model, ordered, rows, tuple(deltas), clean, moved)

    def by_role(
        self, filled: int
    ) -> "Iterator[tuple[list[int], Rows, Int[Tensor, 'sender token']]]":
        """Of the first rows, for each role: the senders there, the tokens, and the row of each
        sender at each token."""
        begins = [0]
        for delta in self.deltas:
            begins.append(begins[-1] + len(delta))
        roles: dict[str, list[int]] = {}
        for index, sender in enumerate(self.senders):
            if begins[index + 1] <= filled and len(self.deltas[index]):
                roles.setdefault(sender.role, []).append(index)
        for senders in roles.values():
            rows = torch.stack([torch.arange(begins[i], begins[i + 1]) for i in senders])
            yield senders, Rows(*(index[rows[0]] for index in self.rows)), rows

    def layers(self, top: int) -> Iterator[tuple[int, Rows, Float[Tensor, "row d_model"]]]:
        """For each layer up to `top`, which may be the number of layers: `resid_pre` at their
        tokens of all senders below. The rows are changed in place afterwards."""
        model = self.model
        dtype = self.deltas[0].dtype if self.deltas else model.cfg.dtype
        resid = torch.zeros(len(self.rows.sender), model.cfg.d_model, dtype=dtype)
        filled = 0
        for layer in range(top):
            resid = resid.to(device_of(model, layer))
            yield layer, self.rows.first(filled), resid[:filled]
            if filled == 0 and not any(s.layer == layer for s in self.senders):
                continue
            below = self.rows.first(filled)
            resid[:filled] += below.at(self.points[hook_point("attn_out", layer)])
            filled = self._add_senders(layer, filled, resid, heads=True)
            add_mlp(model, layer, resid[:filled])
            filled = self._add_senders(layer, filled, resid, heads=False)
        if top < model.cfg.n_layers:
            resid = resid.to(device_of(model, top))
        yield top, self.rows.first(filled), resid[:filled]

    def _add_senders(self, layer: int, filled: int, resid: Tensor, *, heads: bool) -> int:
        """Begin the rows of a layer's heads, or of its MLP; returns how many there are now."""
        for sender, delta in zip(self.senders, self.deltas, strict=True):
            if sender.layer != layer or (sender.head is not None) != heads:
                continue
            here = slice(filled, filled + len(delta))
            rows = Rows(*(index[here] for index in self.rows))
            begins = rows.at(self.points[hook_point("resid_mid" if heads else "resid_post", layer)])
            if sender.head is not None:
                delta = delta @ self.model.blocks[layer].attn.W_O[sender.head]
            resid[here] = begins + delta
            filled = here.stop
        return filled


def _place(sender: Node) -> tuple[int, bool, int, str]:
    """Heads of a layer come before its MLP."""
    return sender.layer, sender.head is None, sender.head or 0, sender.role


def _output_point(sender: Node) -> str:
    return hook_point("mlp_out" if sender.head is None else "z", sender.layer)


def _of_sender(output: Tensor, sender: Node) -> Tensor:
    return output if sender.head is None else output[:, :, sender.head]
