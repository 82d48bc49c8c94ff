"""Gates: how much of each node's own output is let through, and how much is ablated.

A node is a head, or a layer's MLP, at all tokens of a role. With its gate at m it puts out
m * own + (1 - m) * ablated: at 1 it is itself, at 0 ablated. Gates can be trained.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Node
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.points import hook_point
from tl_entity.tasks.batches import PromptBatch

KEPT_ABOVE = 0.5
"""A node is kept if its gate is above this."""


@checked
@dataclass(frozen=True)
class Gates:
    """A gate in [0, 1] for every head at every role, and for every MLP where these are nodes too.

    Tokens whose role is none of these are ablated, as nothing says that they are kept. Padding is
    left alone.

    Attributes:
        roles: names of the roles.
        heads: the gates of heads.
        mlps: the gates of MLPs; None where MLPs are always themselves.
    """

    roles: tuple[str, ...]
    heads: Float[Tensor, "layer role head"]
    mlps: Float[Tensor, "layer role"] | None = None

    @classmethod
    def filled(cls, cfg: Any, roles: Sequence[str], value: float, *, mlps: bool = False) -> "Gates":
        """All gates at one value, for a model with this configuration."""
        # Gates in half precision could not be trained in small steps.
        dtype = torch.promote_types(cfg.dtype, torch.float32)

        def full(*shape: int) -> Tensor:
            return torch.full(shape, float(value), dtype=dtype, device=cfg.device)

        heads = full(cfg.n_layers, len(roles), cfg.n_heads)
        return cls(tuple(roles), heads, full(cfg.n_layers, len(roles)) if mlps else None)

    @classmethod
    @checked
    def keeping(
        cls, nodes: Iterable[Node], cfg: Any, roles: Sequence[str], *, mlps: bool = False
    ) -> "Gates":
        """These nodes at 1, all others at 0.

        Raises:
            InputError: if the model has no such layer or head, a role is none of these, or a node
                is an MLP and MLPs are not to be ablated.
        """
        gates = cls.filled(cfg, roles, 0, mlps=mlps)
        for node in nodes:
            heads_there = range(cfg.n_heads) if node.head is not None else (None,)
            if node.layer not in range(cfg.n_layers) or node.head not in heads_there:
                raise InputError(
                    f"The model has no {node}; it has {cfg.n_layers} layers of {cfg.n_heads} heads."
                )
            if node.role not in gates.roles:
                raise InputError(f"{node} is at none of the roles {', '.join(gates.roles)}.")
            role = gates.roles.index(node.role)
            if node.head is not None:
                gates.heads[node.layer, role, node.head] = 1
            elif gates.mlps is None:
                raise InputError(f"{node} is an MLP, and these gates are of heads alone.")
            else:
                gates.mlps[node.layer, role] = 1
        return gates

    @property
    def all_nodes(self) -> tuple[Node, ...]:
        """Every node, in the order of `flat`: heads by layer, role and head, then MLPs."""
        n_layers, _, n_heads = self.heads.shape
        heads = [
            Node(layer, head, role)
            for layer in range(n_layers)
            for role in self.roles
            for head in range(n_heads)
        ]
        layers = () if self.mlps is None else range(n_layers)
        return (*heads, *(Node(layer, None, role) for layer in layers for role in self.roles))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are kept: those with a gate above one half."""
        kept = (self.flat() > KEPT_ABOVE).tolist()
        return tuple(node for node, is_kept in zip(self.all_nodes, kept, strict=True) if is_kept)

    def flat(self) -> Float[Tensor, " node"]:
        """All gates in one row."""
        heads = self.heads.flatten()
        return heads if self.mlps is None else torch.cat([heads, self.mlps.flatten()])

    def with_values(self, values: Float[Tensor, " node"]) -> "Gates":
        """The same nodes with other gates, given in the order of `flat`."""
        heads, mlps = values.split([self.heads.numel(), values.numel() - self.heads.numel()])
        return Gates(
            self.roles,
            heads.view_as(self.heads),
            None if self.mlps is None else mlps.view_as(self.mlps),
        )

    def role_index(self, prompts: PromptBatch) -> Int[Tensor, "batch pos"]:
        """Which row of a table by `by_token_row` each token takes: its role's, that of other roles,
        or that of padding.

        Raises:
            InputError: if the prompts have no roles.
        """
        if prompts.roles is None:
            raise InputError(
                "Gates are by role, and the prompts have no roles; give PromptBatch its roles."
            )
        other, padding = len(self.roles), len(self.roles) + 1
        number = [self.roles.index(n) if n in self.roles else other for n in prompts.role_names]
        # The last entry is what -1, the role of padding, looks up.
        table = torch.tensor([*number, padding], device=prompts.roles.device)
        return table[prompts.roles]

    @staticmethod
    def by_token_row(of_roles: Float[Tensor, "role *rest"]) -> Float[Tensor, "row *rest"]:
        """A layer's gates with a row for other roles, 0, and one for padding, 1, behind."""
        one = of_roles[:1]
        return torch.cat([of_roles, torch.zeros_like(one), torch.ones_like(one)])


@checked
@dataclass(frozen=True)
class GateHeads:
    """Mix every head's own output at every token with its ablated one, by gates that can be
    trained.

    Gradients reach the gates and the activation.

    Attributes:
        gates: m of each head at each token.
        rows: which row of ablated outputs each token takes.
        outputs: the ablated outputs.
    """

    gates: Float[Tensor, "batch pos head"]
    rows: Int[Tensor, "batch pos"]
    outputs: Float[Tensor, "row head d_head"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        return _mixed(activation, hook, self.gates, self.rows, self.outputs)


@checked
@dataclass(frozen=True)
class GateMLP:
    """The same for a layer's MLP, at `mlp_out`.

    Attributes:
        gates: m at each token.
        rows: which row of ablated outputs each token takes.
        outputs: the ablated outputs.
    """

    gates: Float[Tensor, "batch pos"]
    rows: Int[Tensor, "batch pos"]
    outputs: Float[Tensor, "row d_model"]

    def __call__(self, activation: Tensor, hook: Any) -> Tensor:
        return _mixed(activation, hook, self.gates, self.rows, self.outputs)


@checked
def gate_nodes(
    gates: Gates, ablation: Ablation, prompts: PromptBatch
) -> list[tuple[str, GateHeads | GateMLP]]:
    """Hooks by which every node puts out what its gate says, for `run_with_hooks` on the prompts.

    Args:
        gates: the gates.
        ablation: what ablated nodes put out.
        prompts: the prompts that will be run.

    Raises:
        InputError: if the prompts have no roles, or the ablation does not fit them or the gates.
    """
    check_gates_fit(gates, ablation)
    assert ablation.outputs is not None
    rows, index = ablation.rows(prompts), gates.role_index(prompts)
    hooks: list[tuple[str, GateHeads | GateMLP]] = []
    for layer, of_heads in enumerate(gates.heads):
        at_tokens = Gates.by_token_row(of_heads)[index.to(of_heads.device)]
        outputs = ablation.outputs[layer]
        hooks.append((hook_point("z", layer), GateHeads(at_tokens, rows, outputs)))
        if gates.mlps is not None and ablation.mlp_outputs is not None:
            at_tokens = Gates.by_token_row(gates.mlps[layer])[index.to(gates.mlps.device)]
            edit = GateMLP(at_tokens, rows, ablation.mlp_outputs[layer])
            hooks.append((hook_point("mlp_out", layer), edit))
    return hooks


def check_gates_fit(gates: Gates, ablation: Ablation) -> None:
    """Make sure that an ablation has an output for every gated node.

    Raises:
        InputError: if it is of another model, or has no outputs of MLPs and these are gated.
    """
    if ablation.outputs is None:
        raise InputError("Give the zero ablation its model's shape first: ablation.of_model(cfg).")
    n_layers, _, n_heads, _ = ablation.outputs.shape
    if (n_layers, n_heads) != gates.heads.shape[::2]:
        raise InputError(
            f"The ablation has outputs of {n_layers} layers of {n_heads} heads; the gates are for "
            f"{gates.heads.shape[0]} of {gates.heads.shape[2]}."
        )
    if gates.mlps is not None and ablation.mlp_outputs is None:
        raise InputError(
            "MLPs can't be ablated, as the ablation has no outputs of theirs; make it with "
            "mlps=True."
        )


def _mixed(activation: Tensor, hook: Any, gates: Tensor, rows: Tensor, outputs: Tensor) -> Tensor:
    made_for = (*rows.shape, *outputs.shape[1:])
    if activation.shape != made_for:
        raise InputError(
            f"{hook.name} has shape {tuple(activation.shape)}; the gates are made for {made_for}."
        )
    ablated = outputs.to(activation)[rows.to(activation.device)]
    return ablated + gates.to(activation)[..., None] * (activation - ablated)
