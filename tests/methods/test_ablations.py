"""What each ablation leaves in, against means and draws taken by hand."""

from dataclasses import replace

import pytest
import torch

from tl_entity import (
    Ablation,
    Circuit,
    Head,
    InputError,
    PromptBatch,
    box_prompts,
    discovery_pairs,
    evaluate,
    index_ablation,
    load_model,
    mean_head_outputs,
    minimality,
    pooled_ablation,
    resample_ablation,
    zero_ablation,
)
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import record
from tl_entity.models.registry import planted_circuit

MODEL = load_model("default-base")
TOKENIZER = MODEL.tokenizer
PROMPTS = box_prompts(TOKENIZER, 200, n_boxes=7, seed=11)
OTHERS = discovery_pairs(TOKENIZER, 200, n_boxes=7, seed=12).corrupt
SHAPE = (MODEL.cfg.n_layers, MODEL.cfg.n_heads, MODEL.cfg.d_head)


def all_z(prompts: PromptBatch) -> torch.Tensor:
    points = [hook_point("z", layer) for layer in range(SHAPE[0])]
    seen = record(MODEL, prompts, dict.fromkeys(points))
    return torch.stack([seen[point] for point in points])


@pytest.fixture(scope="module")
def ablations() -> dict[str, Ablation]:
    return {
        "pooled": pooled_ablation(MODEL, OTHERS, mlps=True),
        "resample": resample_ablation(MODEL, OTHERS, seed=0, mlps=True),
        "index": index_ablation(MODEL, OTHERS),
        "zero": zero_ablation(),
    }


def test_pooled_outputs_are_the_mean_over_all_tokens_of_a_role(ablations) -> None:
    pooled, z = ablations["pooled"], all_z(OTHERS)
    for name in ("label", "object", "last"):
        expected = z[:, OTHERS.where(name)].double().mean(1)
        found = pooled.outputs[:, pooled.role_names.index(name)]
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    rows = pooled.rows(PROMPTS)
    assert pooled.role_names[rows[3, PROMPTS.position("previous_query_label")[3]]] == "label"
    point = hook_point("mlp_out", 2)
    out = record(MODEL, OTHERS, {point: None})[point]
    torch.testing.assert_close(
        pooled.mlp_outputs[2, pooled.role_names.index("label")].double(),
        out[OTHERS.where("label")].double().mean(0),
        atol=1e-5,
        rtol=0,
    )


def test_pooled_outputs_do_not_depend_on_the_batch_size() -> None:
    few = OTHERS[:9]
    whole, parts = pooled_ablation(MODEL, few), pooled_ablation(MODEL, few, batch_size=2)
    torch.testing.assert_close(whole.outputs, parts.outputs, atol=1e-6, rtol=1e-5)


def test_resampled_outputs_are_those_of_another_prompts_token_of_the_role(ablations) -> None:
    resample, z = ablations["resample"], all_z(OTHERS)
    rows = resample.rows(PROMPTS)
    names = [PROMPTS.role_names[role] for role in PROMPTS.roles[0].tolist()]
    drawn = [resample.role_names[role] for role in resample.row_roles[rows[0]].tolist()]
    assert drawn == names
    at = int(PROMPTS.position("previous_query_label")[0])
    source = int(resample.row_prompts[rows[0, at]])
    found = resample.outputs[:, rows[0, at]]
    there = z[:, source, OTHERS.where("label")[source]]
    assert any(torch.equal(found, there[:, k]) for k in range(7))
    # The seven labels of a prompt draw from many prompts and all segments.
    assert len(set(resample.row_prompts[rows[PROMPTS.where("label")]].tolist())) > 150


def test_a_prompt_draws_the_same_whatever_stands_beside_it_and_never_itself() -> None:
    resample = resample_ablation(MODEL, PROMPTS[:40], seed=3)
    rows = resample.rows(PROMPTS[:40])
    assert torch.equal(rows[17:19], resample.rows(PROMPTS[17:19]))
    own = torch.arange(40)[:, None]
    assert bool((resample.row_prompts[rows] != own).all())
    again = resample_ablation(MODEL, PROMPTS[:40], seed=4)
    assert not torch.equal(rows, again.rows(PROMPTS[:40]))
    with pytest.raises(InputError, match="No other prompt has a token of role"):
        resample_ablation(MODEL, PROMPTS[:1], seed=0).rows(PROMPTS[:1])


def test_index_outputs_are_the_papers(ablations) -> None:
    means = mean_head_outputs(MODEL, OTHERS)
    assert torch.equal(ablations["index"].outputs, means)
    circuit = Circuit.load(planted_circuit("default-base"))
    by_tensor = evaluate(MODEL, PROMPTS, keep=circuit, mean_outputs=means)
    by_ablation = evaluate(MODEL, PROMPTS, keep=circuit, ablation=ablations["index"])
    assert torch.equal(by_tensor.answer_log_probability, by_ablation.answer_log_probability)


@pytest.mark.parametrize("kind", ["pooled", "resample", "index", "zero"])
@pytest.mark.parametrize("what", ["keep", "remove"])
def test_engines_agree_under_every_ablation(kind, what, ablations) -> None:
    model = load_model("default-base", dtype="float64")
    circuit = Circuit.load(planted_circuit("default-base"))
    some = PROMPTS[:20]
    chosen = (
        {what: circuit} if what == "remove" else {what: circuit, "remove": {"label": [Head(0, 3)]}}
    )
    for how in (chosen, {what: {"label": [Head(0, 3), Head(1, 0)], "last": [Head(2, 0)]}}):
        exact, hooks = (
            evaluate(model, some, **how, ablation=ablations[kind], engine=engine, batch_size=7)
            for engine in ("exact", "hooks")
        )
        torch.testing.assert_close(
            exact.answer_log_probability, hooks.answer_log_probability, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("name", ["default-base", "default-tuned"])
def test_only_the_papers_ablation_leaves_what_the_structure_readers_do(name) -> None:
    """The planted readers of a segment's label do nothing that the mean of that very token does
    not do as well; the mean over all seven labels, or another prompt's label, does not."""
    model = load_model(name)
    readers = {"previous_query_label": Circuit.load(planted_circuit(name)).struct_reader}
    others = OTHERS
    whole = evaluate(model, PROMPTS).accuracy
    without = {
        kind: evaluate(model, PROMPTS, remove=readers, ablation=ablation).accuracy
        for kind, ablation in {
            "index": index_ablation(model, others),
            "pooled": pooled_ablation(model, others),
            "resample": resample_ablation(model, others, seed=0),
        }.items()
    }
    assert without["index"] > whole - 0.05
    assert without["pooled"] < 0.3
    assert without["resample"] < 0.25


def test_pooling_the_labels_alone_leaves_the_rest_by_index() -> None:
    labels = pooled_ablation(MODEL, OTHERS, roles=["label"])
    means = mean_head_outputs(MODEL, OTHERS)
    rows = labels.rows(PROMPTS)
    at = PROMPTS.where("label")[0]
    torch.testing.assert_close(labels.outputs[:, rows[0, ~at]], means[:, ~at])
    pooled = means[:, at].mean(1, keepdim=True).expand(-1, 7, -1, -1)
    torch.testing.assert_close(labels.outputs[:, rows[0, at]], pooled, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="no token of role nowhere"):
        pooled_ablation(MODEL, OTHERS, roles=["nowhere"])


def test_planted_readers_are_needed_once_their_tokens_index_is_gone() -> None:
    """The paper's means by index drop planted heads that do just what the means do."""
    model = load_model("default-tuned")
    planted = Circuit.load(planted_circuit("default-tuned"))

    def kept(ablation: Ablation) -> dict[str, bool]:
        found = minimality(model, PROMPTS, planted, ablation=ablation, seed=0)
        return {str(head.head): head.kept for head in found.heads}

    by_index, pooled = (
        kept(ablation)
        for ablation in (
            index_ablation(model, OTHERS),
            pooled_ablation(model, OTHERS, roles=["label"]),
        )
    )
    readers = {str(head) for head in planted.struct_reader}
    assert {head for head, needed in by_index.items() if not needed} & readers
    assert all(pooled.values()) and len(pooled) == 10


def test_ablations_that_do_not_fit_are_refused(ablations) -> None:
    how = {"keep": {"last": [Head(2, 0)]}}
    with pytest.raises(InputError, match="not both"):
        evaluate(
            MODEL,
            PROMPTS,
            **how,
            ablation=ablations["pooled"],
            mean_outputs=ablations["index"].outputs,
        )
    with pytest.raises(InputError, match=r"give mean_outputs .* or an ablation"):
        evaluate(MODEL, PROMPTS, **how)
    bare = PromptBatch(PROMPTS.tokens, PROMPTS.answers, PROMPTS.positions)
    for kind in ("pooled", "resample"):
        with pytest.raises(InputError, match=f"The {kind} ablation .* the prompts have no roles"):
            evaluate(MODEL, bare, **how, ablation=ablations[kind])
    for make in (pooled_ablation, lambda m, p: resample_ablation(m, p, seed=0)):
        with pytest.raises(InputError, match="can't be taken by role"):
            make(MODEL, bare)
    renamed = PromptBatch(
        PROMPTS.tokens,
        PROMPTS.answers,
        {"last": PROMPTS.position("last")},
        roles=PROMPTS.roles,
        role_names=tuple(f"my {name}" for name in PROMPTS.role_names),
    )
    with pytest.raises(InputError, match="knows no token of role 'my beginning'"):
        evaluate(MODEL, renamed, **how, ablation=ablations["pooled"])


def test_an_ablation_is_kept_and_shown(ablations, tmp_path) -> None:
    for kind, ablation in ablations.items():
        ablation.save(tmp_path / kind)
        again = Ablation.load(tmp_path / kind)
        assert torch.equal(again.rows(PROMPTS), ablation.rows(PROMPTS))
        assert str(ablation).startswith(f"{kind}: leaves")
        assert len(ablation.to_dataframe())


def test_roles_work_with_prompts_padded_on_either_side() -> None:
    """Two lengths of prompts: the same answers with the padding on the left."""
    short, long = (box_prompts(TOKENIZER, 6, n_boxes=n, seed=5) for n in (3, 5))
    pooled = pooled_ablation(MODEL, discovery_pairs(TOKENIZER, 30, n_boxes=5, seed=6).corrupt)
    width, length = long.tokens.shape[1], short.tokens.shape[1]
    pad = width - length

    def padded(tokens: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat([torch.full((len(tokens), pad), value), tokens], 1)

    left = PromptBatch(
        padded(short.tokens, 0),
        short.answers,
        {name: index + pad for name, index in short.positions.items()},
        padded(torch.ones_like(short.tokens), 0),
        padded(short.roles, -1),
        short.role_names,
    )
    circuit = Circuit.load(planted_circuit("default-base"))
    for engine in ("exact", "hooks"):
        found, expected = (
            evaluate(MODEL, batch, keep=circuit, ablation=pooled, engine=engine)
            for batch in (left, short)
        )
        torch.testing.assert_close(
            found.answer_log_probability, expected.answer_log_probability, atol=1e-4, rtol=1e-4
        )


def test_outputs_are_not_taken_by_a_role_that_tells_what_is_asked() -> None:
    asked = PROMPTS.position("previous_query_label")
    roles = PROMPTS.roles.clone()
    names = (*PROMPTS.role_names, "asked label")
    roles[torch.arange(len(PROMPTS)), asked] = len(names) - 1
    telling = replace(PROMPTS, roles=roles, role_names=names, knowing=("asked label",))
    for take in (pooled_ablation, lambda *given: resample_ablation(*given, seed=0)):
        with pytest.raises(InputError, match="role asked label, which tells what is asked"):
            take(MODEL, telling)
