"""DCM: which heads carry a piece of information, by a mask that is trained on the heads alone.

Desiderata-based component masking (Davies et al. 2023; Prakash et al. 2024, §4.1). Each candidate
head's output at one position is m * base + (1 - m) * counterfactual, and m is trained for the base
run to answer what it would with the counterfactual's information, at a price for every head taken.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.memory import memory_budget
from tl_entity.heads import Head
from tl_entity.hooks.vocabulary import check_pairs
from tl_entity.methods.circuits import BATCH_SIZE, Evaluation
from tl_entity.methods.masked_forward import (
    SELECTED_BELOW,
    MaskedForward,
    RecordedPairs,
    selected_heads,
)
from tl_entity.methods.masks import HeadMask as HeadMask
from tl_entity.methods.masks import LearnedMasks as LearnedMasks
from tl_entity.methods.masks import MaskRun as MaskRun
from tl_entity.methods.masks import MaskStep as MaskStep
from tl_entity.methods.path_patching import Engine
from tl_entity.metrics import log_probability
from tl_entity.ranks import Share, gathered, share_of, summed
from tl_entity.tasks.batches import PairBatch

if TYPE_CHECKING:
    pass


@checked
def learn_mask(
    model: Model,
    pairs: PairBatch,
    candidates: Sequence[Head],
    *,
    position: str,
    sparsity: float = 0.01,
    lr: float = 0.1,
    epochs: int = 2,
    batch_size: int = BATCH_SIZE,
    validation: PairBatch | None = None,
    engine: Engine = "exact",
    memory: int | None = None,
    progress: Callable[[MaskStep], object] = lambda step: None,
) -> HeadMask:
    """Find the heads that carry what a desideratum's pairs are about (Prakash et al. 2024, §4.1).

    Each candidate's `hook_z` at the base prompt's position becomes m * base + (1 - m) *
    counterfactual, the counterfactual's read at its own position. The masks begin at 1 and are
    trained by Adam, clamped to [0, 1] before each step, on

        - mean target logit + sparsity * sum of (1 - m)

    over batches of the pairs in their order. The model stays as it is. Clean and counterfactual
    runs are recorded in the first epoch and used again in the next as far as the memory goes.

    Args:
        model: the model.
        pairs: base prompts (clean), counterfactuals (corrupt) and targets to train on.
        candidates: the heads that may be selected.
        position: named position of all of them.
        sparsity: the price of a head taken from the counterfactual.
        lr: Adam's learning rate.
        epochs: how many times the pairs are gone through.
        batch_size: pairs a step.
        validation: other pairs. With them, the mask is kept whose rounded form answers most of
            them with the target, among equals the one with most heads, then the earliest; looked
            at after every step. Without them, the last mask is kept.
        engine: "exact" recomputes only what the mask can change; "hooks" runs the whole model.
        memory: bytes that recorded runs may take; found from the device if left out.
        progress: called after each step.

    Raises:
        InputError: if there are no pairs or candidates, a candidate comes twice or does not exist,
            the prompts lack the position, a pair has no target, the model does not know a token or
            has hooks attached to it, epochs or batch size are below one, or the exact engine does
            not fit the model.
        NotFiniteError: if weights, activations, logits or masks are NaN or infinite, naming where.
    """
    masked = MaskedForward(model, candidates, position=position, engine=engine)
    budget = _Budget(memory_budget(model.cfg.device) if memory is None else memory)
    settings = _Settings(sparsity, lr, epochs)
    train = _Recordings(masked, pairs, batch_size, budget)
    check = None if validation is None else _Recordings(masked, validation, batch_size, budget)
    return _train(masked, train, check, settings, progress)


@checked
def learn_masks(
    model: Model,
    pairs: PairBatch | Callable[[int], PairBatch],
    candidates: Sequence[Head],
    *,
    position: str,
    seeds: Sequence[int],
    sparsities: Sequence[float] = (0.01,),
    lr: float = 0.1,
    epochs: int = 2,
    batch_size: int = BATCH_SIZE,
    engine: Engine = "exact",
    memory: int | None = None,
    progress: Callable[[MaskStep], object] = lambda step: None,
) -> LearnedMasks:
    """Train, choose and test masks for several draws of pairs and several prices of a head.

    Of each draw, half the pairs train, a quarter chooses among the masks on the way, and the rest
    tests the one chosen. Base and counterfactual runs are shared between the sparsities.

    Args:
        model: the model.
        pairs: a function from a seed to pairs, such as `desideratum_draws` makes, for a fresh draw
            each; or pairs that each seed shuffles before they are split.
        candidates: the heads that may be selected.
        position: named position of all of them.
        seeds: one for each draw.
        sparsities: the prices of a head.
        lr: as in `learn_mask`.
        epochs: as in `learn_mask`.
        batch_size: as in `learn_mask`.
        engine: as in `learn_mask`.
        memory: as in `learn_mask`.
        progress: called after each step, the steps counted over all trainings.

    Raises:
        InputError: as `learn_mask`; if there are no seeds or sparsities; or if there are fewer than
            four pairs.
    """
    if not seeds or not sparsities:
        raise InputError("Give at least one seed and one sparsity.")
    masked = MaskedForward(model, candidates, position=position, engine=engine)
    bytes_free = memory_budget(model.cfg.device) if memory is None else memory
    runs: list[MaskRun] = []
    for seed in seeds:
        budget = _Budget(bytes_free)
        drawn = pairs if isinstance(pairs, PairBatch) else pairs(seed)
        check_pairs(model, drawn)
        if isinstance(pairs, PairBatch):
            drawn = _shuffled(drawn, seed)
        parts = [_Recordings(masked, part, batch_size, budget) for part in _split(drawn)]
        train, validation, test = parts
        n_steps = epochs * train.n_batches

        def report(step: MaskStep, n_steps: int = n_steps) -> None:
            done = len(runs) * n_steps
            progress(
                step._replace(step=done + step.step, n_steps=n_steps * len(seeds) * len(sparsities))
            )

        of_all, of_none = (_evaluate(masked, test, taken) for taken in (masked.candidates, ()))
        for sparsity in sparsities:
            settings = _Settings(sparsity, lr, epochs)
            mask = _train(masked, train, validation, settings, report)
            found = _evaluate(masked, test, mask.selected)
            runs.append(MaskRun(seed, mask, found, of_all, of_none))
    return LearnedMasks(tuple(runs))


def training_steps(n_pairs: int, *, epochs: int = 2, batch_size: int = BATCH_SIZE) -> int:
    """Steps of each training in `learn_masks` on draws of so many pairs, half of which train."""
    return epochs * -(-(n_pairs // 2) // batch_size)


class _Settings(NamedTuple):
    sparsity: float
    lr: float
    epochs: int


# Gradients are needed here, whatever mode the caller is in.
@torch.inference_mode(False)
@torch.enable_grad()
def _train(
    masked: MaskedForward,
    train: "_Recordings",
    validation: "_Recordings | None",
    settings: _Settings,
    progress: Callable[[MaskStep], object],
) -> HeadMask:
    for name, number in (("sparsity", settings.sparsity), ("lr", settings.lr)):
        if not math.isfinite(number):
            raise InputError(f"{name} is {number}; give a number.")
    if settings.epochs < 1:
        raise InputError(f"{settings.epochs} epochs train nothing; ask for at least one.")
    n_steps = settings.epochs * train.n_batches
    choice = _Choice(masked, validation)
    losses: list[float] = []
    with torch.no_grad():
        masked.mask.fill_(1)
    optimizer = torch.optim.Adam([masked.mask], lr=settings.lr)
    for _ in range(settings.epochs):
        for recorded, share in train:
            masked.clamp_()
            optimizer.zero_grad()
            loss = _loss(masked, recorded, share, settings.sparsity)
            loss.backward()
            masked.mask.grad = summed(cast(Tensor, masked.mask.grad))
            optimizer.step()
            losses.append(summed(loss.detach()).item())
            choice.look()
            progress(
                MaskStep(len(losses), n_steps, losses[-1], len(masked.selected), settings.sparsity)
            )
    return HeadMask(
        heads=masked.candidates,
        position=masked.position,
        values=choice.masks[choice.best],
        losses=torch.tensor(losses, dtype=masked.mask.dtype),
        trajectory=torch.stack(choice.masks),
        best_step=choice.best,
        validation_correct=None if validation is None else torch.tensor(choice.correct),
        n_validation=0 if validation is None else len(validation),
        sparsity=settings.sparsity,
        engine=masked.engine,
    )


def _loss(
    masked: MaskedForward, recorded: RecordedPairs, share: Share, sparsity: float
) -> Float[Tensor, ""]:
    """What this process adds to the loss: the mean target logit of the batch, negative, and the
    price of the heads."""
    target_logits = masked.run(recorded, masked.mask, tokens=recorded.pairs.targets[:, None])
    mine = target_logits[: share.n].to(masked.mask.dtype).sum()
    price = sparsity * (1 - masked.mask).sum() / len(share.lengths)
    return price - mine / share.n_all


class _Choice:
    """The masks after each step, and which of them to keep."""

    def __init__(self, masked: MaskedForward, validation: "_Recordings | None") -> None:
        self.masks: list[Tensor] = []
        self.correct: list[int] = []
        self.best = 0
        self._masked = masked
        self._validation = validation
        self._known: dict[tuple[Head, ...], int] = {}

    def look(self) -> None:
        """Take down the mask as it is now."""
        mask = self._masked.mask.detach().clamp(0, 1)
        self.masks.append(mask.cpu())
        now = len(self.masks) - 1
        if self._validation is None:
            self.best = now
            return
        # A rounded mask that came before has its count already.
        selected = selected_heads(self._masked.candidates, mask)
        if selected not in self._known:
            found = _evaluate(self._masked, self._validation, selected)
            self._known[selected] = int(found.correct.sum())
        self.correct.append(self._known[selected])
        if self._rank(now) > self._rank(self.best):
            self.best = now

    def _rank(self, step: int) -> tuple[int, int]:
        return self.correct[step], int((self.masks[step] < SELECTED_BELOW).sum())


@torch.no_grad()
def _evaluate(
    masked: MaskedForward, recordings: "_Recordings", taken: Collection[Head]
) -> Evaluation:
    """How often the base runs answer with the target with some candidates' outputs taken from the
    counterfactual."""
    mask = masked.mask.new_tensor([float(head not in taken) for head in masked.candidates])
    predicted, log_probabilities = [], []
    for recorded, share in recordings:
        logits = masked.run(recorded, mask)
        predicted.append(gathered(logits.argmax(-1), share))
        log_probabilities.append(gathered(log_probability(logits, recorded.pairs.targets), share))
    answered = torch.cat(predicted)
    targets = recordings.pairs.targets.to(answered.device)
    return Evaluation(answered, answered == targets, torch.cat(log_probabilities))


class _Budget:
    """Bytes that are left for recorded runs."""

    def __init__(self, free: int) -> None:
        self._free = free

    def take(self, n_bytes: int) -> bool:
        """Take so many, if they are there."""
        if n_bytes > self._free:
            return False
        self._free -= n_bytes
        return True


class _Recordings:
    """This process's share of pairs in batches, each recorded once and kept while the memory lasts;
    batches that don't fit are recorded anew whenever they come."""

    def __init__(
        self, masked: MaskedForward, pairs: PairBatch, batch_size: int, budget: _Budget
    ) -> None:
        if batch_size < 1 or len(pairs) == 0:
            raise InputError(
                f"{len(pairs)} pairs in batches of {batch_size}: there must be at least one."
            )
        check_pairs(masked.model, pairs)
        self.pairs = pairs
        self.n_batches = -(-len(pairs) // batch_size)
        self._masked = masked
        self._batch_size = batch_size
        self._budget = budget
        self._kept: dict[int, RecordedPairs] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[RecordedPairs, Share]]:
        for i, batch in enumerate(self.pairs.chunks(self._batch_size)):
            share = share_of(len(batch))
            recorded = self._kept.get(i)
            if recorded is None:
                recorded = self._masked.record(batch[share.rows])
                if self._budget.take(_bytes_of(recorded)):
                    self._kept[i] = recorded
            yield recorded, share


def _bytes_of(held: Any) -> int:
    """Memory of all tensors in a nest of dataclasses, mappings and sequences."""
    if isinstance(held, Tensor):
        return held.untyped_storage().nbytes()
    if dataclasses.is_dataclass(held) and not isinstance(held, type):
        return sum(_bytes_of(getattr(held, field.name)) for field in dataclasses.fields(held))
    if isinstance(held, Mapping):
        return sum(map(_bytes_of, held.values()))
    if isinstance(held, (list, tuple)):
        return sum(map(_bytes_of, held))
    return 0


def _shuffled(pairs: PairBatch, seed: int) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    return pairs[torch.randperm(len(pairs), generator=generator).to(pairs.targets.device)]


def _split(pairs: PairBatch) -> tuple[PairBatch, PairBatch, PairBatch]:
    """Half, a quarter, and the rest."""
    if len(pairs) < 4:
        raise InputError(
            f"{len(pairs)} pairs can't be split into half, quarter and quarter; draw more."
        )
    half, quarter = len(pairs) // 2, len(pairs) // 4
    return pairs[:half], pairs[half : half + quarter], pairs[half + quarter :]
