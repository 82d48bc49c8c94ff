"""The masked forward pass that DCM trains: head outputs mixed with those of a counterfactual run.

Each candidate head's output at one position is m * base + (1 - m) * counterfactual (Davies et al.
2023; Prakash et al. 2024, §4.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_entity._model import Model, check_takes_gradients, frozen
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.suffix import CleanRun
from tl_entity.finite import check_finite
from tl_entity.heads import Head
from tl_entity.hooks.edits import Hook, MaskHeads
from tl_entity.hooks.guard import guarded
from tl_entity.hooks.points import check_heads, hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.hooks.vocabulary import check_pairs, check_tokens
from tl_entity.methods.path_patching import Engine
from tl_entity.tasks.batches import PairBatch, PromptBatch

SELECTED_BELOW = 0.5
"""A head is selected if its m is below this: rounded, it takes the counterfactual's value."""


@dataclass(frozen=True)
class RecordedPairs:
    """What masked runs of some pairs share, whatever the mask.

    Attributes:
        pairs: the pairs, on the model's device.
        other: for each layer with candidates, their outputs in the counterfactual run, read at the
            counterfactual's own position, `[batch heads d_head]`.
        clean: the base run, from the first masked layer and token on; None on the hooks engine,
            which runs the whole model each time.
    """

    pairs: PairBatch
    other: Mapping[int, Float[Tensor, "batch heads d_head"]]
    clean: CleanRun | None

    def __len__(self) -> int:
        return len(self.pairs)


class MaskedForward(nn.Module):
    """A frozen model whose candidate heads are mixed with a counterfactual run by a trainable mask.

    The mask, one entry a candidate, is the only parameter; it begins at 1, where the model is
    itself. The model is no submodule: `parameters()` and `state_dict()` hold the mask alone, and
    `.to(device)` moves the mask alone.

        masked = MaskedForward(model, heads, position="last")
        optimizer = torch.optim.Adam(masked.parameters(), lr=0.1)
        for pairs in batches:
            masked.clamp_()
            optimizer.zero_grad()
            loss = my_loss(masked(pairs), pairs.targets, masked.mask)
            loss.backward()
            optimizer.step()

    Pairs that are run more than once are recorded once: `recorded = masked.record(pairs)`, then
    `masked(recorded)`. On the exact engine that leaves only what the mask can change to compute.

    Args:
        model: the model.
        candidates: the heads with a mask.
        position: named position of their outputs, in base and counterfactual prompt each its own.
        engine: "exact" recomputes only what the mask can change; "hooks" runs the whole model.

    Raises:
        InputError: if there are no candidates, one comes twice, the model lacks one, or it was made
            in inference mode.
    """

    def __init__(
        self,
        model: Model,
        candidates: Sequence[Head],
        *,
        position: str,
        engine: Engine = "exact",
    ) -> None:
        super().__init__()
        candidates = tuple(Head(*head) for head in candidates)
        if not candidates:
            raise InputError("There are no candidate heads to learn a mask for.")
        if len(set(candidates)) != len(candidates):
            raise InputError("A head is a candidate twice; its mask would be two.")
        check_heads(model, candidates)
        check_takes_gradients(model)
        self.candidates = candidates
        self.position = position
        self.engine: Engine = engine
        self._model = (model,)  # in a tuple, where nn.Module doesn't take it for a part of itself
        self._layers = {
            layer: [i for i, head in enumerate(candidates) if head.layer == layer]
            for layer in sorted({head.layer for head in candidates})
        }
        # A mask in half precision could not be trained in small steps.
        dtype = torch.promote_types(model.cfg.dtype, torch.float32)
        # Made in inference mode it could never be trained.
        with torch.inference_mode(False):
            mask = torch.ones(len(candidates), dtype=dtype, device=model.cfg.device)
            self.mask = nn.Parameter(mask)

    @property
    def model(self) -> Model:
        """The model that is run."""
        return self._model[0]

    @property
    def selected(self) -> tuple[Head, ...]:
        """The candidates with m below one half."""
        return selected_heads(self.candidates, self.mask.detach())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the mask back into [0, 1]."""
        self.mask.clamp_(0, 1)

    @checked
    @torch.inference_mode(False)
    @torch.no_grad()
    def record(self, pairs: PairBatch) -> RecordedPairs:
        """Run base and counterfactual prompts once, for any number of masked runs.

        What is recorded can be used to train a mask, whatever mode it is recorded in.

        Raises:
            InputError: if the prompts lack the position, the model does not know a token or has
                hooks attached to it, or the exact engine does not fit it.
            NotFiniteError: if weights or activations are NaN or infinite, naming where.
        """
        check_pairs(self.model, pairs, scored=False)
        pairs = outside_inference(pairs.to(self.model.cfg.device or "cpu"))
        points: dict[str, str | None] = {
            hook_point("z", layer): self.position for layer in self._layers
        }
        outputs = record(self.model, pairs.corrupt, points)
        other = {
            layer: outputs.pop(hook_point("z", layer))[:, self._heads(layer)]
            for layer in self._layers
        }
        clean = None
        if self.engine == "exact":
            clean = CleanRun.record(
                self.model,
                pairs.clean,
                first_layer=min(self._layers),
                positions=[self.position],
            )
        return RecordedPairs(pairs, other, clean)

    @checked
    def forward(self, pairs: PairBatch | RecordedPairs) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the base prompts' `"last"` token; gradients reach the mask alone.

        Raises:
            InputError: as `run`.
            NotFiniteError: as `run`.
        """
        return self.run(pairs, self.mask)

    @checked
    def run(
        self,
        pairs: PairBatch | RecordedPairs,
        mask: Float[Tensor, " candidate"],
        *,
        tokens: Int[Tensor, "batch wanted"] | None = None,
    ) -> Float[Tensor, "batch logits"]:
        """As `forward`, with another mask than one's own, and only the logits of some tokens if
        these are given.

        Raises:
            InputError: as `record`.
            NotFiniteError: as `record`, or if the mask is.
        """
        check_finite(
            "The mask", mask, "it was trained away from all numbers: try a lower learning rate"
        )
        recorded = self.record(pairs) if isinstance(pairs, PairBatch) else pairs
        if tokens is not None:
            check_tokens(self.model, tokens, "wanted token of pair")
        hooks = self.edits(recorded, mask)
        with guarded(self.model), frozen(self.model):
            if recorded.clean is not None:
                return recorded.clean.answer_logits(hooks, tokens=tokens)
            logits = answer_logits(self.model, recorded.pairs.clean, hooks)
            return logits if tokens is None else logits.gather(1, tokens)

    @checked
    def edits(self, recorded: RecordedPairs, mask: Float[Tensor, " candidate"]) -> list[Hook]:
        """The masked run as hooks, for `run_with_hooks` on the base prompts."""
        at = recorded.pairs.clean.position(self.position)
        return [
            (
                hook_point("z", layer),
                MaskHeads(
                    positions=at,
                    heads=torch.tensor(self._heads(layer)),
                    mask=mask[index],
                    other=recorded.other[layer],
                ),
            )
            for layer, index in self._layers.items()
        ]

    def _heads(self, layer: int) -> list[int]:
        return [self.candidates[i].head for i in self._layers[layer]]


def selected_heads(heads: tuple[Head, ...], mask: Float[Tensor, " candidate"]) -> tuple[Head, ...]:
    """The heads whose m is below one half."""
    return tuple(head for head, m in zip(heads, mask.tolist(), strict=True) if m < SELECTED_BELOW)


def outside_inference(pairs: PairBatch) -> PairBatch:
    """The same pairs, in tensors that a gradient may be computed with: those made in inference mode
    may not be kept for it."""

    def normal(prompts: PromptBatch) -> PromptBatch:
        mask, roles = prompts.attention_mask, prompts.roles
        return replace(
            prompts,
            tokens=_normal(prompts.tokens),
            answers=_normal(prompts.answers),
            positions={name: _normal(index) for name, index in prompts.positions.items()},
            attention_mask=None if mask is None else _normal(mask),
            roles=None if roles is None else _normal(roles),
        )

    foils = None if pairs.foils is None else _normal(pairs.foils)
    return PairBatch(normal(pairs.clean), normal(pairs.corrupt), _normal(pairs.targets), foils)


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
