"""A model whose layers lie on several devices.

One device here is the CPU, the other `meta`, which holds no numbers. No operation may have tensors
of both, as with two GPUs: what runs to the end has moved everything where it has to be.
"""

import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformer_lens import HookedTransformer

from tests.random_models import random_model, random_pairs
from tl_entity import Head, PairBatch
from tl_entity.exact.ablation import AblatedRun
from tl_entity.exact.blocks import device_of, unembed
from tl_entity.exact.path_patching import patched_values
from tl_entity.exact.suffix import CleanRun
from tl_entity.hooks.edits import MaskHeads, ReplaceWhere, knock_out, patch_heads
from tl_entity.hooks.path_patching import Path
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.metrics import LOG_PROBABILITY, RELATIVE_PROBABILITY, TARGET_LOGIT

N_LAYERS, FAR = 4, 2
RECEIVERS = [Head(1, 0), Head(2, 1), Head(3, 3)]


class OneDeviceAtATime(TorchFunctionMode):
    """Refuses what no two GPUs would do together; `meta` itself is not always so strict."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [*tree_leaves(args), *tree_leaves(kwargs)]
        devices = {part.device for part in given if isinstance(part, Tensor) and part.ndim}
        if len(devices) > 1 and function is not Tensor.to:
            raise RuntimeError(f"{function.__name__} of tensors on several devices")
        return function(*args, **kwargs)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Generator[HookedTransformer, None, None]:
    """Two layers on the CPU, the others and the unembedding elsewhere."""
    model = random_model(N_LAYERS, n_kv_heads=2)
    for part in (*model.blocks[FAR:], model.ln_final, model.unembed):
        part.to("meta")

    def device_of_block(index: int, *_: Any) -> torch.device:
        return torch.device("cpu" if index < FAR else "meta")

    def with_mask_there(forward: Any) -> Any:
        def run(*args: Any, attention_mask: Tensor, **kwargs: Any) -> Any:
            return forward(*args, attention_mask=attention_mask.to("meta"), **kwargs)

        return run

    for block in model.blocks[FAR:]:
        # TransformerLens takes scores to where the mask is and back, which `meta` can't do.
        block.forward = with_mask_there(block.forward)
    # TransformerLens would number CUDA devices.
    forward = sys.modules[HookedTransformer.__module__]
    monkeypatch.setattr(forward, "get_device_for_block_index", device_of_block)
    with OneDeviceAtATime():
        yield model


@pytest.fixture
def pairs() -> PairBatch:
    return random_pairs(4, 9)


def test_the_layers_are_apart(model: HookedTransformer) -> None:
    assert [device_of(model, n).type for n in range(N_LAYERS)] == ["cpu", "cpu", "meta", "meta"]
    with pytest.raises(RuntimeError, match="several devices"):
        model.blocks[FAR].attn.b_O + model.blocks[0].attn.b_O


@pytest.mark.parametrize("metric", [RELATIVE_PROBABILITY, TARGET_LOGIT, LOG_PROBABILITY])
@pytest.mark.parametrize(
    ("position", "receiver_input", "senders"),
    [
        ("last", None, "heads"),
        ("last", None, "mlps"),
        ("last", "q", "heads"),
        ("place", "v", "heads"),
        ("place", "k", "mlps"),
    ],
)
def test_path_patching(model, pairs, metric, position, receiver_input, senders):
    receivers = None if receiver_input is None else {receiver_input: RECEIVERS}
    path = Path(senders, position, receivers)
    clean, values = patched_values(model, pairs, path, metric=metric)
    assert clean.device.type == values.device.type == "meta"
    assert values.shape == (N_LAYERS, 4 if senders == "heads" else 1, len(pairs))


def test_edits_of_a_recorded_run(model, pairs):
    prompts = pairs.clean
    points = dict.fromkeys(hook_point("z", layer) for layer in range(N_LAYERS))
    cache = record(model, pairs.corrupt, points)
    where = (
        torch.ones(4, 9, 4, dtype=torch.bool)
        & (torch.arange(9) == prompts.position("last")[:, None])[..., None]
    )
    everywhere = ReplaceWhere(where, torch.zeros(1, 9, 4, 8, dtype=torch.float64))
    variants = [
        patch_heads(cache, {"place": [Head(0, 1), Head(3, 2)]}, into=prompts, source=pairs.corrupt),
        knock_out(prompts, from_position="last", to_position="place", layers=range(N_LAYERS)),
        [(hook_point("z", layer), everywhere) for layer in (1, 2)],
        [
            (
                hook_point("z", layer),
                MaskHeads(
                    prompts.position("last"),
                    torch.tensor([0, 3]),
                    torch.ones(2),
                    torch.zeros(4, 2, 8, dtype=torch.float64),
                ),
            )
            for layer in range(N_LAYERS)
        ],
    ]
    run = CleanRun.record(
        model, prompts, first_layer=0, positions=["place", "last"], begins=range(N_LAYERS)
    )
    logits = run.answer_logits_each(variants)
    assert logits.device.type == "meta" and logits.shape[:2] == (4, len(prompts))


def test_circuits(model, pairs):
    prompts = pairs.clean
    values = torch.zeros(N_LAYERS, 9, 4, 8, dtype=torch.float64)
    resid = AblatedRun.record(model, prompts, values).answer_resid_each(
        [{"last": RECEIVERS, "place": [Head(0, 1)]}, {"place": [Head(2, 2)]}, {}]
    )
    assert unembed(model, resid).device.type == "meta"
