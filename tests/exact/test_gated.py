"""Gates on nodes: the exact engine against plain runs, gradients against finite differences."""

from dataclasses import replace

import pytest
import torch

from tests.random_models import random_model, random_prompts
from tl_entity import (
    Head,
    InputError,
    Node,
    PromptBatch,
    evaluate,
    load_model,
    pooled_ablation,
    resample_ablation,
    zero_ablation,
)
from tl_entity.exact.blocks import unembed
from tl_entity.exact.gated import GatedRun
from tl_entity.hooks import answer_logits
from tl_entity.hooks.gates import GateHeads, Gates, gate_nodes
from tl_entity.metrics import log_probability
from tl_entity.tasks.boxes import box_prompts

ROLES = ("subject", "verb", "rest")


def with_roles(prompts: PromptBatch, seed: int) -> PromptBatch:
    generator = torch.Generator().manual_seed(seed)
    roles = torch.randint(0, 3, prompts.tokens.shape, generator=generator)
    return replace(prompts, roles=roles.masked_fill(~prompts.mask, -1), role_names=ROLES)


def case(n_kv_heads: int, left: bool, kind: str):
    model = random_model(n_kv_heads=n_kv_heads)
    prompts = with_roles(random_prompts(5, 9, left=left), 1)
    others = with_roles(random_prompts(20, 9, left=left, seed=5), 2)
    ablation = {
        "pooled": lambda: pooled_ablation(model, others, mlps=True),
        "resample": lambda: resample_ablation(model, others, seed=0, mlps=True),
        "zero": zero_ablation,
    }[kind]()
    return model, prompts, ablation.of_model(model.cfg)


def some_gates(model, *, mlps: bool) -> list[Gates]:
    """Of every kind: anything between, kept and ablated, all kept, and begun at a later layer. No
    gate has the role `rest`."""
    generator = torch.Generator().manual_seed(0)
    blank = Gates.filled(model.cfg, ("verb", "subject"), 1, mlps=mlps)
    between = torch.rand(blank.flat().shape, generator=generator, dtype=torch.float64)
    late = blank.with_values(between.clone())
    late.heads[:2] = 1
    if late.mlps is not None:
        late.mlps[:2] = 1
    values = (between, (between > 0.6).double(), torch.ones_like(between))
    return [late, *(blank.with_values(some) for some in values)]


@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("kind", ["pooled", "resample", "zero"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_runs_with_gates_are_plain_runs_with_hooks(n_kv_heads, left, kind, mlps) -> None:
    model, prompts, ablation = case(n_kv_heads, left, kind)
    each = some_gates(model, mlps=mlps)
    expected = torch.stack(
        [answer_logits(model, prompts, gate_nodes(gates, ablation, prompts)) for gates in each]
    )
    run = GatedRun.prepare(model, prompts, ablation)
    for memory in (None, 1):
        found = unembed(model, run.answer_resid_each(each, memory=memory))
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    one_by_one = torch.stack([unembed(model, run.answer_resid(gates)) for gates in each])
    torch.testing.assert_close(one_by_one, expected, atol=1e-9, rtol=0)
    apart = (expected[1:] - expected[:1]).abs().amax((1, 2))
    assert bool((apart > 0.01).all())


@pytest.mark.parametrize("memory", [None, 1])
@pytest.mark.parametrize("mlps", [False, True])
@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_gradients_of_gates_are_finite_differences(engine, mlps, memory) -> None:
    """With little memory every layer is computed again on the way back."""
    model, prompts, ablation = case(2, True, "pooled")
    gates = some_gates(model, mlps=mlps)[1]
    run = GatedRun.prepare(model, prompts, ablation)

    def score(values: torch.Tensor) -> torch.Tensor:
        some = gates.with_values(values)
        if engine == "exact":
            logits = unembed(model, run.answer_resid(some, memory=memory))
        else:
            logits = answer_logits(model, prompts, gate_nodes(some, ablation, prompts))
        return log_probability(logits, prompts.answers).mean()

    values = gates.flat().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(values), values)
    step = 1e-6
    with torch.no_grad():
        for node in range(len(values)):
            moved = torch.zeros_like(values)
            moved[node] = step
            slope = (score(values + moved) - score(values - moved)) / (2 * step)
            assert abs(slope - gradient[node]) < 1e-7 * max(1, abs(slope))
    assert gradient.abs().min() > 0


def test_gates_of_0_and_1_are_a_circuit_by_role() -> None:
    model, prompts, ablation = case(2, False, "pooled")
    nodes = [Node(0, 1, "verb"), Node(1, 3, "subject"), Node(2, 0, "subject"), Node(2, 0, "verb")]
    kept = {
        "verb": [Head(0, 1), Head(2, 0)],
        "subject": [Head(1, 3), Head(2, 0)],
    }
    expected = evaluate(model, prompts, keep=kept, ablation=ablation, engine="hooks")
    gates = Gates.keeping(nodes, model.cfg, ROLES)
    assert set(gates.nodes) == set(nodes)
    run = GatedRun.prepare(model, prompts, ablation)
    found = log_probability(unembed(model, run.answer_resid_each([gates])[0]), prompts.answers)
    torch.testing.assert_close(found, expected.answer_log_probability, atol=1e-9, rtol=0)


def test_a_kept_mlp_is_itself_and_an_ablated_one_is_not() -> None:
    model, prompts, ablation = case(4, False, "pooled")
    heads = [Node(layer, head, role) for layer in range(3) for head in range(4) for role in ROLES]
    mlps = [Node(layer, None, role) for layer in range(3) for role in ROLES]
    run = GatedRun.prepare(model, prompts, ablation)
    whole, without = (
        unembed(model, run.answer_resid(Gates.keeping(nodes, model.cfg, ROLES, mlps=True)))
        for nodes in (heads + mlps, heads + mlps[:-1])
    )
    torch.testing.assert_close(whole, answer_logits(model, prompts), atol=1e-9, rtol=0)
    at_last = prompts.roles[torch.arange(5), prompts.position("last")] == ROLES.index("rest")
    moved = (whole - without).abs().amax(1)
    # The last layer's MLP is read at the answer's token alone.
    assert bool((moved[at_last] > 0.01).all()) and bool((moved[~at_last] < 1e-9).all())
    assert 0 < int(at_last.sum()) < 5


def test_nodes_are_in_one_order() -> None:
    model, *_ = case(4, False, "zero")
    gates = Gates.filled(model.cfg, ROLES, 0, mlps=True)
    nodes = gates.all_nodes
    assert len(nodes) == 3 * 3 * 4 + 3 * 3
    for index in (0, 5, 17, 35, 36, 44):
        values = torch.zeros(len(nodes), dtype=torch.float64)
        values[index] = 1
        assert gates.with_values(values).nodes == (nodes[index],)
        kept = Gates.keeping([nodes[index]], model.cfg, ROLES, mlps=True)
        assert torch.equal(kept.flat(), values)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_hooks_work_on_any_hooked_model(backend) -> None:
    model, exact = (load_model("default-base", backend=b) for b in (backend, "hooked"))
    prompts, others = (box_prompts(exact.tokenizer, n, n_boxes=3, seed=n) for n in (4, 20))
    ablation = pooled_ablation(exact, others, mlps=True)
    gates = Gates.filled(exact.cfg, prompts.role_names, 0.6, mlps=True)
    found = answer_logits(model, prompts, gate_nodes(gates, ablation, prompts))
    run = GatedRun.prepare(exact, prompts, ablation)
    torch.testing.assert_close(found, unembed(exact, run.answer_resid(gates)), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("node", "mlps", "reason"),
    [
        (Node(3, 0, "verb"), False, "has no L3H0@verb; it has 3 layers of 4 heads"),
        (Node(0, 4, "verb"), False, "has no L0H4@verb"),
        (Node(0, 0, "noun"), False, "at none of the roles subject, verb, rest"),
        (Node(0, None, "verb"), False, "MLP0@verb is an MLP, and these gates are of heads alone"),
        (Node(7, None, "verb"), True, "has no MLP7@verb"),
    ],
)
def test_nodes_that_are_not_there_are_refused(node, mlps, reason) -> None:
    model, *_ = case(4, False, "zero")
    with pytest.raises(InputError, match=reason):
        Gates.keeping([node], model.cfg, ROLES, mlps=mlps)


def test_gates_that_do_not_fit_are_refused() -> None:
    model, prompts, _ = case(4, False, "zero")
    heads_only = pooled_ablation(model, prompts)
    gates = Gates.filled(model.cfg, ROLES, 0.5, mlps=True)
    run = GatedRun.prepare(model, prompts, heads_only)
    for use in (run.answer_resid, lambda some: gate_nodes(some, heads_only, prompts)):
        with pytest.raises(InputError, match=r"MLPs can't be ablated.*mlps=True"):
            use(gates)
    with pytest.raises(InputError, match=r"ablation\.of_model"):
        gate_nodes(gates, zero_ablation(), prompts)
    other = Gates.filled(random_model(n_heads=2).cfg, ROLES, 0.5)
    with pytest.raises(InputError, match="the gates are for 3 of 2"):
        run.answer_resid(other)
    bare = replace(prompts, roles=None, role_names=())
    with pytest.raises(InputError, match="the prompts have no roles"):
        gate_nodes(other, zero_ablation().of_model(random_model(n_heads=2).cfg), bare)
    edit = GateHeads(torch.ones(5, 9, 4), torch.zeros(5, 9, dtype=torch.long), torch.zeros(1, 4, 8))
    with pytest.raises(InputError, match=r"z has shape \(5, 8, 4, 8\); the gates are made for"):
        edit(torch.zeros(5, 8, 4, 8), type("Point", (), {"name": "z"}))
