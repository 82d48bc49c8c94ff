"""A model with a gate on every node: gradients of the gates, and answers with some nodes left."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_entity._model import Model, frozen
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.blocks import check_supported, unembed
from tl_entity.exact.gated import GatedRun, activation_bytes
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.heads import Circuit
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.gates import Gates, gate_nodes
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.ablations import BATCH_SIZE
from tl_entity.methods.circuits import Evaluation, Faithfulness
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import LOG_PROBABILITY, Metric, divergence, log_probability
from tl_entity.ranks import share_of, shared_out, summed
from tl_entity.results import Result
from tl_entity.stats import Interval, mean_intervals, wilson_interval
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch

if TYPE_CHECKING:
    import pandas as pd

Loss = Literal["kl", "metric"]
"""What gates are trained on: divergence from the whole model's answers, or minus the metric."""


@checked
@dataclass(frozen=True)
class NodesEvaluation(Result):
    """How a model answers prompts with some nodes left and all others ablated.

    Attributes:
        n_nodes: how many are left.
        alone: the answers.
        whole: those of the whole model.
        kl: Kullback-Leibler divergence of the answers' distribution from the whole model's, in
            nats.
        metric: name of the metric.
        value: its value for each prompt.
        whole_value: that of the whole model.
        seed: of the bootstrap.
    """

    n_nodes: int
    alone: Evaluation
    whole: Evaluation
    kl: Float[Tensor, " batch"]
    metric: str
    value: Float[Tensor, " batch"]
    whole_value: Float[Tensor, " batch"]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.alone)

    def __str__(self) -> str:
        return (
            f"{self.n_nodes} nodes: accuracy {self.alone.accuracy:.3f} of the model's "
            f"{self.whole.accuracy:.3f}, faithfulness {self.faithfulness.value:.3f} "
            f"{self.faithfulness.interval}, agreement {self.agreement:.3f} "
            f"{self.agreement_interval}, KL {self.mean_kl:.4f} {self.kl_interval}; "
            f"{len(self)} prompts"
        )

    @property
    def faithfulness(self) -> Faithfulness:
        """Accuracy over the whole model's. Above 1, the ablation also took away what hinders."""
        return Faithfulness.of(self.alone, self.whole, seed=self.seed)

    @property
    def agreement(self) -> float:
        """Share of prompts answered with the token that the whole model answers, right or not."""
        return self._n_agreeing / len(self)

    @property
    def agreement_interval(self) -> Interval:
        """Wilson's 95 % interval of that share."""
        return wilson_interval(self._n_agreeing, len(self))

    @property
    def mean_kl(self) -> float:
        """Mean divergence from the whole model's distribution, in nats."""
        return float(self.kl.double().mean())

    @property
    def kl_interval(self) -> Interval:
        """Normal 95 % interval of that mean; no divergence is below zero."""
        low, high = mean_intervals(self.kl.double().cpu().numpy())
        return Interval(max(0.0, float(low)), float(high))

    @property
    def _n_agreeing(self) -> int:
        return int((self.alone.predicted == self.whole.predicted).sum())

    def of_whole(self, n_nodes: int) -> "NodesEvaluation":
        """The same of the whole model, which has so many nodes."""
        return replace(
            self,
            n_nodes=n_nodes,
            alone=self.whole,
            kl=torch.zeros_like(self.kl),
            value=self.whole_value,
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for each thing measured, with its interval."""
        import pandas as pd

        measured = {
            **self.measured,
            "accuracy of the whole model": (self.whole.accuracy, self.whole.interval),
        }
        return pd.DataFrame(
            [
                {"of": name, "value": value, "low": low, "high": high}
                for name, (value, (low, high)) in measured.items()
            ]
        )

    @property
    def measured(self) -> dict[str, tuple[float, Interval]]:
        """Accuracy, faithfulness, agreement and KL, each with its 95 % interval."""
        ratio = self.faithfulness
        return {
            "accuracy": (self.alone.accuracy, self.alone.interval),
            "faithfulness": (ratio.value, ratio.interval),
            "agreement": (self.agreement, self.agreement_interval),
            "KL": (self.mean_kl, self.kl_interval),
        }


@dataclass(frozen=True)
class RecordedPrompts:
    """Prompts and what the whole model answers to them; made by `GatedForward.record`.

    Attributes:
        pairs: the prompts as clean prompts of pairs, for metrics to read.
        whole: the whole model's final residual stream at `"last"`, or on the hooks engine its
            logits there.
    """

    pairs: PairBatch
    whole: Float[Tensor, "batch logits"]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice | Tensor) -> "RecordedPrompts":
        """Some of the prompts."""
        return RecordedPrompts(self.pairs[rows], self.whole[rows])


@dataclass(frozen=True)
class GatedForward:
    """How a model is run with gates on its nodes.

    Attributes:
        model: the model.
        ablation: what ablated nodes put out, in the model's shape.
        metric: what is read off the answers besides.
        engine: "exact" or "hooks".
        batch_size: prompts run together, at most.
        memory: bytes that intermediate results may take.
    """

    model: Model
    ablation: Ablation
    metric: Metric
    engine: Engine
    batch_size: int
    memory: int

    @classmethod
    @checked
    def of(
        cls,
        model: Model,
        ablation: Ablation,
        *,
        metric: Metric = LOG_PROBABILITY,
        engine: Engine = "exact",
        batch_size: int = BATCH_SIZE,
        memory: int | None = None,
    ) -> "GatedForward":
        """Make sure that the engine and the ablation fit the model.

        Raises:
            InputError: if one of them does not.
        """
        if engine == "exact":
            check_supported(model)
        if batch_size < 1:
            raise InputError(f"The batch size must be at least 1, not {batch_size}.")
        memory = memory_budget(model.cfg.device) if memory is None else memory
        ablation = ablation.of_model(model.cfg)
        return cls(model, ablation, metric, engine, batch_size, memory)

    def in_bfloat16(self) -> "GatedForward":
        """The same of a copy of the model in bfloat16."""
        copied = copy.deepcopy(self.model)
        copied.cfg.dtype = torch.bfloat16
        return replace(self, model=nn.Module.to(copied, torch.bfloat16))

    @checked
    @torch.no_grad()
    def record(self, prompts: PromptBatch | PairBatch) -> RecordedPrompts:
        """Run the whole model on the prompts, once for any number of gates.

        Raises:
            InputError: if a prompt has no answer, or the ablation does not fit them.
        """
        pairs = prompts
        if isinstance(pairs, PromptBatch):
            pairs = PairBatch(pairs, pairs, pairs.answers)
        if bool((pairs.targets < 0).any()):
            raise InputError("Some prompts have no answer, so there is nothing to be faithful to.")
        self.ablation.rows(pairs.clean)
        pairs = pairs.to(self.model.cfg.device or "cpu")

        def compute(some: PairBatch) -> tuple[Tensor, ...]:
            found = halving(some, self.batch_size, lambda chunk: self._run_whole(chunk.clean))
            return (torch.cat([whole for _, whole in found]).T,)

        (whole,) = shared_out(pairs, compute)
        return RecordedPrompts(pairs, whole.T)

    def _run_whole(self, prompts: PromptBatch) -> Tensor:
        if self.engine == "hooks":
            return answer_logits(self.model, prompts)
        point = hook_point("resid_post", self.model.cfg.n_layers - 1)
        return record(self.model, prompts, {point: ANSWER_POSITION})[point]

    def whole_logits(self, recorded: RecordedPrompts) -> Float[Tensor, "batch d_vocab"]:
        """The logits of the whole model's answers."""
        return recorded.whole if self.engine == "hooks" else unembed(self.model, recorded.whole)

    def answer_logits(self, prompts: PromptBatch, gates: Gates) -> Float[Tensor, "batch d_vocab"]:
        """Logits at `"last"` with gates on the nodes; gradients reach the gates."""
        with frozen(self.model):
            if self.engine == "hooks":
                hooks = gate_nodes(gates, self.ablation, prompts)
                return answer_logits(self.model, prompts, hooks)
            run = GatedRun.prepare(self.model, prompts, self.ablation)
            return unembed(self.model, run.answer_resid(gates, memory=self.memory))

    def _logits_each(self, prompts: PromptBatch, each: Sequence[Gates]) -> Iterable[Tensor]:
        if self.engine == "hooks":
            return (self.answer_logits(prompts, gates) for gates in each)
        run = GatedRun.prepare(self.model, prompts, self.ablation)
        resid = run.answer_resid_each(each, memory=self.memory)
        return (unembed(self.model, final) for final in resid)

    def gradient(
        self, recorded: RecordedPrompts, gates: Gates, loss: Loss
    ) -> tuple[float, Float[Tensor, " node"]]:
        """The mean loss over the prompts, and its gradient with respect to all gates, in the order
        of `Gates.flat`; processes share the prompts.

        Raises:
            InputError: if they are not finite.
        """
        values = gates.flat().detach().requires_grad_()
        share = share_of(len(recorded))
        mine = recorded[share.rows]

        def compute(some: RecordedPrompts) -> Tensor:
            each = self._losses(some, gates.with_values(values), loss)
            (gradient,) = torch.autograd.grad(each.sum(), values)
            return torch.cat([gradient, each.detach().sum()[None].to(gradient)])

        found = torch.zeros(len(values) + 1, dtype=values.dtype, device=values.device)
        for _, part in halving(mine, self._gradient_rows(recorded), compute):
            found = found + part
        found = summed(found if share.n else torch.zeros_like(found)) / len(recorded)
        if not bool(found.isfinite().all()):
            raise InputError(
                "The gates' loss or gradient is not finite; look at the model's answers."
            )
        return float(found[-1]), found[:-1]

    def _gradient_rows(self, recorded: RecordedPrompts) -> int:
        length = recorded.pairs.clean.tokens.shape[1]
        each = activation_bytes(self.model.cfg, length)
        return max(1, min(self.batch_size, self.memory // each))

    def _losses(self, some: RecordedPrompts, gates: Gates, loss: Loss) -> Float[Tensor, " batch"]:
        logits = self.answer_logits(some.pairs.clean, gates)
        if loss == "metric":
            return -self.metric.of_logits(logits, some.pairs)
        with torch.no_grad():
            whole = self.whole_logits(some)
        return divergence(whole, logits)

    @torch.no_grad()
    def evaluate(
        self,
        recorded: RecordedPrompts,
        each: Sequence[Gates],
        *,
        seed: int = 0,
        progress: Callable[[int], object] = lambda runs: None,
    ) -> list[NodesEvaluation]:
        """How the model answers with each of these gates.

        Args:
            recorded: the prompts.
            each: gates, of the same roles.
            seed: of the bootstrap.
            progress: called with the number of prompts run since the last call; with a negative
                number for those that must be run once more.
        """
        sizes = [len(gates.nodes) for gates in each]
        return self._evaluate(
            recorded, lambda chunk: self._logits_each(chunk, each), sizes, seed, progress
        )

    @torch.no_grad()
    def evaluate_circuit(
        self, recorded: RecordedPrompts, circuit: Circuit, seed: int = 0
    ) -> NodesEvaluation:
        """The same with only a circuit's heads left, at their positions or roles. MLPs are
        themselves."""
        for heads in circuit.heads_at().values():
            check_heads(self.model, heads)

        def logits_of(chunk: PromptBatch) -> Iterable[Tensor]:
            hooks = ablate_heads(self.ablation, chunk, keep=circuit)
            return [answer_logits(self.model, chunk, hooks)]

        return self._evaluate(recorded, logits_of, [len(circuit)], seed, lambda runs: None)[0]

    def _evaluate(
        self,
        recorded: RecordedPrompts,
        logits_of: Callable[[PromptBatch], Iterable[Tensor]],
        sizes: Sequence[int],
        seed: int,
        progress: Callable[[int], object],
    ) -> list[NodesEvaluation]:
        def compute(some: RecordedPrompts) -> tuple[Tensor, Tensor]:
            whole = self.whole_logits(some)
            rows = [self._read(whole, whole, some)]
            try:
                for logits in logits_of(some.pairs.clean):
                    rows.append(self._read(logits, whole, some))
                    progress(len(some))
            except BaseException:
                progress(-len(some) * (len(rows) - 1))
                raise
            return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows], 1)

        def compute_mine(mine: RecordedPrompts) -> tuple[Tensor, ...]:
            found = [part for _, part in halving(mine, self.batch_size, compute)]
            return tuple(torch.cat(parts, -1) for parts in zip(*found, strict=True))

        chosen, (scores, kl, values) = shared_out(recorded, compute_mine)
        targets = recorded.pairs.targets
        answered = [
            Evaluation(predicted, predicted == targets, score)
            for predicted, score in zip(chosen, scores, strict=True)
        ]
        return [
            NodesEvaluation(
                n_nodes=n,
                alone=answered[i],
                whole=answered[0],
                kl=kl[i],
                metric=self.metric.name,
                value=values[i],
                whole_value=values[0],
                seed=seed,
            )
            for i, n in enumerate(sizes, start=1)
        ]

    def _read(self, logits: Tensor, whole: Tensor, some: RecordedPrompts) -> tuple[Tensor, Tensor]:
        """The most likely token; and the target's log probability, the divergence and the metric,
        one above the other."""
        score = log_probability(logits, some.pairs.targets)
        value = self.metric.of_logits(logits, some.pairs).to(score)
        measured = torch.stack([score, divergence(whole, logits).to(score), value])
        return logits.argmax(-1), measured
