"""Edges of a mechanism: which node acts on which, through which input, and how much."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tl_entity._model import Model, check_takes_gradients, frozen
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact import edges as exact_engine
from tl_entity.exact.blocks import check_supported
from tl_entity.exact.edge_estimates import estimated_values
from tl_entity.heads import Head, Node
from tl_entity.hooks import edges as hooks_engine
from tl_entity.hooks.edges import Edge as Edge
from tl_entity.hooks.edges import EdgeInput
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import check_heads
from tl_entity.hooks.vocabulary import check_pairs
from tl_entity.methods.masked_forward import outside_inference
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.ranks import shared_out
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.stats import average_ranks, mean_intervals
from tl_entity.tasks.aligned import AlignedPairs
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from tl_entity.plots.mechanism_graph import Graph

EDGES_DRAWN = 60
"""Edges that a picture shows, where nothing else is said: more would hide each other."""


@runtime_checkable
class HasNodes(Protocol):
    """Anything that has nodes, such as a mechanism."""

    @property
    def nodes(self) -> Sequence[Node]:
        """Its nodes."""
        ...


@checked
@dataclass(frozen=True)
class Edges(Result):
    """How much the answer changes when each edge of a mechanism carries its corrupt value.

    Attributes:
        edges: the edges, in no order of importance.
        per_example: change of the metric, one for each edge and pair; by default the relative
            change of the target's probability. Below zero the edge helps.
        exact: whether an edge's scores were run; the others are estimated to first order.
        clean_values: the metric in the clean runs.
        nodes: the nodes that the edges are between.
        roles: the nodes' roles in the order in which prompts have them.
        metric: the metric's name.
        engine: what computed the exact scores.
    """

    edges: tuple[Edge, ...]
    per_example: Float[Tensor, "edge batch"]
    exact: Bool[Tensor, " edge"]
    clean_values: Float[Tensor, " batch"]
    nodes: tuple[Node, ...]
    roles: tuple[str, ...]
    metric: str = RELATIVE_PROBABILITY.name
    engine: Engine = "exact"

    def __len__(self) -> int:
        return len(self.edges)

    def __str__(self) -> str:
        score = self.score
        best = ", ".join(f"{self.edges[i]} {score[i].item():+.3f}" for i in self.order[:3])
        return (
            f"{len(self)} edges between {len(self.nodes)} nodes, {int(self.exact.sum())} of them "
            f"exact, {self.per_example.shape[1]} pairs; strongest by {self.metric}: "
            f"{best or 'none'}"
        )

    @property
    def sender(self) -> tuple[Node, ...]:
        """Each edge's sender."""
        return tuple(edge.sender for edge in self.edges)

    @property
    def receiver(self) -> tuple[Node | None, ...]:
        """Each edge's receiver; None for the logits."""
        return tuple(edge.receiver for edge in self.edges)

    @property
    def input(self) -> tuple[EdgeInput, ...]:
        """Which input of its receiver each edge goes into."""
        return tuple(edge.input for edge in self.edges)

    @property
    def score(self) -> Float[Tensor, " edge"]:
        """Mean over the pairs, with its sign: the lower, the more the edge helps."""
        return self.per_example.mean(-1)

    @property
    def intervals(self) -> Float64[np.ndarray, "edge 2"]:
        """95 % interval of each mean score."""
        return mean_intervals(self.per_example.double().cpu().numpy())

    @property
    def order(self) -> list[int]:
        """Indices of the edges, the largest score of either sign first."""
        return self.score.abs().argsort(descending=True, stable=True).tolist()

    def top(self, n: int, *, clear: bool = False) -> tuple[Edge, ...]:
        """The `n` edges with the largest scores of either sign; with `clear`, only those of them
        whose scores are exact and have an interval without zero."""
        some = self.order[:n]
        if clear:
            low, high = self.intervals[some].T
            there = self.exact.cpu().numpy()[some] & ((low > 0) | (high < 0))
            some = [index for index, kept in zip(some, there, strict=True) if kept]
        return tuple(self.edges[index] for index in some)

    def score_of(self, edge: Edge) -> float:
        """The mean score of an edge.

        Raises:
            KeyError: if the edge is none of these.
        """
        if edge not in self.edges:
            raise KeyError(edge)
        return self.score[self.edges.index(edge)].item()

    def to_dataframe(self) -> "pd.DataFrame":
        """One row an edge, the largest score first: sender, receiver, input, score with its 95 %
        interval, and whether it is exact."""
        import pandas as pd

        order = self.order
        bounds = self.intervals[order]
        some = [self.edges[index] for index in order]
        return pd.DataFrame(
            {
                "sender": [str(edge.sender) for edge in some],
                "receiver": ["logits" if e.receiver is None else str(e.receiver) for e in some],
                "input": [edge.input for edge in some],
                "score": self.score[order].tolist(),
                "low": bounds[:, 0],
                "high": bounds[:, 1],
                "exact": self.exact[order].tolist(),
            }
        )

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The `n` strongest edges; None for all."""
        rows = self.to_dataframe()
        return rows if n is None else rows.head(n)

    def plot(
        self,
        n: int = EDGES_DRAWN,
        *,
        other: "Edges | None" = None,
        words: "dict[str, str] | None" = None,
        title: str | None = None,
    ) -> "go.Figure":
        """The mechanism as a graph: layers up, roles along, the `n` strongest edges as arcs, the
        stronger the wider; red where the edge helps, blue where it hinders.

        Args:
            n: how many edges are drawn.
            other: another model's edges, drawn beside these, with what is kept, lost and new in
                colour.
            words: for each role a word that has it in some prompt, to stand under its name.
            title: above the figure.
        """
        from tl_entity.plots.mechanism_graph import compared_graphs, mechanism_graph

        if other is not None:
            names = ("base", "fine-tune")
            return compared_graphs(
                self.graph(n), other.graph(n), names=names, words=words, title=title
            )
        drawn = min(n, len(self))
        title = f"{drawn} of {len(self)} edges, {len(self.nodes)} nodes" if title is None else title
        return mechanism_graph(self.graph(n), words=words, title=title)

    def graph(self, n: int = EDGES_DRAWN) -> "Graph":
        """What `plot` shows: the nodes, and the `n` strongest edges."""
        from tl_entity.plots.mechanism_graph import Graph, GraphEdge

        scores, bounds, exact = self.score.tolist(), self.intervals.tolist(), self.exact.tolist()
        edges: list[GraphEdge] = []
        for i in self.order[:n]:
            edge, (low, high) = self.edges[i], bounds[i]
            edges.append(
                GraphEdge(edge.sender, edge.receiver, edge.input, scores[i], low, high, exact[i])
            )
        return Graph(self.nodes, self.roles, tuple(edges))


@checked
@torch.inference_mode(False)
def mechanism_edges(
    model: Model,
    pairs: PairBatch,
    mechanism: HasNodes | Sequence[Node],
    *,
    top_n: int = 20,
    metric: Metric = RELATIVE_PROBABILITY,
    seed: int | None = 0,
    engine: Engine = "exact",
    memory: int | None = None,
) -> Edges:
    """Score every edge between the nodes of a mechanism, and from them to the logits.

    An edge leads from a sender, at every token of its role at once, into the query, key or value
    that a head at a higher layer has at these tokens, with no other head between. It is patched as
    a path is (Prakash et al. 2024, §3.1): the clean prompt is run with every head's `hook_z` held
    at its clean value, except the sender's at its tokens, which take values of the corrupt run;
    MLPs and norms are recomputed. The receiver's input that is seen there is put into a second
    clean run at these tokens, and all else is recomputed. Into the logits, the first run is scored.
    A query is that of the receiver's own tokens, so sender and receiver share these. Keys and
    values are read, as in path patching, by every later token of the receiving head; where this
    head is several of the nodes, by the receiver's own tokens alone. Under grouped-query attention
    the one head's key or value changes and its siblings' does not. An MLP can be a sender.

    With the exact engine all edges are first estimated: what a sender changes in an input, of all
    senders in one held pass, and what this changes in the receiver's output are exact; that times
    the output's gradient, of one backward pass, is the estimate. Edges into the logits are exact
    already. First order may be wrong in size and sign where the model is sure of its answer. So the
    edges are run in the order of how large their estimates are in each pair, of either sign, with
    the gradients of the clean run or with those on the way to a run with all senders corrupt,
    whichever puts them higher. They are run `top_n` at a time, until such a batch brings none among
    the `top_n` largest scores and all of these have been run. On the hooks engine every edge is
    run: two runs of the whole model each.

    Args:
        model: the model.
        pairs: clean and corrupt prompts with roles; the prompts of a pair have equally many tokens
            of each role. Take pairs that the model answers right: elsewhere a relative change is
            many times a small probability.
        mechanism: its nodes, or anything that has `nodes`.
        top_n: the strongest so many edges are exact.
        metric: how runs are scored, from `tl_entity.metrics` or your own.
        seed: of the corrupt token that each clean one takes its values from, where a prompt has
            several of a role: they are moved on by a number drawn for each pair. With None the
            first takes those of the first, the second of the second, and what a node knows of its
            place in the prompt stays as it is.
        engine: "exact" or "hooks".
        memory: bytes that the exact engine's intermediate results may take; found from the device
            if left out.

    Raises:
        InputError: if the model has no such node, the prompts lack a role or have unequally many of
            its tokens, a score is not finite, the metric lacks what it needs, or the exact engine
            does not fit the model.
        NotFiniteError: if weights or activations are NaN or infinite, naming where.
    """
    check_pairs(model, pairs)
    if engine == "exact":
        check_supported(model)
        check_takes_gradients(model)
    given = mechanism.nodes if isinstance(mechanism, HasNodes) else mechanism
    nodes = tuple(dict.fromkeys(Node(*node) for node in given))
    check_nodes(model, nodes)
    pairs = outside_inference(pairs.to(model.cfg.device or "cpu"))
    edges = possible_edges(nodes, pairs.clean)
    aligned = AlignedPairs.draw(pairs, seed=seed)
    for role in {node.role for node in nodes}:
        aligned.tokens(role)
    how: dict[str, Any] = {"nodes": nodes, "metric": metric}
    with guarded(model), frozen(model):
        if engine == "hooks":
            clean, values = shared_out(
                aligned, lambda some: hooks_engine.edge_values(model, some, edges, **how)
            )
            per_example, exact = metric.change(values, clean), [True] * len(edges)
        else:
            how["memory"] = memory
            clean, per_example, exact = _until_the_top_is_exact(model, aligned, edges, top_n, how)
    if not bool(per_example.isfinite().all()):
        i = int((~per_example.isfinite()).any(-1).nonzero()[0])
        raise InputError(f"The score of {edges[i]} is not finite; the runs have NaN or infinity.")
    return Edges(
        edges=tuple(edges),
        per_example=per_example,
        exact=torch.tensor(exact, dtype=torch.bool),
        clean_values=clean,
        nodes=nodes,
        roles=_along_the_prompt(nodes, pairs.clean),
        metric=metric.name,
        engine=engine,
    )


@checked
def possible_edges(nodes: Sequence[Node], prompts: PromptBatch) -> list[Edge]:
    """Every edge that there can be between nodes, in some prompt: up the layers, into a query at
    the same token, into keys and values at tokens that are not after the receiver's, and into the
    logits from the last token.

    Raises:
        InputError: if the prompts lack a role.
    """
    at = {role: prompts.where(role).cpu() for role in {node.role for node in nodes}}
    last = prompts.where(ANSWER_POSITION).cpu()
    so_far = {role: where.cumsum(1) > 0 for role, where in at.items()}
    shares = {(a, b): bool((at[a] & at[b]).any()) for a in at for b in at}
    reads = {(a, b): bool((so_far[a] & at[b]).any()) for a in at for b in at}
    edges: list[Edge] = []
    for sender in nodes:
        for receiver in nodes:
            if receiver.head is None or sender.layer >= receiver.layer:
                continue
            roles = (sender.role, receiver.role)
            if shares[roles]:
                edges.append(Edge(sender, receiver, "q"))
            if reads[roles]:
                edges += [Edge(sender, receiver, "k"), Edge(sender, receiver, "v")]
        if bool((at[sender.role] & last).any()):
            edges.append(Edge(sender, None, "logits"))
    return edges


def _until_the_top_is_exact(
    model: Model, pairs: AlignedPairs, edges: Sequence[Edge], top_n: int, how: dict[str, Any]
) -> tuple[Tensor, Tensor, list[bool]]:
    """Values of the clean run, per-example scores, and which of them are exact."""
    change = how["metric"].change
    clean, estimates = shared_out(pairs, lambda some: estimated_values(model, some, edges, **how))
    values = estimates[0]
    # To first order in the score, too.
    with torch.enable_grad():
        at = clean.detach().requires_grad_()
        (slope,) = torch.autograd.grad(change(at, clean).sum(), at)
    per_example = (values - clean) * slope
    exact = [edge.receiver is None for edge in edges]
    known = [i for i, was in enumerate(exact) if was]
    per_example[known] = change(values[known], clean)
    # Of either sign in each pair: what cancels in the mean of estimates need not in truth.
    sizes = (estimates - clean).abs().mean(-1).double().cpu().numpy()
    best_rank = average_ranks(-sizes).min(0)
    by_estimate = np.lexsort((-sizes.max(0), best_rank)).tolist()
    top: set[int] = set()
    while True:
        strongest = per_example.mean(-1).abs().argsort(descending=True, stable=True).tolist()
        before, top = top, set(strongest[:top_n])
        wanted = [i for i in by_estimate if not exact[i]][:top_n] if top != before else []
        wanted = wanted or [i for i in strongest[:top_n] if not exact[i]]
        if not wanted:
            return clean, per_example, exact
        some = [edges[i] for i in wanted]
        _, run = shared_out(pairs, lambda p, e=some: exact_engine.edge_values(model, p, e, **how))
        per_example[wanted] = change(run, clean)
        for i in wanted:
            exact[i] = True


def check_nodes(model: Model, nodes: Sequence[Node]) -> None:
    """Make sure that the model has these heads and MLPs.

    Raises:
        InputError: if it lacks one.
    """
    check_heads(model, [Head(node.layer, node.head) for node in nodes if node.head is not None])
    for node in nodes:
        if not 0 <= node.layer < model.cfg.n_layers:
            raise InputError(f"The model has no {node}; it has {model.cfg.n_layers} layers.")


def _along_the_prompt(nodes: Sequence[Node], prompts: PromptBatch) -> tuple[str, ...]:
    """The nodes' roles, in the order of their first tokens, over all prompts."""
    first = {
        role: prompts.first_token(role).float().mean().item()
        for role in dict.fromkeys(node.role for node in nodes)
    }
    return tuple(sorted(first, key=lambda role: first[role]))
