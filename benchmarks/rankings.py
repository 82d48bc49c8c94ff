"""Ways to rank a model's nodes, each beside `find_mechanism`: from one gradient to a run a node.

Each takes the same `Given` and gives a score for every node, in the order of `Gates.all_nodes`, the
more important the higher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_entity import Head, PairBatch, path_patch
from tl_entity.hooks.gates import Gates
from tl_entity.hooks.run import answer_logits
from tl_entity.methods.gate_training import node_scores
from tl_entity.methods.gated_forward import GatedForward, RecordedPrompts
from tl_entity.metrics import log_probability

STEPS = 5
"""Points between corrupt and clean embeddings at which EAP-IG takes the gradient."""


@dataclass(frozen=True)
class PathStage:
    """One path patching: senders at a position, into an input of the best of an earlier stage.

    Attributes:
        position: where the senders are.
        role: the role that this position is one token of.
        into: which earlier stage's heads, by its number; None for the logits.
        inputs: which of their inputs.
        n_receivers: how many of this stage's heads later stages patch into.
    """

    position: str
    role: str
    into: int | None = None
    inputs: str = ""
    n_receivers: int = 2


@dataclass(frozen=True)
class Given:
    """What every ranking is given.

    Attributes:
        forward: the model with gates, and the ablation.
        recorded: the prompts that are ranked on.
        gates: which nodes there are.
        pairs: clean and corrupt prompts, for those that patch.
        stages: what path patching looks for.
        batch_size: pairs that EAP-IG runs together.
    """

    forward: GatedForward
    recorded: RecordedPrompts
    gates: Gates
    pairs: PairBatch
    stages: Sequence[PathStage]
    batch_size: int = 16


def gate_gradients(given: Given) -> Tensor:
    """Gradients of the gates, at .25, .5, .75 and 1: where `find_mechanism` begins."""
    return node_scores(given.forward, given.recorded, given.gates)


def node_attribution(given: Given) -> Tensor:
    """Attribution patching of nodes (Nanda 2023): the gradient in the whole model times what the
    ablation changes; which is that of the gates at 1."""
    ones = given.gates.with_values(torch.ones_like(given.gates.flat()))
    return -given.forward.gradient(given.recorded, ones, "metric")[1]


def single_ablation(given: Given) -> Tensor:
    """Each node ablated by itself, exactly: what the metric loses."""
    ones = torch.ones_like(given.gates.flat())
    each: list[Gates] = []
    for i in range(len(ones)):
        values = ones.clone()
        values[i] = 0
        each.append(given.gates.with_values(values))
    whole = float(given.forward.evaluate(given.recorded, each[:1])[0].whole_value.mean())
    lost: list[float] = []
    for start in range(0, len(each), 64):
        found = given.forward.evaluate(given.recorded, each[start : start + 64])
        lost += [whole - float(answers.value.mean()) for answers in found]
    return torch.tensor(lost)


def path_patching(given: Given) -> Tensor:
    """Path patching, stage by stage; a node's score is its largest loss at its role."""
    scores = torch.zeros_like(given.gates.heads)
    found: list[tuple[Head, ...]] = []
    for stage in given.stages:
        receivers = None if stage.into is None else dict.fromkeys(stage.inputs, found[stage.into])
        patched = path_patch(
            given.forward.model, given.pairs, position=stage.position, receivers=receivers
        )
        found.append(patched.top(stage.n_receivers))
        role = given.gates.roles.index(stage.role)
        scores[:, role] = torch.maximum(scores[:, role], -patched.scores.to(scores))
    return given.gates.flat().new_tensor(scores.flatten().tolist())


def edge_attribution(given: Given) -> Tensor:
    """EAP-IG (Hanna et al. 2024, arXiv 2403.17806), written anew: edges by their sender's change
    between clean and corrupt prompt, times the gradient of their receiver's input, averaged over
    embeddings between the two. The circuit grows from the logits by the edge with the largest
    score; a node ranks by when it comes in. Edges are taken apart by role, and lead through MLPs as
    nodes of their own.
    """
    scores = _edge_scores(given)
    return _grown(scores, given.gates)


RANKINGS = {
    "gradients of the gates": gate_gradients,
    "gradients of the gates by size": lambda given: gate_gradients(given).abs(),
    "node attribution": node_attribution,
    "node attribution by size": lambda given: node_attribution(given).abs(),
    "single ablation": single_ablation,
    "path patching": path_patching,
    "EAP-IG edges": edge_attribution,
}


@dataclass(frozen=True)
class EdgeScores:
    """Scores of edges by the role of the token that they are at.

    Attributes:
        senders: the embedding, and each layer's heads, then its MLP: (layer, head or None).
        receivers: (layer, head or None, "q", "k", "v" or "mlp"), and the logits at the end.
        values: `[role sender receiver]`, below zero where the corrupt sender lowers the answer.
        group: query heads that share a key and value head.
    """

    senders: list[tuple[int, int | None]]
    receivers: list[tuple[int, int | None, str]]
    values: Tensor
    group: int


def _edge_scores(given: Given) -> EdgeScores:
    model, pairs = given.forward.model, given.pairs
    cfg = model.cfg
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    try:
        total: Tensor | None = None
        for start in range(0, len(pairs), given.batch_size):
            some = pairs[start : start + given.batch_size]
            changes, slopes = _changes(model, some), _slopes(model, some)
            roles = torch.stack([some.clean.where(role) for role in given.gates.roles]).float()
            found = torch.einsum("bpsd,bprd,xbp->xsr", changes, slopes, roles)
            total = found if total is None else total + found
    finally:
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)
    assert total is not None
    n_kv = cfg.n_key_value_heads or cfg.n_heads
    layers = range(cfg.n_layers)
    senders = [(-1, None), *((la, h) for la in layers for h in [*range(cfg.n_heads), None])]
    receivers: list[tuple[int, int | None, str]] = []
    for layer in layers:
        for into, n in (("q", cfg.n_heads), ("k", n_kv), ("v", n_kv)):
            receivers += [(layer, head, into) for head in range(n)]
        receivers.append((layer, None, "mlp"))
    receivers.append((cfg.n_layers, None, "logits"))
    return EdgeScores(senders, receivers, total / len(pairs), cfg.n_heads // n_kv)


def _inputs(model) -> list[str]:
    names = []
    for layer in range(model.cfg.n_layers):
        names += [f"blocks.{layer}.hook_{into}_input" for into in "qkv"]
        names.append(f"blocks.{layer}.hook_mlp_in")
    return [*names, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]


@torch.no_grad()
def _changes(model, pairs: PairBatch) -> Tensor:
    """What every sender writes in the corrupt run less what it writes in the clean one:
    `[batch pos sender d_model]`."""
    wanted = ("hook_embed", "attn.hook_z", "hook_mlp_out")
    both = []
    for prompts in (pairs.clean, pairs.corrupt):
        mask = prompts.attention_mask
        cache = model.run_with_cache(
            prompts.tokens, attention_mask=mask, names_filter=lambda name: name.endswith(wanted)
        )[1]
        parts = [cache["hook_embed"][:, :, None]]
        for layer, block in enumerate(model.blocks):
            z = cache[f"blocks.{layer}.attn.hook_z"]
            parts.append(torch.einsum("bphe,hed->bphd", z, block.attn.W_O))
            parts.append(cache[f"blocks.{layer}.hook_mlp_out"][:, :, None])
        both.append(torch.cat(parts, 2))
    return both[1] - both[0]


def _slopes(model, pairs: PairBatch) -> Tensor:
    """The gradient of the answer's log probability with respect to every receiver's input, averaged
    over embeddings between corrupt and clean: `[batch pos receiver d_model]`."""
    embedded = [model.embed(prompts.tokens).detach() for prompts in (pairs.clean, pairs.corrupt)]
    total: Tensor | None = None
    for step in range(1, STEPS + 1):
        between = embedded[1] + step / STEPS * (embedded[0] - embedded[1])
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook, seen=seen) -> Tensor:
            value = value if value.requires_grad else value.detach().requires_grad_()
            value.retain_grad()
            seen[hook.name] = value
            return value

        hooks = [("hook_embed", lambda value, hook, between=between: between.requires_grad_())]
        hooks += [(name, keep) for name in _inputs(model)]
        with torch.enable_grad():
            logits = answer_logits(model, pairs.clean, hooks)
            log_probability(logits, pairs.targets).sum().backward()
        parts = [seen[name].grad for name in _inputs(model)]
        found = torch.cat([p if p.ndim == 4 else p[:, :, None] for p in parts], 2)
        total = found if total is None else total + found
        model.zero_grad(set_to_none=True)
    return total / STEPS


def _grown(scores: EdgeScores, gates: Gates) -> Tensor:
    """How early each head at a role comes into the circuit, the earliest the highest."""
    at: dict[tuple[int, int | None], int] = {node: i for i, node in enumerate(scores.senders)}
    into: Mapping[tuple[int, int | None], list[int]] = {}
    for i, (layer, head, kind) in enumerate(scores.receivers):
        shared = scores.group if kind in ("k", "v") else 1
        for which in [None] if head is None else range(head * shared, (head + 1) * shared):
            into.setdefault((layer, which), []).append(i)
    layer_of = torch.tensor(
        [layer + (0.5 if head is None else 0) for layer, head in scores.senders]
    )
    # The best edge from each sender at each role into what is in the circuit so far.
    best = torch.full(scores.values.shape[:2], -torch.inf)
    come = torch.full((len(gates.all_nodes),), -torch.inf)
    index = {node: i for i, node in enumerate(gates.all_nodes)}

    def open_up(layer: int, head: int | None, role: int) -> None:
        """An edge into a head's key or value may be at any role, into its query or an MLP at its
        own."""
        for i in into.get((layer, head), []):
            kind = scores.receivers[i][2]
            below = layer_of < layer + (0.25 if kind == "mlp" else -0.25)
            roles = [role] if kind in ("q", "mlp", "logits") else range(len(gates.roles))
            for at_role in roles:
                sizes = torch.where(below, scores.values[at_role, :, i].abs(), -torch.inf)
                best[at_role] = torch.maximum(best[at_role], sizes)

    done = torch.zeros_like(best, dtype=torch.bool)
    open_up(len(gates.heads), None, gates.roles.index("last"))
    for rank in range(best.numel()):
        waiting = torch.where(done, -torch.inf, best)
        role, sender = divmod(int(waiting.argmax()), best.shape[1])
        if waiting[role, sender] == -torch.inf:
            break
        done[role, sender] = True
        layer, head = scores.senders[sender]
        if head is not None:
            come[index[(layer, head, gates.roles[role])]] = -rank
        if layer >= 0:
            open_up(layer, head, role)
    assert at[(-1, None)] == 0
    return come
