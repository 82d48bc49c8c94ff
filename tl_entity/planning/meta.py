"""Models without weights: HookedTransformers on the meta device, laid out as loaded ones are."""

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_entity.errors import InputError
from tl_entity.exact.memory import STANDS_FOR
from tl_entity.models.weights import AS_IS, TABLE, Layout
from tl_entity.planning.planned import Known, PlannedRun


@dataclass(frozen=True)
class Stand:
    """A model without weights that stands for another while runs are planned.

    Attributes:
        model: it.
        device: where the other is.
        known: what was planned on it so far.
    """

    model: HookedTransformer
    device: str
    known: Known

    @classmethod
    def of(cls, like: HookedTransformer | HookedTransformerConfig, n_ctx: int) -> "Stand":
        """One for this model, or for a model of this configuration, and prompts of up to `n_ctx`
        tokens.

        Raises:
            InputError: if the model is a mixture of experts.
        """
        cfg = like.cfg if isinstance(like, HookedTransformer) else like
        return cls(meta_model(like, n_ctx), str(cfg.device or "cpu"), Known())

    @contextmanager
    def run(self) -> Generator[PlannedRun, None, None]:
        """Within this context a run of the model is counted."""
        device = STANDS_FOR.set(self.device)
        try:
            run = PlannedRun(self.known)
            with run:
                yield run
        finally:
            STANDS_FOR.reset(device)


def meta_model(like: HookedTransformer | HookedTransformerConfig, n_ctx: int) -> HookedTransformer:
    """A model of these sizes whose weights hold no numbers, for prompts of up to `n_ctx` tokens.

    Weights lie in memory as the model's own do, or, given a configuration, as `load_model` has
    them: views of a checkpoint's matrices.

    Raises:
        InputError: if the model is a mixture of experts.
    """
    model = like if isinstance(like, HookedTransformer) else None
    cfg = copy.copy(like.cfg if isinstance(like, HookedTransformer) else like)
    if cfg.num_experts is not None:
        raise InputError(
            "What a mixture of experts will take can't be counted: which experts a token goes "
            "through depends on the prompts."
        )
    cfg.device, cfg.n_devices, cfg.n_ctx, cfg.init_weights = "meta", 1, n_ctx, False
    with init_empty_weights(include_buffers=False):
        made = HookedTransformer(cfg, move_to_device=False)
    layouts = _layouts(cfg.n_layers)
    for name, parameter in list(made.named_parameters()):
        if model is not None:
            weights = _as_of(model, name)
        else:
            layout = layouts.get(name, AS_IS)
            matrix = torch.empty(layout.to_checkpoint(parameter).shape, device="meta")
            weights = layout.to_hooked(matrix.to(parameter.dtype), cfg)
        owner, _, last = name.rpartition(".")
        made.get_submodule(owner).register_parameter(last, nn.Parameter(weights, False))
    for name, buffer in list(made.named_buffers()):
        owner, _, last = name.rpartition(".")
        setattr(made.get_submodule(owner), last, buffer.to("meta"))
    return made.eval()


def _as_of(model: HookedTransformer, name: str) -> Tensor:
    weights = model.get_parameter(name)
    return torch.empty_strided(weights.shape, weights.stride(), dtype=weights.dtype, device="meta")


def _layouts(n_layers: int) -> dict[str, Layout]:
    """How each parameter is shown of the checkpoint's matrix, by name."""
    return {
        name.format(layer=layer, kv=kv): layout
        for name, layout in TABLE.values()
        for layer in range(n_layers)
        for kv in ("", "_")
    }
