"""What can be planned: the methods of the house, each called as it is called for real."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.path_patching import any_at_answer
from tl_entity.heads import Circuit, Head, HeadsAt, heads_by_position
from tl_entity.hooks.path_patching import Senders
from tl_entity.hooks.points import HeadInput, hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.methods.circuits import BATCH_SIZE, evaluate_circuits
from tl_entity.methods.cmap import cmap_each
from tl_entity.methods.dcm import learn_mask
from tl_entity.methods.knockout import knock_out_attention
from tl_entity.methods.masked_forward import MaskedForward
from tl_entity.methods.path_patching import path_patch, path_patch_mlps
from tl_entity.metrics import RELATIVE_PROBABILITY, Metric
from tl_entity.planning.meta import Stand
from tl_entity.planning.operations import Tally
from tl_entity.tasks.batches import PairBatch, PromptBatch


class Count(NamedTuple):
    """What a job takes on the exact engine, and how much plain hooks would run.

    Attributes:
        tally: what is computed.
        cache_bytes: recorded activations, at most at a time.
        chunk_bytes: what the most memory is beyond these.
        hooks_passes: runs of all prompts that plain hooks need for the same numbers; a backward
            pass counts as one more. 0 where nobody said.
        hooks_operations: what these compute.
    """

    tally: Tally
    cache_bytes: int
    chunk_bytes: int
    hooks_passes: int
    hooks_operations: int


class Job(ABC):
    """Something that the exact engine is asked for."""

    @abstractmethod
    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        """Do it, within this much memory for intermediate results."""

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        """Runs of all prompts that plain hooks need, and their operations."""
        return 0, 0

    def count(
        self,
        like: Stand | HookedTransformer | HookedTransformerConfig,
        pairs: PairBatch,
        memory: int,
    ) -> Count:
        """What it takes for these prompts, found by doing it on a model without weights.

        Raises:
            InputError: as the method that does it; or if the model is a mixture of experts.
        """
        pairs = pairs.to("cpu")
        longest = max(prompts.tokens.shape[1] for prompts in (pairs.clean, pairs.corrupt))
        stand = like if isinstance(like, Stand) else Stand.of(like, longest)
        with stand.run() as run:
            self.run(stand.model, pairs, memory)
        cache = run.cache_peak
        return Count(run.tally, cache, run.peak - cache, *self.plain(stand, pairs))


@dataclass(frozen=True)
class PathPatching(Job):
    """Path patching of every sender: `path_patch`, or `path_patch_mlps`.

    Attributes:
        position: where senders and receivers are.
        receivers: heads whose input is patched, or heads by which of their inputs are patched
            together; None for the logits.
        receiver_input: q, k or v of the heads; None for the logits or of heads by input.
        senders: every head, or every layer's MLP.
        metric: how runs are scored.
        batch_size: pairs run together; what the engine would choose if left out.
    """

    position: str
    receivers: tuple[Head, ...] | Mapping[HeadInput, tuple[Head, ...]] | None = None
    receiver_input: HeadInput | None = None
    senders: Senders = "heads"
    metric: Metric = RELATIVE_PROBABILITY
    batch_size: int | None = None

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        patch = path_patch if self.senders == "heads" else path_patch_mlps
        return patch(
            model,
            pairs,
            position=self.position,
            receivers=self.receivers,
            receiver_input=self.receiver_input,
            metric=self.metric,
            batch_size=self.batch_size,
            memory=memory,
        )

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        cfg = stand.model.cfg
        top = cfg.n_layers
        if isinstance(self.receivers, Mapping):
            heads = [head for some in self.receivers.values() for head in some]
        else:
            heads = list(self.receivers or ())
        if self.receivers is not None:
            top = max((head.layer for head in heads), default=0)
        elif not any_at_answer(pairs, self.position):
            top = 0
        senders = top * (cfg.n_heads if self.senders == "heads" else 1)
        # The run that outputs are held at, the corrupt one, and the clean one that is scored.
        once = _recorded(stand, pairs.clean) + _recorded(stand, pairs.corrupt)
        scored = _answered(stand, pairs.clean)
        # To read the receivers' input; with every layer's heads held, all layers are run.
        reading = senders if self.receivers is not None else 0
        operations = once + scored * (1 + senders) + reading * _recorded(stand, pairs.clean)
        return 3 + senders + reading, operations


@dataclass(frozen=True)
class CircuitEvaluation(Job):
    """F(C) of many circuits: `evaluate_circuits`.

    Attributes:
        circuits: heads kept, by named position.
        batch_size: prompts run together.
    """

    circuits: tuple[Circuit | HeadsAt, ...]
    batch_size: int = BATCH_SIZE

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        cfg = model.cfg
        sizes = (cfg.n_layers, pairs.clean.tokens.shape[1], cfg.n_heads, cfg.d_head)
        values = torch.zeros(sizes, dtype=cfg.dtype, device=model.W_E.device)
        return evaluate_circuits(
            model,
            pairs.clean,
            self.circuits,
            mean_outputs=values,
            batch_size=self.batch_size,
            memory=memory,
        )

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        passes = len(self.circuits)
        return passes, passes * _answered(stand, pairs.clean)


@dataclass(frozen=True)
class MaskTraining(Job):
    """Training a mask without validation: `learn_mask`.

    Attributes:
        candidates: the heads that may be selected.
        position: named position of their outputs.
        epochs: how many times the pairs are gone through.
        batch_size: pairs a step.
    """

    candidates: tuple[Head, ...]
    position: str
    epochs: int = 2
    batch_size: int = BATCH_SIZE

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        return learn_mask(
            model,
            pairs,
            self.candidates,
            position=self.position,
            epochs=self.epochs,
            batch_size=self.batch_size,
            memory=memory,
        )

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        heads, at = self.candidates, self.position
        masked = MaskedForward(stand.model, heads, position=at, engine="hooks")
        with stand.run() as recording:
            recorded = masked.record(pairs)
        with stand.run() as step, torch.enable_grad():
            masked.run(recorded, masked.mask).sum().backward()
        once, each = (run.tally.total_operations for run in (recording, step))
        return 2 * self.epochs + 1, once + self.epochs * each


@dataclass(frozen=True)
class CrossModelPatching(Job):
    """Patching heads from another model of the same sizes: `cmap_each`.

    Attributes:
        choices: heads, and what of them is patched.
        batch_size: prompts run together.
    """

    choices: tuple[tuple[Circuit | HeadsAt, str], ...]
    batch_size: int = BATCH_SIZE

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        return cmap_each(
            model,
            model,
            pairs.clean,
            self.choices,
            batch_size=self.batch_size,
            memory=memory,
        )

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        heads = [h for c, _ in self.choices for some in heads_by_position(c).values() for h in some]
        top = 1 + max((head.layer for head in heads), default=-1)
        n = len(self.choices)
        other = _recorded(stand, pairs.clean, top)
        return n + 1, n * _answered(stand, pairs.clean) + other


@dataclass(frozen=True)
class Knockouts(Job):
    """Attention from a position taken away, from each layer of the model up in turn:
    `knock_out_attention`. What is hidden from it makes no difference to what it takes.

    Attributes:
        from_position: named position of the token that looks.
        batch_size: prompts run together.
    """

    from_position: str
    batch_size: int = BATCH_SIZE

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        return knock_out_attention(
            model,
            pairs.clean,
            from_position=self.from_position,
            to_position=self.from_position,
            batch_size=self.batch_size,
            memory=memory,
        )

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        passes = 1 + stand.model.cfg.n_layers
        return passes, passes * _answered(stand, pairs.clean)


@dataclass(frozen=True)
class Method(Job):
    """Any method, as `Method(lambda model, pairs, memory: evaluate(model, pairs.clean))`.

    Attributes:
        call: calls it. Numbers that it reads off the model are zero in a plan: what it does next
            should not depend on them.
        hooks_passes: runs of all prompts that plain hooks need for the same.
    """

    call: Callable[[HookedTransformer, PairBatch, int | None], object]
    hooks_passes: int = field(default=0, kw_only=True)

    def run(self, model: HookedTransformer, pairs: PairBatch, memory: int | None) -> object:
        return self.call(model, pairs, memory)

    def plain(self, stand: Stand, pairs: PairBatch) -> tuple[int, int]:
        return self.hooks_passes, self.hooks_passes * _answered(stand, pairs.clean)


@checked
def mask_steps(
    candidates: Sequence[Head],
    *,
    position: str,
    epochs: int = 2,
    batch_size: int = BATCH_SIZE,
) -> MaskTraining:
    """Training a mask on `candidates` (DCM): both recorded runs, and all steps.

    Raises:
        InputError: if there are no candidates.
    """
    if not candidates:
        raise InputError("There are no candidate heads to learn a mask for.")
    return MaskTraining(tuple(candidates), position, epochs, batch_size)


@checked
def cross_model_patching(
    choices: Sequence[tuple[Circuit | HeadsAt, str]], *, batch_size: int = BATCH_SIZE
) -> CrossModelPatching:
    """Patching heads from another model of the same sizes (CMAP), each choice by itself.

    Args:
        choices: heads, and what of them is patched: "output", or letters of q, k and v.
        batch_size: prompts run together.
    """
    return CrossModelPatching(tuple(choices), batch_size)


@checked
def knockouts(
    cfg: HookedTransformerConfig, *, from_position: str, batch_size: int = BATCH_SIZE
) -> Knockouts:
    """Attention from a position taken away, from each layer of the model up in turn."""
    return Knockouts(from_position, batch_size)


@torch.no_grad()
def _recorded(stand: Stand, prompts: PromptBatch, layers: int | None = None) -> int:
    """Operations of a run of whole prompts up to a layer, without logits."""
    model = stand.model
    layers = model.cfg.n_layers if layers is None else layers
    points = {hook_point("resid_post", layer): None for layer in range(layers)}
    with stand.run() as run:
        if points:
            record(model, prompts, points)
    return run.tally.total_operations


@torch.no_grad()
def _answered(stand: Stand, prompts: PromptBatch) -> int:
    """Operations of a run of whole prompts with the logits at the answer's token."""
    with stand.run() as run:
        answer_logits(stand.model, prompts)
    return run.tally.total_operations
