"""Every method that runs a model, called on random prompts: for what must hold of all of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.random_models import random_model
from tl_entity import (
    Circuit,
    Group,
    Head,
    MaskedForward,
    Node,
    PairBatch,
    PromptBatch,
    Stage,
    activation_patch,
    attention_over_prompt,
    carries,
    cmap,
    cmap_by_group,
    completeness,
    discover_circuit,
    evaluate,
    evaluate_circuits,
    evaluate_removals,
    four_corners,
    index_ablation,
    knock_out_attention,
    learn_mask,
    learn_masks,
    logit_attribution,
    logit_lens,
    mean_head_outputs,
    mechanism_edges,
    minimality,
    patch_grid,
    path_patch,
    path_patch_mlps,
    pooled_ablation,
    resample_ablation,
    summarize_attention,
    weight_shares,
    zero_ablation,
)
from tl_entity.hooks import answer_logits, hook_point, patch_from_model, record
from tl_entity.hooks.gates import Gates
from tl_entity.methods.gated_forward import GatedForward

HEADS = [Head(1, 0), Head(2, 3)]
CIRCUIT = Circuit((Group("late", "last", tuple(HEADS)), Group("early", "place", (Head(0, 1),))))
ROLES = ("first", "middle", "last")
NODES = (
    Node(0, 1, "first"),
    Node(1, 0, "last"),
    Node(1, None, "last"),
    Node(2, 1, "last"),
)
STAGES = (Stage("late", "last"), Stage("early", "last", into="late", receiver_input="q"))

Call = Callable[[Any, PairBatch, str], Any]


def means(model: Any) -> torch.Tensor:
    """Values for ablated heads that no run has made."""
    cfg = model.cfg
    generator = torch.Generator().manual_seed(1)
    shape = (cfg.n_layers, 64, cfg.n_heads, cfg.d_head)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(cfg.dtype)


def in_roles(prompts: PromptBatch) -> PromptBatch:
    """The prompts with the roles of their first and last tokens, and of those between."""
    roles = torch.ones_like(prompts.tokens)
    if len(prompts):
        roles[torch.arange(len(prompts)), prompts.mask.int().argmax(1)] = 0
    roles[prompts.where("last")] = 2
    return replace(prompts, roles=roles.masked_fill(~prompts.mask, -1), role_names=ROLES)


def role_pairs(pairs: PairBatch) -> PairBatch:
    """The pairs with roles."""
    return replace(pairs, clean=in_roles(pairs.clean), corrupt=in_roles(pairs.corrupt))


def nodes_alone(model: Any, pairs: PairBatch, engine: Any) -> torch.Tensor:
    """How sure the model is with some nodes left, and with a circuit."""
    forward = GatedForward.of(model, zero_ablation(), engine=engine)
    recorded = forward.record(role_pairs(pairs))
    gates = Gates.keeping(NODES, model.cfg, ROLES, mlps=True)
    circuit = Circuit((Group("all", "last", tuple(HEADS)),))
    (some,) = forward.evaluate(recorded, [gates])
    found = (some, forward.evaluate_circuit(recorded, circuit))
    return torch.stack([each.alone.answer_log_probability for each in found])


def gate_gradient(model: Any, pairs: PairBatch, engine: Any) -> torch.Tensor:
    """The gradient of half-open gates."""
    forward = GatedForward.of(model, zero_ablation(), engine=engine)
    gates = Gates.filled(model.cfg, ROLES, 0.5, mlps=True)
    return forward.gradient(forward.record(role_pairs(pairs)), gates, "metric")[1]


@torch.inference_mode(False)
def other_model(model: Any) -> Any:
    """A random model of the same shape."""
    cfg = model.cfg
    sizes = {"n_kv_heads": cfg.n_key_value_heads, "d_model": cfg.d_model}
    return random_model(**sizes, dtype=cfg.dtype, seed=9)


METHODS: dict[str, Call] = {
    "path_patch": lambda m, p, e: path_patch(m, p, engine=e).per_example,
    "path_patch into v": lambda m, p, e: (
        path_patch(
            m, p, position="place", receivers=HEADS, receiver_input="v", engine=e
        ).per_example
    ),
    "path_patch into q and k": lambda m, p, e: (
        path_patch(m, p, receivers={"q": HEADS, "k": HEADS[1:]}, engine=e).per_example
    ),
    "path_patch_mlps": lambda m, p, e: path_patch_mlps(m, p, engine=e).per_example,
    "discover_circuit": lambda m, p, e: (
        discover_circuit(m, p, sizes={"late": 2, "early": 1}, stages=STAGES, engine=e)
        .scores["early"]
        .per_example
    ),
    "evaluate": lambda m, p, e: evaluate(m, p.clean, engine=e).answer_log_probability,
    "evaluate keep": lambda m, p, e: (
        evaluate(m, p.clean, keep=CIRCUIT, mean_outputs=means(m), engine=e).answer_log_probability
    ),
    "evaluate remove": lambda m, p, e: (
        evaluate(m, p.clean, remove=CIRCUIT, mean_outputs=means(m), engine=e).answer_log_probability
    ),
    "evaluate_circuits": lambda m, p, e: (
        evaluate_circuits(m, p.clean, [CIRCUIT, {}], mean_outputs=means(m), engine=e)[
            0
        ].answer_log_probability
    ),
    "evaluate_removals": lambda m, p, e: (
        evaluate_removals(m, p.clean, [CIRCUIT, {}], mean_outputs=means(m), engine=e)[
            0
        ].answer_log_probability
    ),
    "completeness": lambda m, p, e: (
        completeness(m, p.clean, CIRCUIT, mean_outputs=means(m), seed=0, n_random=1, engine=e)
        .groups[0]
        .of_circuit.answer_log_probability
    ),
    "minimality": lambda m, p, e: (
        minimality(
            m, p.clean, CIRCUIT, mean_outputs=means(m), seed=0, engine=e
        ).of_circuit.answer_log_probability
    ),
    "learn_mask": lambda m, p, e: learn_mask(m, p, HEADS, position="last", engine=e).trajectory,
    "learn_masks": lambda m, p, e: (
        learn_masks(m, p, HEADS, position="last", seeds=[0], engine=e).runs[0].mask.trajectory
    ),
    "MaskedForward": lambda m, p, e: MaskedForward(m, HEADS, position="last", engine=e)(p).detach(),
    "activation_patch": lambda m, p, e: (
        activation_patch(m, p, CIRCUIT, engine=e).answer_log_probability
    ),
    "carries": lambda m, p, e: torch.tensor(
        [
            found.accuracy
            for found in carries(m, {"x": lambda seed: p}, CIRCUIT, seeds=[0], engine=e).entries
        ]
    ),
    "cmap": lambda m, p, e: cmap(m, m, p.clean, CIRCUIT, engine=e).answer_log_probability,
    "cmap of k and v": lambda m, p, e: (
        cmap(m, m, p.clean, CIRCUIT, patch="kv", engine=e).answer_log_probability
    ),
    "cmap_by_group": lambda m, p, e: (
        cmap_by_group(m, m, p.clean, CIRCUIT, seed=0, engine=e).base.answer_log_probability
    ),
    "knock_out_attention": lambda m, p, e: knock_out_attention(
        m, p.clean, from_position="last", to_position="early", engine=e
    ),
    "nodes alone": nodes_alone,
    "gradient of gates": gate_gradient,
    "mechanism_edges": lambda m, p, e: (
        mechanism_edges(m, role_pairs(p), NODES, engine=e).per_example
    ),
    "patch_grid": lambda m, p, e: (
        patch_grid(m, p, tokens=["early", "place", "last"], engine=e).per_example
    ),
    "patch_grid of heads": lambda m, p, e: (
        patch_grid(m, p, "z", into="corrupt", tokens=["early", "last"], engine=e).per_example
    ),
    "four_corners": lambda m, p, e: four_corners(m, m, p, engine=e).change,
}
"""By name; called with a model, pairs and the engine."""

PLAIN_RUNS: dict[str, Call] = {
    "mean_head_outputs": lambda m, p, e: mean_head_outputs(m, p.clean),
    "index_ablation": lambda m, p, e: index_ablation(m, p.clean).outputs,
    "pooled_ablation": lambda m, p, e: pooled_ablation(m, in_roles(p.clean), mlps=True).outputs,
    "resample_ablation": lambda m, p, e: (
        resample_ablation(m, in_roles(p.clean), seed=0, mlps=True).outputs
    ),
    "summarize_attention": lambda m, p, e: (
        summarize_attention(m, p.clean, HEADS, from_position="last").weights
    ),
    "attention_over_prompt": lambda m, p, e: attention_over_prompt(m, p.clean, HEADS).weights,
    "logit_attribution": lambda m, p, e: logit_attribution(m, p).per_example,
    "logit_lens": lambda m, p, e: logit_lens(m, p).per_example,
    "record": lambda m, p, e: record(m, p.clean, {hook_point("z", 2): "last"})[hook_point("z", 2)],
    "answer_logits": lambda m, p, e: answer_logits(m, p.clean),
    "patch_from_model": lambda m, p, e: answer_logits(
        m, p.clean, patch_from_model(m, m, p.clean, CIRCUIT)
    ),
}
"""Those that have no engine."""

WEIGHTS: dict[str, Call] = {
    "weight_shares": lambda m, p, e: weight_shares(m, other_model(m), p, max_points=5).per_prompt,
}
"""Those that have no engine and take no TransformerBridge."""

CALLS: dict[str, Callable[[Any, PairBatch], Any]] = {
    **{
        f"{name}, {engine}": lambda m, p, call=call, engine=engine: call(m, p, engine)
        for name, call in METHODS.items()
        for engine in ("exact", "hooks")
    },
    **{
        name: lambda m, p, call=call: call(m, p, "hooks")
        for name, call in {**PLAIN_RUNS, **WEIGHTS}.items()
    },
}
"""All of them, each with every engine."""

ON_BRIDGE = {
    name: call for name, call in CALLS.items() if not name.endswith("exact") and name not in WEIGHTS
}
"""Those that a TransformerBridge takes."""
