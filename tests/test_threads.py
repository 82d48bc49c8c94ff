"""A model is used by one thread at a time, without hooks of others, in whatever grad mode, and is
left as it was."""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.all_methods import CALLS, HEADS, ON_BRIDGE
from tests.models.helpers import llama, save
from tests.random_models import random_model, random_pairs
from tl_entity import (
    Head,
    InputError,
    MaskedForward,
    discovery_pairs,
    learn_mask,
    learn_masks,
    load_model,
)
from tl_entity.hooks import answer_logits, record, separate_kv_heads


def state(model: Any) -> dict[str, Any]:
    """What a method might leave changed on a model."""
    return {
        "flags": {name: value for name, value in vars(model.cfg).items() if value in (True, False)},
        "training": [module.training for module in model.modules()],
        "gradients": [weight.requires_grad for weight in model.parameters()],
        "hooks": [name for name, p in model.hook_dict.items() if p.fwd_hooks or p.bwd_hooks],
        "context": model.context_level,
        "groups": [getattr(m, "num_key_value_groups", None) for m in model.modules()],
    }


@pytest.fixture(scope="module")
def bridge() -> Any:
    return load_model("default-base", backend="bridge", device="cpu")


def named_as_random(model: Any) -> Any:
    pairs = discovery_pairs(model.tokenizer, 8, n_boxes=2, seed=0)
    for batch in (pairs.clean, pairs.corrupt):
        batch.positions["place"] = batch.positions["query_label"]
        batch.positions["early"] = torch.zeros_like(batch.positions["last"])
    return pairs


def test_three_threads_get_what_one_gets() -> None:
    """All methods at once on one model, whose weights take gradients and whose heads share keys."""
    model, pairs = random_model(n_kv_heads=2), random_pairs(8)
    model.requires_grad_(True)
    names = [name for name in CALLS if not name.startswith(("completeness", "minimality"))]
    wanted = {name: CALLS[name](model, pairs) for name in names}
    before = state(model)
    with ThreadPoolExecutor(3) as threads:
        jobs = [
            (name, threads.submit(CALLS[name], model, pairs)) for name in [*names, *names[::-1]]
        ]
        for name, job in jobs:
            torch.testing.assert_close(job.result(), wanted[name], rtol=0, atol=1e-12)
    assert state(model) == before


def test_three_threads_on_a_bridge(bridge: Any) -> None:
    pairs = named_as_random(bridge)
    names = ["path_patch into v, hooks", "cmap of k and v, hooks", "learn_mask, hooks"]
    wanted = {name: ON_BRIDGE[name](bridge, pairs) for name in names}
    before = state(bridge)
    with ThreadPoolExecutor(3) as threads:
        jobs = [(name, threads.submit(ON_BRIDGE[name], bridge, pairs)) for name in names * 2]
        for name, job in jobs:
            torch.testing.assert_close(job.result(), wanted[name], rtol=0, atol=1e-6)
    assert state(bridge) == before


def test_two_models_in_both_orders_do_not_wait_for_each_other() -> None:
    from tests.all_methods import CIRCUIT
    from tl_entity import cmap

    one, other, prompts = random_model(), random_model(seed=5), random_pairs(8).clean
    wanted = [cmap(*models, prompts, CIRCUIT).predicted for models in ((one, other), (other, one))]
    with ThreadPoolExecutor(2) as threads:
        jobs = [
            threads.submit(cmap, *models, prompts, CIRCUIT)
            for models in ((one, other), (other, one)) * 10
        ]
        found = [job.result(timeout=120).predicted for job in jobs]
    assert all(torch.equal(got, wanted[i % 2]) for i, got in enumerate(found))


def test_a_thread_waits_while_heads_are_set_apart() -> None:
    model, pairs, order = random_model(n_kv_heads=2), random_pairs(), []

    def other() -> None:
        answer_logits(model, pairs.clean)
        order.append("other")

    with separate_kv_heads(model):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(timeout=0.3)
        order.append("here")
    thread.join()
    assert order == ["here", "other"]


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_hooks_of_ones_own_are_refused(name: str, permanent: bool) -> None:
    model, pairs = random_model(), random_pairs(8)
    model.add_hook("blocks.1.attn.hook_z", lambda z, hook: 0 * z, is_permanent=permanent)
    before = state(model)
    with pytest.raises(InputError, match=r"hooks are attached.*at blocks\.1\.attn\.hook_z, which"):
        CALLS[name](model, pairs)
    assert state(model) == before
    model.reset_hooks(including_permanent=True)
    CALLS[name](model, pairs)


@pytest.mark.parametrize("name", CALLS)
def test_hooks_of_a_context_and_of_gradients_are_refused(name: str) -> None:
    model, pairs = random_model(), random_pairs(8)
    edit = ("blocks.2.hook_mlp_out", lambda out, hook: 0 * out)
    for how in ({"fwd_hooks": [edit]}, {"bwd_hooks": [edit]}):
        with model.hooks(**how), pytest.raises(InputError, match=r"at blocks\.2\.hook_mlp_out"):
            CALLS[name](model, pairs)
    assert not state(model)["hooks"]


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("blocks.1", r"blocks\.1,"),
        ("blocks.1.attn", r"blocks\.1\.attn,"),
        ("blocks.2.mlp", r"blocks\.2\.mlp,"),
        ("ln_final", "ln_final,"),
        ("", "the model itself,"),
    ],
)
@pytest.mark.parametrize("name", CALLS)
def test_torch_hooks_on_modules_are_refused(name: str, module: str, said: str) -> None:
    """The engines call different modules, and one of them gave other numbers than the other."""
    model, pairs = random_model(), random_pairs(8)
    handles = [
        model.get_submodule(module).register_forward_hook(lambda module, given, out: 2 * out),
        model.get_submodule(module).register_forward_pre_hook(lambda module, given: None),
    ]
    for _ in range(2):
        with pytest.raises(InputError, match=f"hooks are attached.*at {said} which"):
            CALLS[name](model, pairs)
        handles.pop().remove()
    CALLS[name](model, pairs)


def test_a_hook_on_the_embedding_is_honoured_alike() -> None:
    """Both engines embed a prompt by that module, once a run."""
    model, pairs = random_model(), random_pairs(8)
    wanted = CALLS["path_patch, hooks"](model, pairs)
    handle = model.embed.register_forward_hook(lambda module, given, out: 2 * out)
    found = [CALLS[f"path_patch, {engine}"](model, pairs) for engine in ("exact", "hooks")]
    handle.remove()
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], wanted)


def test_torch_hooks_in_a_bridge_are_refused(bridge: Any) -> None:
    mlp = bridge.original_model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, given, out: 2 * out)
    try:
        with pytest.raises(InputError, match=r"hooks are attached.*at blocks\.1\.mlp"):
            answer_logits(bridge, named_as_random(bridge).clean)
    finally:
        handle.remove()
    answer_logits(bridge, named_as_random(bridge).clean)


@pytest.mark.parametrize("name", ON_BRIDGE)
def test_hooks_on_a_bridge_are_refused(bridge: Any, name: str) -> None:
    bridge.add_hook("blocks.1.attn.hook_z", lambda z, hook: 0 * z)
    try:
        with pytest.raises(InputError, match=r"hooks are attached.*blocks\.1\.attn\.(hook_z|o)"):
            ON_BRIDGE[name](bridge, named_as_random(bridge))
    finally:
        bridge.reset_hooks(including_permanent=True)
    record(bridge, named_as_random(bridge).clean, {"blocks.1.attn.hook_z": "last"})


@pytest.mark.parametrize("name", CALLS)
def test_a_run_that_fails_leaves_the_model_as_it_was(name: str) -> None:
    """It fails in its last layer, where hooks and flags are set."""
    model, pairs = random_model(n_kv_heads=2), random_pairs(8)
    model.requires_grad_(True)
    wanted = CALLS[name](model, pairs)
    before = state(model)
    mlp = model.blocks[2].mlp
    for broken in (model.blocks[1].ln1, mlp, model.ln_final):
        forward = broken.forward

        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        broken.forward = fail
        try:
            CALLS[name](model, pairs)
        except KeyboardInterrupt:
            pass
        finally:
            broken.forward = forward
        assert state(model) == before
    torch.testing.assert_close(CALLS[name](model, pairs), wanted, rtol=0, atol=1e-12)


@contextmanager
def plain() -> Generator[None, None, None]:
    yield


MODES: list[Callable[[], Any]] = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES, ids=["no_grad", "inference"])
@pytest.mark.parametrize("name", CALLS)
def test_every_grad_mode_gives_the_same(name: str, mode: Callable[[], Any]) -> None:
    model, pairs = random_model(n_kv_heads=2), random_pairs(8)
    wanted = CALLS[name](model, pairs)
    with mode():
        found = CALLS[name](model, random_pairs(8))
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("mode", MODES, ids=["no_grad", "inference"])
def test_masks_are_trained_in_every_mode(mode: Callable[[], Any], engine: str) -> None:
    """With pairs made in the mode, and validation, whose best mask is kept."""
    model = random_model()

    def train() -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"position": "last", "engine": engine, "batch_size": 4}
        heads = [Head(layer, head) for layer in range(3) for head in range(4)]
        one = learn_mask(model, random_pairs(8), heads, **how, validation=random_pairs(4, seed=2))
        many = learn_masks(model, random_pairs(16, seed=1), heads, **how, seeds=[0, 1])
        return one.trajectory, torch.stack([run.mask.trajectory for run in many.runs])

    wanted = train()
    assert (wanted[0] != 1).any()
    with mode():
        found = train()
    assert all(torch.equal(got, right) for got, right in zip(found, wanted, strict=True))


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("mode", MODES, ids=["no_grad", "inference"])
def test_a_masked_forward_made_in_any_mode_is_trained(mode: Callable[[], Any], engine: Any) -> None:
    model = random_model()

    def gradient(make: Callable[[], Any]) -> Tensor:
        with make():
            pairs = random_pairs(8)
            masked = MaskedForward(model, HEADS, position="last", engine=engine)
            recorded = masked.record(pairs)
            assert masked(pairs).shape == (8, 20)
        targets = recorded.pairs.targets[:, None]
        masked(recorded).gather(1, targets).sum().backward()
        assert masked.mask.grad is not None
        return masked.mask.grad

    assert torch.equal(gradient(mode), gradient(plain))


def test_a_model_made_in_inference_mode_is_refused_for_training() -> None:
    with torch.inference_mode():
        model = random_model()
    with pytest.raises(InputError, match=r"was made in torch\.inference_mode"):
        learn_mask(model, random_pairs(8), HEADS, position="last")
    CALLS["path_patch, exact"](model, random_pairs(8))


def test_models_are_loaded_in_any_mode_and_thread(tmp_path: Any) -> None:
    folder = save(llama(), tmp_path / "model")
    with torch.inference_mode():
        model = load_model(folder, device="cpu")
    assert not any(weight.is_inference() for weight in model.parameters())
    register = torch.nn.Module.register_parameter
    with ThreadPoolExecutor(3) as threads:
        jobs = [
            threads.submit(load_model, folder, device="cpu", backend=backend)
            for backend in ("hooked", "bridge") * 6
        ]
        models = [job.result() for job in jobs]
    assert torch.nn.Module.register_parameter is register
    tokens = torch.arange(3, 20)[None]
    for other in models:
        torch.testing.assert_close(other(tokens), model(tokens), atol=1e-5, rtol=1e-5)
