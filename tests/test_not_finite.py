"""Numbers that are none stop whatever is done with them, and the message says where they arose."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.all_methods import CALLS, CIRCUIT, HEADS, METHODS, ON_BRIDGE, means
from tests.models.helpers import llama, save
from tests.models.test_adapters import adapt
from tests.random_models import random_model, random_pairs
from tl_entity import (
    Ablation,
    Head,
    InputError,
    Metric,
    discovery_pairs,
    evaluate,
    learn_mask,
    load_model,
    path_patch,
)
from tl_entity.cli import main
from tl_entity.exact.ablation import AblatedRun
from tl_entity.exact.suffix import CleanRun
from tl_entity.finite import NotFiniteError, are_finite
from tl_entity.hooks import answer_logits, hook_point, knock_out, patch_heads, record
from tl_entity.metrics import LOG_PROBABILITY, MOST_LOG_CHANGE, relative_probability_change

NAN, INF = float("nan"), float("inf")
ABLATING = ("evaluate keep, exact", "evaluate_circuits, exact")
ABLATING += ("completeness, exact", "minimality, exact")


def wide_scores(n_kv_heads: int = 2) -> Any:
    """A model of finite weights whose attention scores in layer 1 are beyond float32."""
    model = random_model(n_kv_heads=n_kv_heads, dtype=torch.float32)
    for name in ("W_Q", "_W_K"):
        model.get_parameter(f"blocks.1.attn.{name}").mul_(1e20)
    return model


@pytest.mark.parametrize("name", CALLS)
def test_scores_beyond_the_dtype_are_found_in_every_method(name: str) -> None:
    """TransformerLens makes a pattern that is NaN zero, so that its logits look sound."""
    model, pairs = wide_scores(), random_pairs(8)
    assert model(pairs.clean.tokens).isfinite().all()
    with pytest.raises(NotFiniteError, match=r"blocks\.1\.attn\.hook_(attn_scores|z)"):
        CALLS[name](model, pairs)


def sees_nothing(prompts: Any) -> Any:
    """A model of finite weights in which one head's score of the first token of the first prompt,
    which sees itself alone, is beyond float32, below zero; all other scores are finite."""
    model = random_model(d_model=64, dtype=torch.float32)
    (resid,) = record(model, prompts, {hook_point("resid_pre", 1): None}).values()
    normalized = model.blocks[1].ln1(resid)[prompts.mask].double()
    first, others = normalized[0], normalized[(normalized - normalized[0]).abs().amax(-1) > 1e-3]
    basis = torch.linalg.qr(others.T).Q
    alone = first - basis @ (basis.T @ first)
    writes = torch.zeros_like(model.W_Q[1, 0])
    writes[:, 0] = (1e20 * alone / alone.norm()).float()
    model.blocks[1].attn.W_Q[0], model.blocks[1].attn.W_K[0] = writes, -writes
    return model


# With its head ablated there, nothing computes such a score.
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ABLATING])
def test_a_token_that_sees_nothing_is_found_in_every_method(name: str) -> None:
    """TransformerLens makes zeros of its pattern, too: what it sees then is no mean of values."""
    pairs = random_pairs(4, 8)[torch.zeros(4, dtype=torch.long)]
    pairs = replace(pairs, corrupt=pairs.clean)
    model = sees_nothing(pairs.clean)
    scores = model.run_with_cache(pairs.clean.tokens)[1]["blocks.1.attn.hook_attn_scores"]
    assert (scores.amax(-1).isneginf().sum(), scores.isposinf().sum()) == (4, 0)
    assert model(pairs.clean.tokens).isfinite().all()
    where = r"blocks\.1\.attn\.hook_attn_scores.*head 0 at token 0 of prompt 0"
    with pytest.raises(NotFiniteError, match=where):
        CALLS[name](model, pairs)


def test_an_edit_may_take_away_all_that_a_token_sees() -> None:
    model, prompts = random_model(), random_pairs().clean
    hooks = knock_out(prompts, from_position="early", to_position="early", layers=[1])
    assert answer_logits(model, prompts, hooks).isfinite().all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("weight", "value"),
    [
        ("blocks.1.attn._W_K", INF),
        ("blocks.2.attn.W_Q", NAN),
        ("blocks.0.attn._W_V", -INF),
        ("blocks.2.mlp.W_out", NAN),
        ("blocks.0.ln1.w", NAN),
        ("unembed.W_U", INF),
    ],
)
def test_weights_are_found_in_every_method(name: str, weight: str, value: float) -> None:
    model = random_model(n_kv_heads=2)
    model.get_parameter(weight).view(-1)[5] = value
    with pytest.raises(NotFiniteError, match=rf"weight {weight} is not finite: 1 of its \d+ numb"):
        CALLS[name](model, random_pairs(8))


def test_weights_changed_after_the_first_run_are_found() -> None:
    model, pairs = random_model(), random_pairs()
    evaluate(model, pairs.clean)
    model.blocks[1].mlp.W_in[0, 0] = NAN
    with pytest.raises(NotFiniteError, match=r"blocks\.1\.mlp\.W_in.*first nan at \[0, 0\]"):
        evaluate(model, pairs.clean)
    model.blocks[1].mlp.W_in[0, 0] = 0.5
    evaluate(model, pairs.clean)


@pytest.mark.parametrize(
    ("weight", "value", "point"),
    [
        ("blocks.1.attn.W_K", INF, r"blocks\.1\.attn\.hook_k"),
        ("blocks.1.attn.W_Q", NAN, r"blocks\.1\.attn\.hook_q"),
        ("blocks.1.attn.W_V", NAN, r"blocks\.1\.attn\.hook_v"),
        ("blocks.1.attn.W_O", NAN, r"blocks\.1\.hook_attn_out"),
        ("blocks.1.mlp.W_in", INF, r"blocks\.1\.hook_mlp_out"),
        ("embed.W_E", NAN, "hook_embed"),
        ("ln_final.w", NAN, r"(ln_final|the run's result)"),
        ("unembed.W_U", NAN, "the run's result"),
    ],
)
def test_the_first_point_is_named(weight: str, value: float, point: str) -> None:
    """Changed through `.data`, which torch does not count: only the activations can tell."""
    model, pairs = random_model(), random_pairs()
    evaluate(model, pairs.clean)
    model.get_parameter(weight).data[:] = value
    with pytest.raises(NotFiniteError, match=f"not finite from {point} on"):
        evaluate(model, pairs.clean)


@pytest.fixture(scope="module")
def bridge() -> Any:
    return load_model("default-base", backend="bridge", device="cpu")


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("name", ON_BRIDGE)
def test_a_bridge_tells_them_too(bridge: Any, name: str, through_data: bool) -> None:
    pairs = discovery_pairs(bridge.tokenizer, 8, n_boxes=2, seed=0)
    for batch in (pairs.clean, pairs.corrupt):
        batch.positions["place"] = batch.positions["query_label"]
        batch.positions["early"] = torch.zeros_like(batch.positions["last"])
    answer_logits(bridge, pairs.clean)
    weight = dict(bridge.named_parameters())[
        next(n for n, _ in bridge.named_parameters() if "1" in n and "k_proj" in n)
    ]
    before = weight.detach().clone()
    try:
        (weight.data if through_data else weight)[0, 0] = INF
        where = r"blocks\.1\.attn\.hook_k" if through_data else r"1.*k_proj"
        with pytest.raises(NotFiniteError, match=where):
            ON_BRIDGE[name](bridge, pairs)
    finally:
        (weight.data if through_data else weight).copy_(before)
    answer_logits(bridge, pairs.clean)


@pytest.mark.parametrize("name", METHODS)
def test_left_padding_and_knockouts_are_finite(name: str) -> None:
    """Scores of what can't be seen are minus infinity, in padding whole rows of them."""
    model, pairs = random_model(n_kv_heads=2), random_pairs(8, left=True)
    if ("evaluate" in name and name != "evaluate") or name in ("completeness", "minimality"):
        pytest.skip("ablation takes no padding on the left")
    assert METHODS[name](model, pairs, "hooks").isfinite().all()


def test_edits_that_are_not_finite_are_named() -> None:
    model, pairs = random_model(), random_pairs()
    cache = record(model, pairs.corrupt, dict.fromkeys([hook_point("z", 1)]))
    cache[hook_point("z", 1)][:, :, 2] = INF
    hooks = patch_heads(cache, {"last": [Head(1, 2)]}, into=pairs.clean, source=pairs.corrupt)
    with pytest.raises(NotFiniteError, match=r"blocks\.1\.attn\.hook_z"):
        answer_logits(model, pairs.clean, hooks)
    run = CleanRun.record(model, pairs.clean, first_layer=1, positions=["last"])
    with pytest.raises(NotFiniteError, match=r"blocks\.1\.attn\.hook_z"):
        run.answer_logits(hooks)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_mean_outputs_that_are_not_finite_are_named(engine: str) -> None:
    model, pairs = random_model(), random_pairs()
    values = means(model)
    values[2, 3, 1] = NAN
    for how in ({"keep": CIRCUIT}, {"remove": CIRCUIT}):
        with pytest.raises(NotFiniteError, match=r"ablation values.*first nan at \[2, 3, 1, 0\]"):
            evaluate(model, pairs.clean, mean_outputs=values, engine=engine, **how)
    with pytest.raises(NotFiniteError, match="ablation values"):
        AblatedRun.record(model, pairs.clean, values)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("call", ["nodes alone", "gradient of gates"])
def test_gated_runs_that_overflow_say_where(call: str, engine: str) -> None:
    """The whole run is finite; with these outputs of ablated nodes half precision is not."""
    from tests.all_methods import NODES, ROLES, role_pairs
    from tl_entity.hooks.gates import Gates
    from tl_entity.methods.gated_forward import GatedForward

    model, pairs = random_model(dtype=torch.float16), role_pairs(random_pairs())
    values = Ablation.by_index(means(model) * 0 + 6e4)
    forward = GatedForward.of(model, values, engine=engine)
    recorded = forward.record(pairs)
    gates = Gates.keeping([node for node in NODES if node.head is not None], model.cfg, ROLES)
    with pytest.raises(NotFiniteError, match=r"blocks\.0\.(hook_attn_out|hook_resid_mid)"):
        if call == "nodes alone":
            forward.evaluate(recorded, [gates])
        else:
            forward.gradient(recorded, gates, "metric")


def test_a_recomputation_that_overflows_says_where() -> None:
    """The clean run is finite; with these outputs of ablated heads half precision is not."""
    model, pairs = random_model(dtype=torch.float16), random_pairs()
    values = means(model) * 0 + 6e4
    for engine in ("exact", "hooks"):
        with pytest.raises(NotFiniteError, match=r"blocks\.0\.(hook_attn_out|hook_resid_mid)"):
            evaluate(model, pairs.clean, keep=CIRCUIT, mean_outputs=values, engine=engine)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_a_metric_that_is_not_defined_is_named(engine: str) -> None:
    model, pairs = random_model(), random_pairs()
    log = Metric("log of the logit", lambda logits, pairs: logits.amin(-1).log())
    with pytest.raises(NotFiniteError, match=r"metric 'log of the logit'.*nan at"):
        path_patch(model, pairs, metric=log, engine=engine)


def test_training_that_diverges_is_told() -> None:
    model, pairs = random_model(), random_pairs()
    for how in ({"lr": INF}, {"sparsity": NAN}):
        with pytest.raises(InputError, match=f"{next(iter(how))} is"):
            learn_mask(model, pairs, HEADS, position="last", **how)


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_a_target_that_becomes_all_but_certain(engine: str) -> None:
    """A rise of the log probability of more than float32's exp can tell: hundreds."""
    model = random_model(dtype=torch.float32, seed=3)
    model.unembed.W_U.mul_(200)
    pairs = random_pairs(24)
    logs = path_patch(model, pairs, metric=LOG_PROBABILITY, engine=engine).per_example
    assert logs.max() > 89  # exp of which is no float32
    with pytest.warns(UserWarning, match="count as if by 64"):
        found = path_patch(model, pairs, engine=engine)
    wanted = torch.expm1(logs.double().clamp(max=64))
    torch.testing.assert_close(found.per_example.double(), wanted, rtol=1e-3, atol=1e-3)
    assert found.scores.isfinite().all() and found.ranked()[-1] == Head(
        *divmod(int(wanted.mean(-1)[: found.top_layer].argmax()), 4)
    )
    assert all(map(torch.isfinite, torch.tensor(found.intervals).flatten()))


def test_the_relative_change_by_hand() -> None:
    clean = torch.tensor([-200.0, -200.0, -1.0])
    with pytest.warns(UserWarning, match="1 of 3 edits"):
        change = relative_probability_change(torch.tensor([-1.0, -199.0, -2.0]), clean)
    wanted = torch.tensor([MOST_LOG_CHANGE, 1.0, -1.0], dtype=torch.float64).expm1()
    torch.testing.assert_close(change.double(), wanted)
    # The sum of a million of the largest is still a number.
    assert (change[0] * 1e6).isfinite()


def test_sums_that_overflow_are_no_matter() -> None:
    assert are_finite([torch.full((100,), 6e4, dtype=torch.float16)])
    assert not are_finite([torch.ones(3), torch.tensor([1.0, -INF])])
    assert are_finite([torch.arange(3), torch.empty(0)])


def poisoned(folder: Path, key: str, value: float) -> Path:
    """The checkpoint with one number of a tensor replaced."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[key].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.layers.1.self_attn.k_proj.weight", INF),
        ("model.layers.0.self_attn.q_proj.weight", NAN),
        ("model.norm.weight", -INF),
        ("lm_head.weight", NAN),
    ],
)
def test_a_checkpoint_is_refused_by_file_and_tensor(
    tmp_path: Path, key: str, value: float, backend: Any
) -> None:
    folder = poisoned(save(llama(), tmp_path / "model"), key, value)
    with pytest.raises(NotFiniteError, match=rf"model\.safetensors: {key} is not finite: 1 of its"):
        load_model(folder, device="cpu", backend=backend)
    # Hugging Face's own answer is no more of a number.
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not loaded(torch.arange(3, 40)[None]).logits.isfinite().all()
    with pytest.raises(NotFiniteError, match=rf"the LlamaForCausalLM: {key} is not finite"):
        load_model(loaded, device="cpu", backend=backend)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_weights_beyond_the_dtype_asked_for(tmp_path: Path, backend: Any) -> None:
    key = "model.layers.2.mlp.up_proj.weight"
    folder = poisoned(save(llama(), tmp_path / "model"), key, 7e4)
    with pytest.raises(NotFiniteError, match=rf"{key} has numbers up to 7e\+04, and float16 holds"):
        load_model(folder, device="cpu", backend=backend, dtype="float16")
    load_model(folder, device="cpu", backend=backend, dtype="bfloat16")


def test_adapters_are_refused_by_file_and_tensor(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapt(folder, adapter, target_modules=["q_proj", "v_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(name for name in tensors if "layers.1" in name and "lora_B" in name)
    kept = tensors[key].clone()
    tensors[key].view(-1)[0] = NAN
    save_file(tensors, file)
    with pytest.raises(NotFiniteError, match=rf"adapter_model\.safetensors: {key} is not finite"):
        load_model(folder, adapter=adapter, device="cpu")
    tensors[key] = kept * 1e30
    save_file(tensors, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for alpha, said in (
        (1e20, r"adapter: model\.layers\.1.* merged is not finite"),
        (1e308, r"adapter_config\.json has a lora_alpha that is too large"),
        (INF, r"adapter_config\.json is not a JSON file that can be read: Infinity is no number"),
        (
            10**400,
            r"adapter_config\.json is not a JSON file that can be read: the number 1000.*digits",
        ),
    ):
        changed = json.dumps({**config, "lora_alpha": alpha})
        (adapter / "adapter_config.json").write_text(changed)
        with pytest.raises(InputError, match=said):
            load_model(folder, adapter=adapter, device="cpu")


def test_the_command_line_says_it_in_a_sentence(tmp_path: Path, capsys: Any) -> None:
    source = Path(__file__).parents[1] / "data/default_pair/base"
    folder = Path(shutil.copytree(source, tmp_path / "base"))
    poisoned(folder, "model.layers.1.self_attn.k_proj.weight", INF)
    command = ["discover", "--base", str(folder), "--tuned", "none", "--out", str(tmp_path / "out")]
    assert main([*command, "--prompts", "4"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.layers.1.self_attn.k_proj.weight is not finite: 1 of its" in said
