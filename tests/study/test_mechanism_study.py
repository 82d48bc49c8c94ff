"""The mechanism as an experiment of a study: what the library's calls give, kept step by step."""

import json
from dataclasses import replace
from importlib import resources

import pandas as pd
import pytest
import torch
from jsonschema import Draft202012Validator

from tests.study.helpers import save_tiny_model
from tests.study.own_task import save_texts
from tests.study.test_killed import files
from tests.study.test_reproduce import Watch
from tl_entity import (
    Circuit,
    GateTraining,
    box_prompts,
    dataset_pairs,
    discovery_pairs,
    evaluate,
    find_mechanism,
    load_model,
    mechanism_edges,
    pooled_ablation,
)
from tl_entity.cli import main
from tl_entity.errors import InputError
from tl_entity.methods.mechanism import reporting_prompts
from tl_entity.studies.marked_file import rows_for
from tl_entity.study.folder import STUDY
from tl_entity.study.node_figures import node_figures
from tl_entity.study.nodes import distinct
from tl_entity.study.report import command
from tl_entity.study.reproduce import reproduce
from tl_entity.study.results import Study
from tl_entity.study.settings import GROUPS, Settings, experiments_for
from tl_entity.study.task_settings import TaskSettings

QUICK = {"first_steps": 12, "steps": 6, "most_prices": 3, "prunings": 0}
N = 192


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return Settings(
        base=str(save_tiny_model(folder / "base", seed=1)),
        tuned=str(save_tiny_model(folder / "tuned", seed=2)),
        prompts=24,
        boxes=3,
        mechanism_prompts=N,
        agreement=0.7,
        target=0.7,
        gate_training=QUICK,
        edges=True,
        only=("mechanism",),
        png=False,
        seed=3,
    )


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    out, watch = tmp_path_factory.mktemp("out") / "study", Watch()
    reproduce(settings, out, progress=watch)
    return out, watch


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def by_hand(settings, results):
    """Each model with its ablation, its prompts and its mechanism."""
    found = {}
    for role, seeds in ((role, results["seeds"]) for role in ("base", "tuned")):
        model = load_model(getattr(settings, role))
        others = discovery_pairs(model.tokenizer, 24, n_boxes=3, seed=seeds["ablation"]).corrupt
        ablation = pooled_ablation(model, others)
        prompts = box_prompts(model.tokenizer, N, n_boxes=3, seed=seeds["mechanism"])
        how = {"target": 0.7, "agreement": 0.7, "training": GateTraining(**QUICK)}
        mechanism = find_mechanism(
            model, prompts, ablation=ablation, seed=seeds["mechanism"], batch_size=128, **how
        )
        found[role] = (model, ablation, prompts, mechanism)
    return found


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_the_mechanism_is_that_of_find_mechanism(results, by_hand, role):
    record, (_, _, _, mechanism) = results["models"][role]["mechanism"], by_hand[role]
    assert [tuple(node) for node in record["nodes"]] == list(mechanism.nodes)
    assert 0 < len(record["nodes"]) < record["n_all"]
    alone = mechanism.found
    assert record["alone"]["accuracy"]["correct"] == int(alone.alone.correct.sum())
    assert record["alone"]["agreement"] == pytest.approx(alone.agreement)
    assert record["alone"]["kl"] == pytest.approx(alone.mean_kl, abs=1e-6)
    assert record["prompts"] == {"training": N // 6, "choosing": N // 3, "reporting": N // 2}
    assert [point["n_nodes"] for point in record["curve"]] == [p.n_nodes for p in mechanism.curve]


def test_each_mechanism_is_run_in_the_other_model_on_prompts_that_found_neither(results, by_hand):
    for role, other in (("base", "tuned"), ("tuned", "base")):
        model, ablation, prompts, own = by_hand[role]
        reporting = reporting_prompts(prompts, seed=results["seeds"]["mechanism"])
        # They are what its own mechanism was reported of.
        again = own.evaluate(model, reporting, ablation=ablation, engine="hooks")
        assert torch.equal(again.alone.correct, own.found.alone.correct)
        theirs = by_hand[other][3].evaluate(model, reporting, ablation=ablation, engine="hooks")
        record = results["models"][role]["mechanism"]["beside"][other]
        assert record["accuracy"]["correct"] == int(theirs.alone.correct.sum())
        assert record["n_nodes"] == len(by_hand[other][3])
        assert record["agreement"] == pytest.approx(theirs.agreement)


def test_nodes_are_counted_kept_lost_and_new(results, by_hand):
    base, tuned = (set(by_hand[role][3].nodes) for role in ("base", "tuned"))
    same = results["same_mechanism"]["nodes"]
    found = {kind: {tuple(node) for node in same[kind]} for kind in ("shared", "lost", "gained")}
    assert found == {"shared": base & tuned, "lost": base - tuned, "gained": tuned - base}
    assert same["jaccard"] == pytest.approx(len(base & tuned) / len(base | tuned))
    # By layer, heads of both drawn anew: the mean of a hypergeometric draw each.
    roles, n_heads = len(results["models"]["base"]["mechanism"]["roles"]), 8
    expected = sum(
        sum(n.layer == layer for n in base) * sum(n.layer == layer for n in tuned)
        for layer in range(4)
    ) / (roles * n_heads)
    assert same["shared_by_chance"] == pytest.approx(expected)


def test_edges_are_those_of_mechanism_edges(results, by_hand):
    model, _, _, mechanism = by_hand["base"]
    pairs = discovery_pairs(model.tokenizer, 96, n_boxes=3, seed=results["seeds"]["pairs"])
    right = evaluate(model, pairs.clean).correct.nonzero().squeeze(1)[:24]
    edges = mechanism_edges(model, pairs[right], mechanism, seed=results["seeds"]["edges"])
    shown = results["models"]["base"]["mechanism"]["edges"]
    rows = edges.to_dataframe()
    assert [edge["sender"] for edge in shown] == rows["sender"].tolist()
    assert [edge["score"] for edge in shown] == pytest.approx(rows["score"].tolist(), abs=1e-5)
    assert results["same_mechanism"]["edges"] is not None


def test_no_circuit_is_looked_for_and_the_page_says_what_was_found(done, results):
    out, watch = done
    assert not [what for what in watch.seen if any(group in what for group in GROUPS)]
    assert all("discovery" not in model for model in results["models"].values())
    page = (out / "report.html").read_text()
    assert 'id="mechanism"' in page and 'id="circuits"' not in page
    record = results["models"]["base"]["mechanism"]
    assert f"In base {len(record['nodes'])} of {record['n_all']} nodes" in page
    schema = resources.files("tl_entity.study").joinpath("results.schema.json").read_text()
    Draft202012Validator(json.loads(schema)).validate(results)
    nodes = pd.read_csv(out / "tables" / "mechanism_nodes.csv")
    assert (nodes["model"] == "base").sum() == len(record["nodes"])
    tables = {path.stem for path in (out / "tables").glob("*.csv")}
    assert {"mechanism", "mechanism_nodes", "mechanism_edges", "mechanisms"} <= tables
    for name in [*tables, *(path.stem for path in (out / "figures").glob("*.html"))]:
        assert set(experiments_for([name])) <= {"mechanism"}
    study = Study.load(out / STUDY)
    assert set(node_figures(study)) == {
        f"{role}_{what}"
        for role in ("base", "tuned")
        for what in ("mechanism", "mechanism_map", "mechanism_edges")
    } | {"mechanisms"}
    words = command(results["settings"])
    assert "--mechanism-prompts 192 --target 0.7 --agreement 0.7 --gate-training" in words
    assert "--edges" in words


@pytest.mark.parametrize("stop_at", ["tuned: mechanism", "tuned: mechanism of base"])
def test_stopped_and_begun_again_it_ends_with_the_same_bytes(settings, done, tmp_path, stop_at):
    with pytest.raises(KeyboardInterrupt):
        reproduce(settings, tmp_path, progress=Watch(stop_at))
    watch = Watch()
    reproduce(settings, tmp_path, progress=watch)
    assert watch.seen == done[1].seen[done[1].seen.index(stop_at) :]
    assert files(tmp_path) == files(done[0])


def test_circuits_that_are_there_stay_and_stand_beside_the_mechanism(settings, tmp_path):
    alone = replace(settings, tuned=None, edges=False, sizes=dict.fromkeys(GROUPS, 2))
    reproduce(replace(alone, only=()), tmp_path)
    results = reproduce(alone, tmp_path)
    record = results["models"]["base"]
    assert {"discovery", "mechanism"} <= record.keys()
    page = (tmp_path / "report.html").read_text()
    assert page.index('id="mechanism"') < page.index('id="circuits"')
    model, seeds = load_model(settings.base), results["seeds"]
    others = discovery_pairs(model.tokenizer, 24, n_boxes=3, seed=seeds["ablation"]).corrupt
    prompts = box_prompts(model.tokenizer, N, n_boxes=3, seed=seeds["mechanism"])
    reporting = reporting_prompts(prompts, seed=seeds["mechanism"])
    found = evaluate(
        model,
        reporting,
        keep=Circuit.entity_tracking(**record["circuit"]),
        ablation=pooled_ablation(model, others),
        engine="hooks",
    )
    beside = record["mechanism"]["beside"]["circuit"]
    assert beside["accuracy"]["correct"] == int(found.correct.sum())


def test_too_few_prompts_are_a_reason_and_no_end(settings, tmp_path):
    few = replace(settings, tuned=None, mechanism_prompts=12, edges=False)
    results = reproduce(few, tmp_path)
    reason = results["models"]["base"]["mechanism"]["why_not"]
    assert "4 prompts to choose by are too few" in reason
    assert "no mechanism could be looked for: 4 prompts" in (tmp_path / "report.html").read_text()


def test_bad_gate_training_is_refused_before_any_work(settings, tmp_path, capsys):
    for given, said in (({"stepps": 3}, "no stepps in how gates"), ({"steps": 0}, "at least one")):
        with pytest.raises(InputError, match=said):
            reproduce(replace(settings, gate_training=given), tmp_path / "out")
    assert main(["mechanism", "--gate-training", "[1]", "--out", str(tmp_path / "out")]) == 2
    assert "is not a JSON object" in capsys.readouterr().err
    assert main(["mechanism", "--target", "1.5", "--out", str(tmp_path / "out")]) == 2
    assert "The target is a share above 0 and up to 1, not 1.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_of_texts_has_a_mechanism_without_any_group(settings, tmp_path):
    rows = save_texts(tmp_path / "pairs.jsonl", 200)
    own = TaskSettings(
        base=settings.base,
        tuned=None,
        task=str(tmp_path / "pairs.jsonl"),
        knowing=("right",),
        target=0.7,
        agreement=0.7,
        gate_training=QUICK,
        png=False,
    )
    results = reproduce(own, tmp_path / "out")
    model = load_model(settings.base)
    whole = dataset_pairs(model.tokenizer, rows, knowing="right")
    parts = {name: whole[torch.tensor(some)] for name, some in rows_for(200, 0).items()}
    seed = results["seeds"]["mechanism"]
    found = find_mechanism(
        model,
        parts["finding"].clean,
        ablation=pooled_ablation(model, parts["ablation"].corrupt),
        target=0.7,
        agreement=0.7,
        training=GateTraining(**QUICK),
        seed=seed,
        batch_size=128,
    )
    record = results["models"]["base"]["mechanism"]
    assert [tuple(node) for node in record["nodes"]] == list(found.nodes)
    assert record["knowing"] == [] and "right" not in record["roles"]
    assert {"mechanism", "knockout"} <= results["models"]["base"].keys()
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="mechanism"' in page and 'id="knockout"' in page and 'id="circuits"' not in page


def test_no_prompt_of_a_search_is_there_twice():
    model = load_model("default-base")
    prompts = box_prompts(model.tokenizer, 6, n_boxes=2, seed=0)
    found = distinct(prompts[torch.tensor([0, 1, 0, 2, 1, 3, 4, 4, 5])])
    assert torch.equal(found.tokens, prompts.tokens)
