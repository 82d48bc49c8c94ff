"""Two mechanisms compared: what is shared, and what chance would share."""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest

from tests.random_models import random_model
from tests.with_roles import role_pairs
from tl_entity import (
    Faithfulness,
    GateTraining,
    Head,
    InputError,
    MechanismComparison,
    Node,
    box_prompts,
    compare_mechanisms,
    evaluate,
    find_mechanism,
    load_model,
    mechanism_edges,
    zero_ablation,
)
from tl_entity.stats import overlap_of_choices

ROLES = ("even", "odd", "last")
CANDIDATES = [Node(layer, head, r) for layer in range(3) for head in range(4) for r in ROLES]
BASE = [Node(0, 1, "odd"), Node(0, 2, "odd"), Node(1, 2, "last"), Node(2, 0, "last")]
TUNED = [Node(0, 1, "odd"), Node(0, 3, "even"), Node(1, 2, "last"), Node(2, 1, "last")]


def test_what_is_shared_gained_and_lost() -> None:
    nodes = compare_mechanisms(BASE, TUNED, candidates=CANDIDATES).nodes
    assert nodes.shared == (Node(0, 1, "odd"), Node(1, 2, "last"))
    assert nodes.gained == (Node(0, 3, "even"), Node(2, 1, "last"))
    assert nodes.lost == (Node(0, 2, "odd"), Node(2, 0, "last"))
    assert nodes.jaccard == pytest.approx(2 / 6)


def test_chance_is_drawn_within_layers_and_kinds() -> None:
    nodes = compare_mechanisms(BASE, TUNED, candidates=CANDIDATES).nodes
    # Two of each in a layer of 12, and one of each in two such layers.
    assert nodes.chance.expected == pytest.approx(2 * 2 / 12 + 1 / 12 + 1 / 12)
    none_shared = (10 * 9 / (12 * 11)) * (11 / 12) ** 2
    assert nodes.chance.probabilities[0] == pytest.approx(none_shared)
    # Within roles: 2 and 1 of 4 heads at `odd`, 1 and 1 at `last` twice, none at `even` by both.
    assert nodes.chance_in_roles.expected == pytest.approx(2 / 4 + 1 / 4 + 1 / 4)
    with_mlps = [*CANDIDATES, *(Node(layer, None, r) for layer in range(3) for r in ROLES)]
    mlp = Node(1, None, "last")
    more = compare_mechanisms([*BASE, mlp], [*TUNED, mlp], candidates=with_mlps).nodes
    assert more.chance.expected == pytest.approx(nodes.chance.expected + 1 / 3)


def test_unrelated_mechanisms_with_the_same_layers_and_roles_are_told_to_be() -> None:
    """By simulation: two that have their roles in each layer in common, and nothing else."""
    heads, found = range(14), []
    generator = np.random.default_rng(0)
    candidates = [Node(layer, head, r) for layer in range(6) for head in heads for r in ROLES]

    def drawn() -> list[Node]:
        return [
            Node(layer, int(head), ROLES[layer % 3])
            for layer in range(6)
            for head in generator.choice(14, 5, replace=False)
        ]

    for _ in range(400):
        found.append(compare_mechanisms(drawn(), drawn(), candidates=candidates).nodes)
    assert np.mean([nodes.p_value_in_roles < 0.05 for nodes in found]) <= 0.06
    # Chance by layers alone takes the roles for a finding, so the line gives both.
    assert np.mean([nodes.p_value < 0.05 for nodes in found]) > 0.5
    assert f"p = {found[0].p_value_in_roles:.2g}" in str(found[0])


def test_choices_from_populations_that_differ_by_counting_them_all() -> None:
    ours, theirs = range(5), range(3, 9)  # 3 and 4 are in both
    counts = np.zeros(3)
    for one in combinations(ours, 3):
        for other in combinations(theirs, 2):
            counts[len({*one} & {*other})] += 1
    found = overlap_of_choices(5, 3, 6, 2, 2)
    np.testing.assert_allclose(found.probabilities, counts / counts.sum())
    with pytest.raises(ValueError, match="can't be common"):
        overlap_of_choices(2, 1, 6, 2, 3)


def test_edges_and_the_ceiling_are_compared_too(tmp_path) -> None:
    pairs = role_pairs(12)
    models = [random_model(seed=seed) for seed in (0, 1)]
    edges = tuple(
        mechanism_edges(model, pairs, nodes)
        for model, nodes in zip(models, (BASE, TUNED), strict=True)
    )
    found = compare_mechanisms(
        BASE, TUNED, candidates=CANDIDATES, edges=edges, again={"base": BASE[:3]}
    )
    assert found.edges is not None
    ours, theirs = (set(some.top(20, clear=True)) for some in edges)
    assert set(found.edges.shared) == ours & theirs
    assert set(found.edges.gained) == theirs - ours and set(found.edges.lost) == ours - theirs
    assert len(found.edges.chance.probabilities) > len(ours & theirs)
    assert found.ceiling["base"].jaccard == 0.75
    assert found.to_dataframe()["what"].tolist() == [
        "nodes",
        "nodes, chance within roles",
        "edges",
        "nodes, base found again",
    ]
    found.save(tmp_path / "compared.safetensors")
    again = MechanismComparison.load(tmp_path / "compared.safetensors")
    assert again.nodes == found.nodes and again.edges == found.edges
    same = compare_mechanisms(BASE, BASE, candidates=CANDIDATES, edges=(edges[0], edges[0]))
    assert same.edges is not None and not (same.edges.gained or same.edges.lost)


def test_each_mechanism_is_measured_in_each_model() -> None:
    pairs = role_pairs(12)
    models = (random_model(seed=0), random_model(seed=1))

    @dataclass
    class Alone:
        nodes: list[Node]

        def evaluate(self, model, prompts):
            heads = {
                node.role: [Head(*n[:2]) for n in self.nodes if n.role == node.role]
                for node in self.nodes
            }
            alone = evaluate(model, prompts, keep=heads, ablation=zero_ablation())
            whole = evaluate(model, prompts)
            self.faithfulness = Faithfulness.of(alone, whole, seed=0)
            return self

    # Prompts that both models answer: the first model's own answers.
    answers = evaluate(models[0], pairs.clean).predicted
    prompts = replace(pairs.clean, answers=answers)
    found = compare_mechanisms(
        Alone(BASE), Alone(TUNED), candidates=CANDIDATES, models=models, prompts=prompts
    )
    table = found.faithfulness_dataframe()
    assert table["mechanism"].tolist() == [
        "base in base",
        "base in tuned",
        "tuned in base",
        "tuned in tuned",
    ]
    assert table["of_model"].tolist()[::2] == [1.0, 1.0]
    expected = evaluate(
        models[0],
        prompts,
        keep={"odd": [Head(0, 1), Head(0, 2)], "last": [Head(1, 2), Head(2, 0)]},
        ablation=zero_ablation(),
    )
    assert table["accuracy"][0] == expected.accuracy


def test_each_mechanism_is_measured_in_each_model_beside_random_nodes(tmp_path) -> None:
    models = tuple(load_model(name) for name in ("default-base", "default-tuned"))
    tokenizer = models[0].tokenizer
    drawn = box_prompts(tokenizer, 120, n_boxes=3, seed=5)
    training = GateTraining(
        first_steps=8, steps=4, prompts_per_step=8, prompts_scored=8, most_prices=4, prunings=0
    )
    how = {"target": 0.5, "agreement": 0.5, "training": training, "curve": (), "n_random": 0}
    base, tuned = (
        find_mechanism(model, drawn, ablation=zero_ablation(), **how) for model in models
    )
    prompts = box_prompts(tokenizer, 40, n_boxes=3, seed=6)
    found = compare_mechanisms(base, tuned, models=models, prompts=prompts)
    table = found.faithfulness_dataframe().set_index("mechanism")
    assert table.index.tolist() == [
        "base in base",
        "base in tuned",
        "tuned in base",
        "tuned in tuned",
    ]
    # The base's in the fine-tune, by plain runs.
    keep: dict[str, list[Head]] = {}
    for node in base.nodes:
        keep.setdefault(node.role, []).append(Head(*node[:2]))
    alone = evaluate(models[1], prompts, keep=keep, ablation=zero_ablation(), engine="hooks")
    whole = evaluate(models[1], prompts, engine="hooks")
    row = table.loc["base in tuned"]
    assert row["accuracy"] == alone.accuracy and row["of_model"] == whole.accuracy
    assert row["agreement"] == (alone.predicted == whole.predicted).double().mean()
    nodes, *random = found.inside["base in tuned"]
    assert len(random) == 3 and {draw.n_nodes for draw in random} == {len(base)} == {nodes.n_nodes}
    assert row["random"] == max(draw.faithfulness.value for draw in random)
    found.save(tmp_path / "compared.safetensors")
    again = MechanismComparison.load(tmp_path / "compared.safetensors")
    assert again.faithfulness_dataframe().equals(found.faithfulness_dataframe())


def test_comparisons_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="give them as candidates"):
        compare_mechanisms(BASE, TUNED)
    with pytest.raises(InputError, match="L0H3@even is none of the candidates"):
        compare_mechanisms(BASE, TUNED, candidates=BASE + TUNED[2:])
    with pytest.raises(InputError, match="neither 'base' nor 'tuned'"):
        compare_mechanisms(BASE, TUNED, candidates=CANDIDATES, again={"third": BASE})
    with pytest.raises(InputError, match="go together"):
        compare_mechanisms(BASE, TUNED, candidates=CANDIDATES, prompts=role_pairs().clean)
    with pytest.raises(InputError, match="Plain nodes don't know"):
        compare_mechanisms(
            BASE,
            TUNED,
            candidates=CANDIDATES,
            models=(random_model(), random_model()),
            prompts=role_pairs().clean,
        )
    edges = mechanism_edges(random_model(), role_pairs(), TUNED)
    with pytest.raises(InputError, match="base's edges have L0H3@even"):
        compare_mechanisms(BASE, TUNED, candidates=CANDIDATES, edges=(edges, edges))


def test_a_mechanism_that_knows_its_model_needs_no_candidates() -> None:
    @dataclass
    class Found:
        nodes: list[Node]
        n_layers: int = 3
        n_heads: int = 4
        roles: tuple[str, ...] = ROLES
        with_mlps: bool = False

    found = compare_mechanisms(Found(BASE), Found(TUNED))
    expected = compare_mechanisms(BASE, TUNED, candidates=CANDIDATES)
    assert found.nodes.chance == expected.nodes.chance
