"""The mechanism that was found: its nodes, how it answers alone, and the curve it stands on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head, Node
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.hooks.gates import Gates
from tl_entity.methods.ablations import (
    BATCH_SIZE,
    index_ablation,
    pooled_ablation,
    resample_ablation,
    zero_ablation,
)
from tl_entity.methods.gated_forward import GatedForward, Loss, NodesEvaluation
from tl_entity.methods.path_patching import Engine
from tl_entity.methods.random_circuits import random_nodes
from tl_entity.metrics import LOG_PROBABILITY, Metric
from tl_entity.results import ROWS_SHOWN, Result
from tl_entity.tasks.batches import PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


class PriceStep(NamedTuple):
    """Where the training of gates stood after the steps at one price.

    Attributes:
        price: of all nodes together.
        loss: mean of the steps, without the price.
        n_nodes: gates above one half.
        faithfulness: of these nodes on the choosing prompts.
        agreement: of these nodes on the choosing prompts.
        reached: whether the lower ends of both intervals reached their targets.
    """

    price: float
    loss: float
    n_nodes: int
    faithfulness: float
    agreement: float
    reached: bool


@checked
@dataclass(frozen=True)
class Mechanism(Result):
    """The fewest nodes found that alone answer as the whole model does.

    All evaluations are of prompts that had no part in finding it, but for `prices`.

    Attributes:
        nodes: the nodes, by layer, role and head.
        found: how they answer alone.
        curve: the same for other sizes, from no node to all. Smaller ones are the mechanism's nodes
            that lasted longest as the price rose, larger ones have the others that did.
        random: as many nodes of the same layers and roles, drawn at random, one for each draw.
        circuit: the circuit that was given to be compared, alone; None if none was.
        target: what the lower end of faithfulness had to reach on the choosing prompts.
        agreement_target: the same of agreement.
        roles: of the prompts, in the order of `strength`.
        knowing: those of them that depend on what is asked. If there are any, the mechanism is told
            where to look, and its faithfulness proves nothing.
        n_layers: of the model.
        n_heads: of each layer.
        with_mlps: whether MLPs are nodes; else they always are themselves.
        scores: of each node, in the order of `Gates.all_nodes`: about what the metric gains by it.
        strength: mean of each node's gate over the prices tried.
        prices: how the training went.
        metric: name of the metric.
        loss: what gates were trained on.
        ablation: what ablated nodes put out.
        seed: of the split, the order of prompts and the draws.
        n_training: prompts that gates were trained on.
        n_choosing: prompts that the size was chosen by.
        prompts: fingerprint of all prompts.
        engine: what ran the model.
    """

    nodes: tuple[Node, ...]
    found: NodesEvaluation
    curve: tuple[NodesEvaluation, ...]
    random: tuple[NodesEvaluation, ...]
    circuit: NodesEvaluation | None
    target: float
    agreement_target: float
    roles: tuple[str, ...]
    knowing: tuple[str, ...]
    n_layers: int
    n_heads: int
    with_mlps: bool
    scores: Float[Tensor, " node"]
    strength: Float[Tensor, " node"]
    prices: tuple[PriceStep, ...]
    metric: str
    loss: Loss
    ablation: AblationKind
    seed: int
    n_training: int
    n_choosing: int
    prompts: str
    engine: Engine

    def __len__(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        told = " told where to look" if self.knowing else ""
        return (
            f"{len(self)} of {self.n_all} nodes{told}, {self.ablation} ablation: faithfulness "
            f"{self.found.faithfulness.value:.3f} {self.found.faithfulness.interval}, agreement "
            f"{self.found.agreement:.3f} {self.found.agreement_interval}, KL "
            f"{self.found.mean_kl:.4f} on {len(self.found)} other prompts"
        )

    @property
    def n_all(self) -> int:
        """How many nodes there are to choose from."""
        return len(self.scores)

    @property
    def cpr(self) -> float:
        """Integrated circuit performance ratio: the area under faithfulness over the share of nodes
        kept, as MIB reports it (Mueller et al. 2025, arXiv 2504.13151). Higher is better.

        Faithfulness here is (m(C) - m(none)) / (m(all) - m(none)) of the mean metric m, and the
        area is taken by trapezoids between the sizes of the curve, 0 and all among them. MIB's
        circuits are of edges; these are of nodes, so the two are not to be compared as numbers.
        """
        return self._area(lambda ratio: ratio)

    @property
    def cmd(self) -> float:
        """Integrated circuit-model distance: the area between that curve and 1, as MIB reports it.
        0 is best."""
        return self._area(lambda ratio: np.abs(1 - ratio))

    def _area(self, of_ratio: Callable[[np.ndarray], np.ndarray]) -> float:
        by_size = {point.n_nodes: float(point.value.double().mean()) for point in self.curve}
        whole, none = float(self.found.whole_value.double().mean()), by_size[0]
        if whole == none:
            return math.nan
        sizes = np.array(sorted(by_size))
        ratio = np.array([(by_size[int(n)] - none) / (whole - none) for n in sizes])
        heights = of_ratio(ratio)
        return float(((heights[1:] + heights[:-1]) / 2 * np.diff(sizes / self.n_all)).sum())

    @property
    def gates(self) -> Gates:
        """Which node is which in `scores` and `strength`; the mechanism's are at 1."""
        shape = SimpleNamespace(
            n_layers=self.n_layers, n_heads=self.n_heads, dtype=torch.float32, device="cpu"
        )
        return Gates.keeping(self.nodes, shape, self.roles, mlps=self.with_mlps)

    @checked
    def evaluate(
        self,
        model: Model,
        prompts: PromptBatch | PairBatch,
        *,
        ablation: Ablation | None = None,
        metric: Metric = LOG_PROBABILITY,
        engine: Engine = "exact",
        batch_size: int = BATCH_SIZE,
        memory: int | None = None,
    ) -> NodesEvaluation:
        """How a model answers prompts with the mechanism's nodes left; it may be another model,
        such as a fine-tune of the one it was found in.

        Args:
            model: the model.
            prompts: the prompts, with roles of the same names.
            ablation: what ablated nodes put out. Left out, one of the kind that the mechanism was
                found with, made of this model and these very prompts.
            metric: what is read off the answers besides.
            engine: "exact", or "hooks" for plain runs.
            batch_size: prompts run together, at most.
            memory: bytes that intermediate results may take; found from the device if left out.

        Raises:
            InputError: if the model has other layers or heads than the one it was found in, the
                prompts have no roles or lack an answer, or the ablation does not fit them.
        """
        how: dict[str, Any] = {
            "metric": metric,
            "engine": engine,
            "batch_size": batch_size,
            "memory": memory,
        }
        return self._run(model, prompts, ablation, 0, how)[0]

    @checked
    def evaluate_beside_random(
        self,
        model: Model,
        prompts: PromptBatch | PairBatch,
        *,
        n_random: int = 3,
        ablation: Ablation | None = None,
        batch_size: int = BATCH_SIZE,
        memory: int | None = None,
    ) -> tuple[NodesEvaluation, ...]:
        """The same, and after it draws of as many random nodes of the same layers and roles, on the
        same recorded prompts. Where a mechanism has most heads of a layer, so have they, and what
        it keeps in another model says little beside them.

        Args:
            model: as in `evaluate`.
            prompts: as in `evaluate`.
            n_random: how many draws.
            ablation: as in `evaluate`.
            batch_size: as in `evaluate`.
            memory: as in `evaluate`.

        Raises:
            InputError: as `evaluate`.
        """
        how: dict[str, Any] = {"batch_size": batch_size, "memory": memory}
        return tuple(self._run(model, prompts, ablation, n_random, how))

    def _run(
        self,
        model: Model,
        prompts: PromptBatch | PairBatch,
        ablation: Ablation | None,
        n_random: int,
        how: dict[str, Any],
    ) -> list[NodesEvaluation]:
        if (model.cfg.n_layers, model.cfg.n_heads) != (self.n_layers, self.n_heads):
            raise InputError(
                f"The mechanism was found in a model of {self.n_layers} layers of {self.n_heads} "
                f"heads; this one has {model.cfg.n_layers} of {model.cfg.n_heads}."
            )
        if ablation is None:
            others = prompts.clean if isinstance(prompts, PairBatch) else prompts
            ablation = self._same_ablation(model, others, how["batch_size"])
        forward = GatedForward.of(model, ablation, **how)
        gates = Gates.keeping(self.nodes, model.cfg, self.roles, mlps=self.with_mlps)
        drawn = random_nodes(gates, self.nodes, n_random, seed=self.seed)
        each = [gates, *(gates.with_values(values) for values in drawn)]
        return forward.evaluate(forward.record(prompts), each, seed=self.seed)

    def _same_ablation(self, model: Model, prompts: PromptBatch, batch_size: int) -> Ablation:
        how: dict[str, Any] = {"batch_size": batch_size}
        if self.ablation == "zero":
            return zero_ablation()
        if self.ablation == "index":
            return index_ablation(model, prompts, **how)
        if self.ablation == "pooled":
            return pooled_ablation(model, prompts, mlps=self.with_mlps, **how)
        return resample_ablation(model, prompts, seed=self.seed, mlps=self.with_mlps, **how)

    def to_circuit(self) -> Circuit:
        """Its heads, in groups by role: `evaluate(model, prompts, keep=circuit, ablation=...)`
        keeps them at all tokens of these roles.

        Raises:
            InputError: if MLPs are nodes: a circuit has heads alone, and leaves MLPs themselves.
        """
        if self.with_mlps:
            raise InputError(
                "A circuit has heads alone, and of this mechanism MLPs are nodes too; evaluate it "
                "with mechanism.evaluate."
            )
        by_role = {
            role: tuple(
                Head(node.layer, node.head)
                for node in self.nodes
                if node.role == role and node.head is not None
            )
            for role in self.roles
        }
        return Circuit(tuple(Group(role, role, heads) for role, heads in by_role.items() if heads))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each set of nodes that was left alone: the mechanism, other sizes, random
        nodes, the circuit given; with 95 % intervals."""
        import pandas as pd

        sets: list[tuple[str, NodesEvaluation]] = [("mechanism", self.found)]
        sets += [("curve", point) for point in self.curve]
        sets += [("random", point) for point in self.random]
        sets += [] if self.circuit is None else [("circuit", self.circuit)]
        return pd.DataFrame([{"nodes": name, **_numbers(point)} for name, point in sets])

    def nodes_dataframe(self) -> "pd.DataFrame":
        """One row a node, kept or not: its score, its strength and whether it is of the
        mechanism; the strongest first."""
        import pandas as pd

        kept = set(self.nodes)
        frame = pd.DataFrame(
            [
                {"node": str(node), "layer": node.layer, "head": node.head, "role": node.role}
                for node in self.gates.all_nodes
            ]
        )
        frame["kept"] = [node in kept for node in self.gates.all_nodes]
        frame["strength"], frame["score"] = self.strength.tolist(), self.scores.tolist()
        order = ["kept", "strength", "score"]
        ranked: pd.DataFrame = frame.sort_values(order, ascending=False, kind="stable")
        return ranked

    def table(self, n: int | None = ROWS_SHOWN) -> "pd.DataFrame":
        """The mechanism's strongest nodes."""
        frame = self.nodes_dataframe()
        rows = frame.loc[frame["kept"]].drop(columns="kept")
        return rows if n is None else rows.head(n)

    def plot(self, *, title: str | None = None) -> "go.Figure":
        """Faithfulness, agreement and KL over the number of nodes, with 95 % intervals; beside the
        curve random nodes of the same layers and roles, and the circuit that was given."""
        from tl_entity.plots.bars import Bar
        from tl_entity.plots.mechanism import size_panels

        def bar(point: NodesEvaluation, name: str) -> Bar:
            value, interval = point.measured[name]
            return Bar(value, *interval)

        series = {"fewest nodes": self.curve, "random nodes": self.random}
        if self.circuit is not None:
            series["circuit"] = (self.circuit,)
        panels = {
            name: {
                label: [(point.n_nodes, bar(point, name)) for point in points]
                for label, points in series.items()
            }
            for name in ("faithfulness", "agreement", "KL")
        }
        return size_panels(panels, chosen=len(self), title=str(self) if title is None else title)

    def map(self, *, title: str | None = None) -> "go.Figure":
        """Which heads act where: layers up, roles along, the heads written in."""
        from tl_entity.plots.mechanism import node_map

        roles = [role for role in self.roles if any(node.role == role for node in self.nodes)]
        return node_map(
            [(role, self._at(role)) for role in roles],
            self.n_layers,
            title=f"{len(self)} of {self.n_all} nodes" if title is None else title,
        )

    @checked
    def on_prompt(
        self,
        prompts: PromptBatch,
        tokenizer: PreTrainedTokenizerBase,
        *,
        row: int = 0,
        title: str | None = None,
    ) -> "go.Figure":
        """The same over the words of a prompt: what is used at each.

        Raises:
            InputError: if the prompts have no roles.
        """
        from tl_entity.plots.mechanism import node_map

        if prompts.roles is None:
            raise InputError("What is used at a word goes by its role, and the prompts have none.")
        there = prompts.mask[row]
        words = [str(tokenizer.decode([token])) for token in prompts.tokens[row][there].tolist()]
        names = [prompts.role_names[role] for role in prompts.roles[row][there].tolist()]
        return node_map(
            [(word, self._at(name)) for word, name in zip(words, names, strict=True)],
            self.n_layers,
            title=f"{len(self)} of {self.n_all} nodes" if title is None else title,
        )

    def _at(self, role: str) -> list[Node]:
        return [node for node in self.nodes if node.role == role]


def _numbers(point: NodesEvaluation) -> dict[str, float]:
    numbers: dict[str, float] = {"n_nodes": point.n_nodes}
    for name, (value, interval) in point.measured.items():
        numbers |= {name: value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {**numbers, point.metric: float(point.value.double().mean())}
