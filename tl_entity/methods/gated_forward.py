"""A model with a gate on every node: gradients of the gates, and answers with some nodes left."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_entity._model import Model, check_takes_gradients, frozen
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.blocks import check_supported, unembed
from tl_entity.exact.gated import GatedRun, activation_bytes
from tl_entity.exact.memory import halving, memory_budget
from tl_entity.finite import check_finite, finite_logits
from tl_entity.heads import Circuit
from tl_entity.hooks.ablations import Ablation
from tl_entity.hooks.edits import ablate_heads
from tl_entity.hooks.gates import Gates, gate_nodes
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.ablations import BATCH_SIZE
from tl_entity.methods.circuits import Evaluation
from tl_entity.methods.gains import scored_pairs
from tl_entity.methods.masked_forward import outside_inference
from tl_entity.methods.nodes_evaluation import NodesEvaluation as NodesEvaluation
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import LOG_PROBABILITY, Metric, divergence, log_probability
from tl_entity.ranks import share_of, shared_out, summed
from tl_entity.tasks.batches import ANSWER_POSITION, PairBatch, PromptBatch

Loss = Literal["kl", "metric"]
"""What gates are trained on: divergence from the whole model's answers, or minus the metric."""


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
    @torch.inference_mode(False)
    @torch.no_grad()
    def record(self, prompts: PromptBatch | PairBatch) -> RecordedPrompts:
        """Run the whole model on the prompts, once for any number of gates.

        Raises:
            InputError: if there are no prompts, one has no answer or a token that the model does
                not know, hooks are attached to the model, or the ablation does not fit them.
            NotFiniteError: if weights or activations are NaN or infinite, naming where.
        """
        pairs = outside_inference(scored_pairs(self.model, prompts))
        self.ablation.rows(pairs.clean)

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
        with guarded(self.model), frozen(self.model):
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

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradient(
        self, recorded: RecordedPrompts, gates: Gates, loss: Loss
    ) -> tuple[float, Float[Tensor, " node"]]:
        """The mean loss over the prompts, and its gradient with respect to all gates, in the order
        of `Gates.flat`; processes share the prompts.

        Raises:
            InputError: if they are not finite, or the model takes no gradients.
        """
        check_takes_gradients(self.model)
        values = gates.flat().detach().requires_grad_()
        share = share_of(len(recorded))
        mine = recorded[share.rows]

        def compute(some: RecordedPrompts) -> Tensor:
            each = self._losses(some, gates.with_values(values), loss)
            (gradient,) = torch.autograd.grad(each.sum(), values)
            return torch.cat([gradient, each.detach().sum()[None].to(gradient)])

        found = torch.zeros(len(values) + 1, dtype=values.dtype, device=values.device)
        # Layers may be computed again on the way back, with weights that take no gradient either.
        with guarded(self.model), frozen(self.model):
            for _, part in halving(mine, self._gradient_rows(recorded), compute):
                found = found + part
        found = summed(found if share.n else torch.zeros_like(found)) / len(recorded)
        check_finite("The gates' gradient, or their loss,", found, "look at the model's answers")
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

    @torch.inference_mode(False)
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

    @torch.inference_mode(False)
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

        with guarded(self.model):
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
        score = log_probability(finite_logits(logits), some.pairs.targets)
        value = self.metric.of_logits(logits, some.pairs).to(score)
        measured = torch.stack([score, divergence(whole, logits).to(score), value])
        return logits.argmax(-1), measured
