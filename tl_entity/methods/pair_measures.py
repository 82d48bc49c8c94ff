"""Measures that compare two models part by part: their nodes, edges, and what is carried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tl_entity._model import Model, frozen
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.edge_estimates import estimated_values
from tl_entity.exact.edges import edge_values
from tl_entity.heads import Head, Node
from tl_entity.hooks.edges import Edge
from tl_entity.hooks.guard import guarded
from tl_entity.methods.activation_patching import activation_patch_each
from tl_entity.methods.edges import possible_edges
from tl_entity.methods.masked_forward import outside_inference
from tl_entity.methods.pair_evidence import GainParts, NodeChange, NodesCompared
from tl_entity.methods.weight_shares import weight_shares
from tl_entity.methods.weight_units import ATTENTION_KINDS, MLP_KINDS
from tl_entity.metrics import LOG_PROBABILITY, PROBABILITY, Metric
from tl_entity.stats import (
    Changes,
    Interval,
    adjusted_p_values,
    compare_effects,
    each_alike,
    kept_by_chance,
    mean_intervals,
    share_changes,
)
from tl_entity.stats.intervals import Z_95
from tl_entity.tasks.aligned import AlignedPairs
from tl_entity.tasks.batches import PairBatch, PromptBatch

WORK = 0.8
"""Nodes are compared, and their edges, that do this share of the work in either model."""

PAIRS_TO_CHOOSE = 24
"""Pairs by which the edges that are run are chosen."""

PAIRS_RUN = 100
"""Pairs on which edges are run, at most."""

EDGES_RUN = 24
"""Edges of each model that are run."""

PROMPTS_OF_GAIN = 32
"""Prompts on which the gain is shared out over the weights, at most."""

PARTS_OF_WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "attention heads": ATTENTION_KINDS,
    "MLPs": MLP_KINDS,
}
"""The parts that a gain is shared out over, and the kinds of units in them; the rest is norms and
embeddings."""

OTHER_WEIGHTS = "norms and embeddings"


@dataclass(frozen=True)
class Worked:
    """What each node does in both models.

    Attributes:
        effects: of each model, per prompt.
        roles: their names.
    """

    effects: tuple[Float[Tensor, "batch layer role head"], Float[Tensor, "batch layer role head"]]
    roles: tuple[str, ...]

    def nodes_of(self, which: int, share: float = WORK) -> tuple[Node, ...]:
        """The fewest nodes that do this share of the work in one of the models."""
        n_roles, n_heads = self.effects[which].shape[2:]
        return tuple(
            Node(i // (n_roles * n_heads), i % n_heads, self.roles[i // n_heads % n_roles])
            for i in _fewest(self.flat(which).mean(0), share).tolist()
        )

    def flat(self, which: int) -> Float64[np.ndarray, "batch node"]:
        """One model's effects, nodes in one row, each prompt's as shares of all."""
        return each_alike(self.effects[which].flatten(1).double().numpy())


def _fewest(mean: Float64[np.ndarray, " part"], share: float) -> Int[np.ndarray, " some"]:
    """Indices of the fewest parts that have this share of all effects, in their order."""
    size = np.abs(mean)
    order = np.argsort(-size, kind="stable")
    n = int((size[order].cumsum() < share * size.sum()).sum()) + 1
    return np.sort(order[:n])


@checked
def compare_nodes(worked: Worked, *, seed: int = 0) -> NodesCompared:
    """Which nodes do the work in either model."""
    base, tuned = worked.flat(0), worked.flat(1)
    strong = np.unique(np.concatenate([_fewest(x.mean(0), WORK) for x in (base, tuned)]))
    groups = np.zeros(len(strong), dtype=np.int64)
    changes = compare_effects(base[:, strong], tuned[:, strong], groups, ["all nodes"], seed=seed)
    common, by_chance, p_value = kept_by_chance(
        *(mean.reshape(worked.effects[0].shape[1:]) for mean in (base.mean(0), tuned.mean(0))),
        seed=seed,
    )
    nodes = tuple(dict.fromkeys([*worked.nodes_of(0), *worked.nodes_of(1)]))
    return NodesCompared(changes, common, by_chance, p_value, _changed_nodes(worked, nodes))


def _changed_nodes(worked: Worked, nodes: Sequence[Node]) -> tuple[NodeChange, ...]:
    at = [
        [worked.effects[i][:, n.layer, worked.roles.index(n.role), n.head] for n in nodes]
        for i in (0, 1)
    ]  # type: ignore[index]
    base, tuned = (torch.stack(columns, 1).double().numpy() for columns in at)
    before, after, p_values = share_changes(base, tuned)
    adjusted = adjusted_p_values(p_values)
    found = [
        NodeChange(node, float(b), float(t), float(p))
        for node, b, t, p in zip(nodes, before, after, adjusted, strict=True)
    ]
    return tuple(sorted(found, key=lambda n: (n.p_value, -abs(n.tuned - n.base))))


@checked
@torch.inference_mode(False)
def compare_edges(
    models: tuple[Model, Model],
    prompts: PromptBatch,
    nodes: Sequence[Node],
    *,
    metric: Metric = PROBABILITY,
    seed: int = 0,
) -> Changes:
    """Which senders each receiver's input is from, in either model.

    Edges are chosen by their estimates on some pairs and run on others. Each pair is a prompt and
    another one, of which the sender's values are.

    Args:
        models: base and fine-tune.
        prompts: prompts with roles.
        nodes: the nodes that edges are between.
        metric: how runs are scored.
        seed: of the twins and the bootstrap.

    Raises:
        InputError: if there are too few prompts, no edges, or prompts can't be aligned.
    """
    n_run = min(PAIRS_RUN, len(prompts) - PAIRS_TO_CHOOSE)
    if n_run < 2:
        raise InputError(f"{len(prompts)} prompts are too few to choose edges and run them.")
    edges = possible_edges(nodes, prompts)
    if not edges:
        raise InputError("There are no edges between the nodes.")
    pairs = PairBatch(prompts, prompts[torch.arange(len(prompts)).roll(-1)], prompts.answers)
    aligned = AlignedPairs.draw(outside_inference(pairs), seed=seed)
    wanted: set[int] = set()
    for model in models:
        with guarded(model), frozen(model):
            clean, values = estimated_values(
                model, aligned[:PAIRS_TO_CHOOSE], edges, nodes=nodes, metric=metric
            )
        size = (values - clean).mean(-1).abs().amax(0)
        wanted |= set(size.argsort(descending=True, stable=True)[:EDGES_RUN].tolist())
    some = [edges[i] for i in sorted(wanted)]
    chosen = aligned[PAIRS_TO_CHOOSE : PAIRS_TO_CHOOSE + n_run]
    effects: list[np.ndarray] = []
    for model in models:
        with guarded(model), frozen(model):
            clean, values = edge_values(model, chosen, some, nodes=nodes, metric=metric)
        effects.append((values - clean).T.double().cpu().numpy())
    names = list(dict.fromkeys(_input_of(edge) for edge in some))
    groups = np.array([names.index(_input_of(edge)) for edge in some])
    return compare_effects(effects[0], effects[1], groups, names, seed=seed)


def _input_of(edge: Edge) -> str:
    return "logits" if edge.receiver is None else f"{edge.input} of {edge.receiver}"


@checked
def compare_information(
    models: tuple[Model, Model],
    worked: Worked,
    information: Mapping[str, PairBatch],
    *,
    seed: int = 0,
) -> Changes:
    """What a model's own nodes carry at each role: how much more probable the target of each kind
    of information becomes when their outputs are those of the counterfactual.

    Roles are those that one token has. Where nodes of several layers work at a role, those below
    the highest of these layers are patched by themselves too.

    Args:
        models: base and fine-tune.
        worked: what each node does.
        information: for each kind of information pairs of a prompt and a counterfactual, the same
            prompts for all kinds.
        seed: of the bootstrap.

    Raises:
        InputError: if no role is one token in all pairs, the kinds have other prompts, or the pairs
            are too few.
    """
    kinds = list(information)
    first = information[kinds[0]]
    if any(not torch.equal(information[k].clean.tokens, first.clean.tokens) for k in kinds):
        raise InputError("The kinds of information have other prompts; give all the same ones.")
    roles = [role for role in worked.roles if all(_is_one(p, role) for p in information.values())]
    cells = [_cells(worked, which, roles) for which in (0, 1)]
    names = [name for name in cells[0] if any(cells[which][name] for which in (0, 1))]
    if not names:
        raise InputError("No node works at a role that is one token in all pairs.")
    effects: list[np.ndarray] = []
    for model, heads_of in zip(models, cells, strict=True):
        columns: list[Tensor] = []
        for pairs in information.values():
            choices = [{}, *({name.split(",")[0]: list(heads_of[name])} for name in names)]
            found = activation_patch_each(model, pairs, choices, metric=PROBABILITY)
            values = [each.values for each in found]
            assert values[0] is not None
            columns += [value - values[0] for value in values[1:] if value is not None]
        found_here = torch.stack(columns, 1).double().cpu().numpy()
        # What makes a target less probable is not carried.
        effects.append(found_here * (found_here.mean(0) > 0))
    groups = np.tile(np.arange(len(names)), len(kinds))
    return compare_effects(effects[0], effects[1], groups, names, alike=False, seed=seed)


def _is_one(pairs: PairBatch, role: str) -> bool:
    """Whether each prompt has one token of a role."""
    return all(
        role in some.role_names and bool((some.where(role).sum(1) == 1).all())
        for some in (pairs.clean, pairs.corrupt)
    )


def _cells(worked: Worked, which: int, roles: Sequence[str]) -> dict[str, tuple[Head, ...]]:
    nodes = worked.nodes_of(which)
    found: dict[str, tuple[Head, ...]] = {}
    for role in roles:
        heads = sorted(
            Head(n.layer, n.head) for n in nodes if n.role == role and n.head is not None
        )
        top = heads[-1].layer if heads else 0
        found[role] = tuple(heads)
        found[f"{role}, below its highest layer"] = tuple(h for h in heads if h.layer < top)
    return found


@checked
def share_out_gain(
    base: Model, tuned: Model, prompts: PromptBatch, gains: Float[Tensor, " batch"]
) -> GainParts:
    """Where in the weights the gain lies; with no parts where there is none.

    Args:
        base: the base.
        tuned: the fine-tune.
        prompts: the prompts.
        gains: in the answer's log probability, of each prompt.
    """
    interval = Interval(*mean_intervals(gains.double().cpu().numpy()).tolist())
    gain = float(gains.double().mean())
    if interval.low <= 0 <= interval.high or abs(gain) < 1e-6:
        return GainParts(gain, interval, {}, float("nan"))
    shares = weight_shares(base, tuned, prompts[:PROMPTS_OF_GAIN], metric=LOG_PROBABILITY)
    per_prompt = shares.per_prompt.double().cpu().numpy()
    total = per_prompt.sum(0)
    kind_of = {kind: name for name, kinds in PARTS_OF_WEIGHTS.items() for kind in kinds}
    of = [kind_of.get(unit.kind, OTHER_WEIGHTS) for unit in shares.units]
    parts: dict[str, tuple[float, Interval]] = {}
    for name in (*PARTS_OF_WEIGHTS, OTHER_WEIGHTS):
        rows = [i for i, part in enumerate(of) if part == name]
        parts[name] = _ratio(per_prompt[rows].sum(0), total)
    return GainParts(gain, interval, parts, float(shares.integration_error))


def _ratio(part: np.ndarray, whole: np.ndarray) -> tuple[float, Interval]:
    """The ratio of two means over prompts, and its 95 % interval to first order."""
    ratio = float(part.mean() / whole.mean())
    rest = part - ratio * whole
    half = Z_95 * float(rest.std(ddof=1)) / np.sqrt(len(part)) / abs(float(whole.mean()))
    return ratio, Interval(ratio - half, ratio + half)
