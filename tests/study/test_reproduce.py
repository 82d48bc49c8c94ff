"""The main job on two tiny random models: what it writes, and that it can be interrupted."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pandas as pd
import pytest
import torch
from jsonschema import Draft202012Validator

from tests.models.test_adapters import adapt
from tests.study.helpers import N_HEADS, N_LAYERS, save_random_model, save_tiny_model
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.methods.ablations import mean_head_outputs, pooled_ablation
from tl_entity.methods.circuits import evaluate
from tl_entity.methods.cmap import cmap
from tl_entity.methods.discovery import discover_circuit
from tl_entity.methods.knockout import knock_out_attention
from tl_entity.methods.path_patching import path_patch
from tl_entity.models.load import load_model
from tl_entity.output import sole_worker
from tl_entity.study import experiments, tables
from tl_entity.study.figures import figures_of
from tl_entity.study.folder import STUDY
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.report import command, summary
from tl_entity.study.reproduce import model_fingerprint, reproduce
from tl_entity.study.results import Study
from tl_entity.study.settings import GROUPS, Settings, experiments_for
from tl_entity.study.store import to_json
from tl_entity.tasks.boxes import box_prompts
from tl_entity.tasks.pairs import discovery_pairs

TWO_EACH = dict.fromkeys(GROUPS, 2)


class Watch:
    """Counts what is worked on, and interrupts the work at one of them."""

    def __init__(self, stop_at: str | None = None):
        self.seen: list[str] = []
        self.notes: dict[str, list[str]] = {}
        self.stop_at = stop_at

    @contextmanager
    def __call__(self, what, total):
        self.seen.append(what)
        if what == self.stop_at:
            raise KeyboardInterrupt
        runs = []

        def count(done: int, note: str = "") -> None:
            runs.append(done)
            self.notes.setdefault(what, []).append(note)

        yield count
        assert sum(runs) == total


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("models")
    return Settings(
        base=str(save_tiny_model(folder / "first<b>", seed=1)),
        tuned=str(save_tiny_model(folder / "second", seed=2)),
        prompts=6,
        boxes=3,
        sizes=TWO_EACH,
        random_circuits=2,
        mask_pairs=8,
        draws=1,
        png=False,
        all_pairs=True,
        seed=3,
    )


@pytest.fixture(scope="module")
def done(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "deep" / "study"
    watch = Watch()
    reproduce(settings, out, progress=watch)
    # Each step of a mask's training says how it stands.
    for role in ("base", "tuned"):
        assert all(
            re.fullmatch(r"loss -?\d+\.\d\d, \d heads", note)
            for note in watch.notes[f"{role}: DCM"]
        )
    return out, watch


@pytest.fixture(scope="module")
def results(done):
    return json.loads((done[0] / "results.json").read_text())


@pytest.fixture(scope="module")
def study(done):
    return Study.load(done[0] / STUDY)


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "timings.json"
    }


def test_after_an_interruption_finished_steps_are_skipped_and_the_bytes_are_the_same(
    settings, done, tmp_path
):
    whole, all_steps = done[0], done[1].seen
    stop_at = "tuned: pos_transmitter"
    with pytest.raises(KeyboardInterrupt):
        reproduce(settings, tmp_path / "out", progress=Watch(stop_at))
    assert not (tmp_path / "out" / "results.json").exists()
    watch = Watch()
    reproduce(settings, tmp_path / "out", progress=watch)
    assert watch.seen == all_steps[all_steps.index(stop_at) :]
    assert contents(tmp_path / "out") == contents(whole)


def test_a_long_stage_is_kept_in_parts(settings, done, tmp_path, monkeypatch):
    """Interrupted within a stage, its finished parts are not done again."""
    whole = json.loads((done[0] / "results.json").read_text())["models"]["base"]["discovery"]
    monkeypatch.setattr(experiments, "PAIRS_KEPT", 4)
    monkeypatch.setattr(experiments, "HEAD_PAIRS_KEPT", 1)
    alone = replace(settings, tuned=None)
    calls = []

    @contextmanager
    def stop_in_second_part(what, total):
        def count(runs):
            calls.append((what, runs))
            if len([n for name, n in calls if name == "base: pos_transmitter" and n]) == 2:
                raise KeyboardInterrupt

        yield count

    with pytest.raises(KeyboardInterrupt):
        reproduce(alone, tmp_path, progress=stop_in_second_part)
    parts = sorted(path.name for path in (tmp_path / "steps").glob("*pos_transmitter*"))
    assert parts == ["base_scores_pos_transmitter_part1.safetensors"]
    finished = (tmp_path / "steps" / parts[0]).stat().st_mtime_ns
    found = reproduce(alone, tmp_path, progress=Watch())["models"]["base"]["discovery"]
    assert (tmp_path / "steps" / parts[0]).stat().st_mtime_ns == finished
    for group, stage in found.items():
        assert stage["scores"] == [pytest.approx(row, abs=1e-5) for row in whole[group]["scores"]]


def test_accuracy_and_faithfulness_are_those_of_the_methods(settings, results):
    model = load_model(settings.base)
    prompts = box_prompts(model.tokenizer, 6, n_boxes=2, seed=results["seeds"]["accuracy 2"])
    found = results["models"]["base"]["accuracy"]["2"]
    assert (found["accuracy"], found["prompts"]) == (evaluate(model, prompts).accuracy, 6)
    held_out = box_prompts(model.tokenizer, 6, n_boxes=3, seed=results["seeds"]["faithfulness"])
    whole = results["models"]["base"]["faithfulness"]["model"]
    assert whole["accuracy"] == evaluate(model, held_out).accuracy
    assert not (held_out.tokens[:, None] == prompts_of_discovery(settings, results)).all(-1).any()


def prompts_of_discovery(settings, results):
    model = load_model(settings.base)
    seed = results["seeds"]["pairs"]
    return discovery_pairs(model.tokenizer, 6, n_boxes=3, seed=seed).clean.tokens[None]


def test_stages_score_into_the_heads_found_before(settings, results, done):
    model = load_model(settings.tuned)
    record = results["models"]["tuned"]
    pairs = discovery_pairs(model.tokenizer, 6, n_boxes=3, seed=results["seeds"]["pairs"])
    stage = record["discovery"]["pos_transmitter"]
    scores = path_patch(
        model,
        pairs,
        position="last",
        receivers=[Head(*head) for head in stage["receivers"]],
        receiver_input="q",
        engine="hooks",
    ).scores
    assert torch.allclose(scores, torch.tensor(stage["scores"]), atol=1e-4, rtol=1e-3)
    first = torch.tensor(record["discovery"]["value_fetcher"]["scores"]).flatten()
    best = [list(divmod(int(index), N_HEADS)) for index in first.argsort()[:2]]
    assert stage["receivers"] == best
    circuit = Circuit.load(done[0] / "tuned_circuit.json")
    assert [list(head) for head in circuit.pos_transmitter] == record["circuit"]["pos_transmitter"]


def test_what_is_kept_of_a_study_is_what_its_results_are_made_of(study, results):
    assert json.loads(to_json(study.to_json())) == results
    # Down to the single prompt and pair, which results.json sums up.
    found = study.models["base"].faithfulness.asked.circuit
    assert (
        found.of_circuit.correct.sum()
        == results["models"]["base"]["faithfulness"]["circuit"]["correct"]
    )
    assert study.models["tuned"].discovery.scores["value_fetcher"].per_example.shape[-1] == 6


def test_results_fit_their_schema(done, results):
    file = resources.files("tl_entity.study").joinpath("results.schema.json")
    schema = json.loads(file.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(results)


def test_figures_show_the_results(study, results):
    figures = figures_of(study)
    heatmaps = [t for t in figures["base_heatmaps"].data if t.name == "scores"]
    for trace, group in zip(heatmaps, GROUPS, strict=True):
        assert trace.z.tolist() == results["models"]["base"]["discovery"][group]["scores"]
        assert trace.z.shape == (N_LAYERS, N_HEADS)
    outlines = [t for t in figures["base_heatmaps"].data if t.name == "chosen"]
    squares = sum(list(trace.x).count(None) for trace in outlines)
    assert squares == sum(map(len, results["models"]["base"]["circuit"].values()))


def test_a_model_beside_itself_has_the_same_circuit(settings, tmp_path):
    twice = Settings(
        base=settings.tuned, tuned=settings.tuned, prompts=20, boxes=3, sizes=TWO_EACH,
        random_circuits=0, all_pairs=True, only=("faithfulness", "comparison"), png=False,
    )  # fmt: skip
    results = reproduce(twice, tmp_path)
    # All pairs, so that both circuits are of the same ones.
    assert results["same_circuit"]["paired"] is True
    same, scores = results["same_circuit"]["whole"], results["models"]["tuned"]["faithfulness"]
    assert len(same["shared"]) == same["first"] == same["second"]
    assert same["jaccard"] == 1
    assert not same["only_first"] and not same["only_second"]
    assert scores["other_circuits"]["base"]["circuit"] == scores["circuit"]


def test_the_base_found_again_stands_beside_the_comparison(settings, done, tmp_path):
    again = replace(
        settings, ceiling=True, prompts=4, boxes=2, random_circuits=0, only=("comparison",)
    )
    watch = Watch()
    same = reproduce(again, tmp_path, progress=watch)["same_circuit"]
    assert watch.seen.count("base: value_fetcher") == 2
    assert watch.seen.count("tuned: value_fetcher") == 1
    ceiling, found = same["ceiling"], json.loads((tmp_path / "results.json").read_text())
    # The first is the base's circuit, and the second what is found from other pairs.
    base = load_model(settings.base)
    pairs = discovery_pairs(base.tokenizer, 4, n_boxes=2, seed=found["seeds"]["pairs_again"])
    assert found["seeds"]["pairs_again"] != found["seeds"]["pairs"]
    second = discover_circuit(base, pairs, sizes=TWO_EACH, engine="hooks").circuit
    for name, kept in ceiling["groups"].items():
        first = found["models"]["base"]["circuit"][name]
        assert sorted(kept["shared"] + kept["only_first"]) == sorted(first)
        assert sorted(kept["shared"] + kept["only_second"]) == sorted(map(list, second[name]))
    page = (tmp_path / "report.html").read_text()
    assert "base found twice" in page and "not found again" not in page
    assert "not found again" in (done[0] / "report.html").read_text()
    table = pd.read_csv(tmp_path / "tables" / "comparison.csv")
    assert table["ceiling_jaccard"].iloc[-1] == ceiling["whole"]["jaccard"]


def test_the_published_cmap_stands_beside_the_same_quantity(settings, done, results):
    """The fine-tune's circuit, each group cut down to the heads that DCM selected in it."""
    record = results["cmap"]["tuned_into_base_as_published"]
    tuned = results["models"]["tuned"]
    kinds = {"value_fetcher": "object_value", "pos_transmitter": "position"}
    kinds["pos_detector"] = "position"
    for group in GROUPS:
        expected = tuned["circuit"][group]
        if group in kinds:
            masks = [
                mask["selected"]
                for mask in tuned["dcm"]["masks"]
                if (mask["group"], mask["desideratum"]) == (group, kinds[group]) and mask["chosen"]
            ]
            # A group without heads has no mask.
            assert len(masks) == (len(expected) > 0)
            expected = masks[0] if masks else []
        assert sorted(record["heads"][group]) == sorted(expected)
    base, other = load_model(settings.base), load_model(settings.tuned)
    prompts = box_prompts(base.tokenizer, 6, n_boxes=3, seed=results["seeds"]["faithfulness"])
    heads = Circuit.entity_tracking(**record["heads"])
    found = cmap(base, other, prompts, heads, engine="hooks")
    whole = record["entries"][-1]
    assert (whole["group"], whole["correct"]) == ("whole circuit", int(found.correct.sum()))
    assert {entry["patch"] for entry in record["entries"]} == {"output"}
    page = (done[0] / "report.html").read_text()
    section = page.split('<section id="published_cmap">')[1].split("</section>")[0]
    assert "Goat-7B 56/15/18/39" in section and "<td>0.78</td>" in section
    # Beside the base's circuit, another quantity, no published figure.
    beside = page.split('<section id="cmap">')[1].split("</section>")[0]
    assert "Llama-7B" not in beside


def test_experiments_that_were_not_asked_for_are_left_out(settings, tmp_path):
    few = replace(settings, only=("knockout",), tuned=None, prompts=4, png=True)
    results = reproduce(few, tmp_path)
    assert "knockout" in results["models"]["base"]
    assert not {"faithfulness", "dcm", "minimality"} & set(results["models"]["base"])
    tables = sorted(path.stem for path in (tmp_path / "tables").glob("*.csv"))
    assert tables == ["accuracy", "circuits", "knockout"]
    assert 'id="knockout"' in (tmp_path / "report.html").read_text()
    pictures = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    pages = {path.stem for path in (tmp_path / "figures").glob("*.html")}
    assert pictures == pages == {"accuracy", "base_heatmaps", "base_circuit", "base_knockout"}


def test_experiments_are_the_methods(settings, results):
    """Each record is what the method gives on the same prompts and seeds."""
    base, tuned = load_model(settings.base), load_model(settings.tuned)
    seeds, record = results["seeds"], results["models"]["base"]
    prompts = box_prompts(base.tokenizer, 6, n_boxes=3, seed=seeds["faithfulness"])
    curve = record["knockout"]["curves"][0]
    accuracy = knock_out_attention(
        base, prompts, from_position=curve["from"], to_position=curve["to"], engine="hooks"
    )
    assert [found["accuracy"] for found in curve["layers"]] == pytest.approx(accuracy.tolist())
    circuit = Circuit.entity_tracking(**record["circuit"])
    others = discovery_pairs(base.tokenizer, 6, n_boxes=3, seed=seeds["ablation"]).corrupt
    pooled = pooled_ablation(base, others)
    without_group = {"last": circuit.value_fetcher}
    entry = record["completeness"]["entries"][1]
    assert entry["removed"] == "value_fetcher"
    for side, how in (("circuit", {"keep": circuit}), ("model", {})):
        found = evaluate(
            base, prompts, **how, remove=without_group, ablation=pooled, engine="hooks"
        )
        assert entry[side]["correct"] == int(found.correct.sum())
    # The paper's ablation stands beside the pooled one.
    means = mean_head_outputs(base, others)
    alone = record["faithfulness"]
    for shown, how in ((alone, {"ablation": pooled}), (alone["by_index"], {"mean_outputs": means})):
        found = evaluate(base, prompts, keep=circuit, **how, engine="hooks")
        assert shown["circuit"]["correct"] == int(found.correct.sum())
    brought = results["cmap"]["tuned_into_base"]["entries"][0]
    found = cmap(base, tuned, prompts, without_group, engine="hooks")
    assert (brought["group"], brought["correct"]) == ("value_fetcher", int(found.correct.sum()))


def test_tables_are_written_for_people_and_machines(done, results):
    folder = done[0] / "tables"
    table = pd.read_csv(folder / "minimality.csv")
    assert len(table) == sum(
        len(part["entries"])
        for model in results["models"].values()
        for part in (model["minimality"], model["minimality"]["by_index"])
    )
    lines = (folder / "verdict.md").read_text().splitlines()
    assert lines[0] == "| question | answer | text |"
    assert len(lines) == 2 + len(results["verdict"])


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "srcset", "data"):
                self.references.append(value)


def test_the_report_needs_nothing_but_itself(done, study):
    page = (done[0] / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert len(set(links.ids)) == len(links.ids)
    inside = [ref for ref in links.references if ref != "data:,"]
    assert inside and all(ref.startswith("#") and ref[1:] in links.ids for ref in inside)
    assert "@import" not in page.split("</style>")[0]
    figures = {**figures_of(study), **mechanism_figures(study)}
    drawn = {f"figure-{name}" for name in figures if "heatmaps" not in name}
    assert drawn | {f"figure-base-{group}" for group in GROUPS} <= set(links.ids)


def test_nothing_that_is_written_names_a_place_on_this_machine(done, settings):
    places = {str(Path(settings.base).parent), str(Path.home()), str(done[0])}
    for file in done[0].rglob("*"):
        if file.suffix in (".json", ".html", ".md", ".csv") and file.parent.name != "steps":
            text = file.read_text()
            assert not [place for place in places if place in text], file


def test_names_of_models_are_escaped(done, results):
    page = (done[0] / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert "first&lt;b&gt;" in page
    # The only b elements are those of the key and the answers of the verdict.
    assert links.tags.count("b") == 2 + len(results["verdict"]) == 8


def test_the_command_to_run_again_gives_the_same_settings(results, settings, tmp_path):
    from tl_entity.cli.program import parse

    words = command(results["settings"]).replace("'", "").split()[1:]
    options = parse(words)
    assert options.base == Path(settings.base).name
    assert options.sizes == (2, 2, 2, 2)
    assert (options.prompts, options.boxes, options.seed) == (6, 3, 3)
    assert options.all_pairs


def test_little_memory_gives_the_same_study_in_smaller_chunks(done, results, settings, tmp_path):
    from tl_entity.cli.program import parse

    watch = Watch()
    found = reproduce(replace(settings, memory=1e-5), tmp_path, progress=watch)  # 11 kB
    for what in ("minimality", "knockout", "value_fetcher"):
        name = f"base: {what}"
        assert len(watch.notes[name]) > len(done[1].notes[name])
    for role in ("base", "tuned"):
        assert found["models"][role]["circuit"] == results["models"][role]["circuit"]
        for name in ("faithfulness", "completeness", "minimality", "knockout"):
            assert found["models"][role][name] == results["models"][role][name]
    words = command(found["settings"]).replace("'", "").split()[1:]
    assert parse(words).memory == 1e-5


def test_the_fingerprint_knows_weights_not_places(settings, tmp_path):
    model = load_model(settings.base)
    same = save_tiny_model(tmp_path / "elsewhere", seed=1)
    assert model_fingerprint(model) == model_fingerprint(load_model(same))
    assert model_fingerprint(model) != model_fingerprint(load_model(settings.tuned))


def test_a_base_and_an_adapter_on_it(tmp_path):
    base = save_tiny_model(tmp_path / "base", seed=1)
    adapt(base, tmp_path / "lora")
    settings = Settings(
        base=str(base),
        tuned=str(base),
        tuned_adapter=str(tmp_path / "lora"),
        prompts=8,
        boxes=2,
        only=("comparison",),
        all_pairs=True,
        png=False,
    )
    results = reproduce(settings, tmp_path / "out")
    models = results["models"]
    assert [model["label"] for model in models.values()] == ["base", "base + lora"]
    merged = load_model(base, adapter=tmp_path / "lora")
    assert models["tuned"]["fingerprint"] == model_fingerprint(merged)
    assert models["base"]["fingerprint"] == model_fingerprint(load_model(base))
    assert results["same_circuit"] is not None
    words = command(results["settings"])
    assert "--tuned-adapter lora " in words and "--base-adapter" not in words
    with pytest.raises(InputError, match="no such model"):
        Settings(base=str(base), tuned=None, tuned_adapter=str(tmp_path / "lora"))


def test_names_of_figures_and_tables_stand_for_their_experiments():
    assert experiments_for(["base_knockout", "masks", "knockout"]) == ("knockout", "dcm")
    assert experiments_for(["cmap_tuned_into_base", "tuned_carries_own_heads"]) == (
        "cmap",
        "information",
    )
    # Always done.
    assert experiments_for(["base_heatmaps", "circuits"]) == ()
    with pytest.raises(InputError, match="no experiment, figure or table heat"):
        experiments_for(["heat"])
    with pytest.raises(InputError, match="Say which"):
        experiments_for([])


def test_every_figure_and_table_can_be_asked_for(done):
    out, _ = done
    names = [path.stem for kind in ("figures/*.html", "tables/*.csv") for path in out.glob(kind)]
    assert len(names) > 20
    for name in names:
        experiments_for([name])


def test_models_of_another_make_are_told_apart_before_any_work(settings, tmp_path):
    other = save_tiny_model(tmp_path / "scaled", seed=2, rope_theta=20000.0)
    apart = replace(settings, tuned=str(other), only=("cmap",))
    watch = Watch()
    with pytest.raises(InputError, match="There can be no cmap: The models differ in rotary_base"):
        reproduce(apart, tmp_path / "refused", progress=watch)
    assert not watch.seen and not (tmp_path / "refused").exists()
    with pytest.raises(InputError, match="There can be no comparison: there is one model alone"):
        reproduce(replace(settings, tuned=None, only=("comparison",)), tmp_path / "alone")
    # Where nothing of the kind is asked for, each is studied by itself, and the report says why.
    results = reproduce(replace(apart, only=("faithfulness",)), tmp_path / "each")
    assert results["models"]["tuned"]["faithfulness"]["other_circuits"] == {}
    assert results["cmap"] == {} and results["same_circuit"] is None
    page = (tmp_path / "each" / "report.html").read_text()
    assert "could not be compared head by head: The models differ in rotary_base" in page


def test_pairs_of_a_discovery_may_be_fewer_than_prompts(settings, results, tmp_path):
    """Each is what a run with so many of both finds; the rest of the command says so."""
    alone = replace(settings, tuned=None, only=("knockout",))
    mixed = reproduce(replace(alone, prompts=8, pairs=6), tmp_path / "mixed")
    record = mixed["models"]["base"]
    assert record["pairs"]["kept"] == 6 and record["accuracy"]["2"]["prompts"] == 8
    assert record["knockout"]["curves"][0]["whole"]["prompts"] == 8
    few = results["models"]["base"]["discovery"]
    for group, stage in record["discovery"].items():
        assert stage["scores"] == [pytest.approx(row, abs=1e-5) for row in few[group]["scores"]]
    assert "--prompts 8 --pairs 6" in command(mixed["settings"])
    assert "--pairs" not in command(results["settings"])


def test_a_third_model_is_a_control(settings, tmp_path):
    both = replace(settings, only=("cmap",), prompts=4, boxes=2)
    without = reproduce(both, tmp_path / "out")
    control = save_tiny_model(tmp_path / "third<b>", seed=5)
    watch = Watch()
    three = replace(both, control=str(control))
    results = reproduce(three, tmp_path / "out", progress=watch)
    # All else is as it was without it.
    assert watch.seen == ["control into base: CMAP"]
    assert results["models"] == without["models"]
    found = results["cmap"].pop("control_into_base")
    assert results["cmap"] == without["cmap"]
    assert results["control"]["label"] == "third<b>" and without["control"] is None
    base, third = load_model(settings.base), load_model(control)
    prompts = box_prompts(base.tokenizer, 4, n_boxes=2, seed=results["seeds"]["faithfulness"])
    circuit = Circuit.entity_tracking(**results["models"]["base"]["circuit"])
    for entry in found["entries"][:2]:
        heads = {
            next(g.position for g in circuit if g.name == entry["group"]): circuit[entry["group"]]
        }
        expected = cmap(base, third, prompts, heads, engine="hooks")
        assert (entry["patch"], entry["correct"]) == ("output", int(expected.correct.sum()))
    table = pd.read_csv(tmp_path / "out" / "tables" / "cmap_control_into_base.csv")
    assert set(table["from"]) == {"third<b>"} and len(table) == len(found["entries"])
    assert "third<b>" not in (tmp_path / "out" / "tables" / "cmap.csv").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="control"' in page and 'id="figure-cmap_control_into_base"' in page
    assert "third&lt;b&gt;" in page
    assert (tmp_path / "out" / "figures" / "cmap_control_into_base.html").is_file()
    assert "--control 'third<b>'" in command(results["settings"])
    watch = Watch()
    reproduce(three, tmp_path / "out", progress=watch)
    assert not watch.seen


def test_a_control_that_does_not_fit_is_refused_before_any_work(settings, tmp_path):
    other = save_tiny_model(tmp_path / "scaled", seed=2, rope_theta=20000.0)
    with pytest.raises(InputError, match="scaled can be no control: The models differ in rotary"):
        reproduce(replace(settings, control=str(other)), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(InputError, match="and there is none"):
        replace(settings, tuned=None, control=str(other))
    with pytest.raises(InputError, match="adapter for a control model"):
        replace(settings, control_adapter="lora")


def test_several_prices_and_draws_of_a_mask(settings, results, tmp_path):
    several = replace(settings, tuned=None, only=("dcm",), sparsities=(0.01, 5.0), mask_seeds=2)
    found = reproduce(several, tmp_path)
    masks = found["models"]["base"]["dcm"]["masks"]
    of_each: dict[tuple[str, str], list] = {}
    for mask in masks:
        of_each.setdefault((mask["group"], mask["desideratum"]), []).append(mask)
    kinds = {kind for _, kind in of_each}
    circuit = found["models"]["base"]["circuit"]
    assert len(of_each) == sum(1 for heads in circuit.values() if heads) * len(kinds)
    for (group, kind), runs in of_each.items():
        first, second = (results_seed(found, "dcm", kind, *more) for more in ((), (1,)))
        assert [(run["seed"], run["sparsity"]) for run in runs] == [
            (seed, price) for seed in (first, second) for price in (0.01, 5.0)
        ]
        (chosen,) = (run for run in runs if run["chosen"])
        best = max((run["validation_accuracy"], -len(run["selected"])) for run in runs)
        assert (chosen["validation_accuracy"], -len(chosen["selected"])) == best
        # The usual price and the first draw give what they give by themselves.
        alone = next(
            mask
            for mask in results["models"]["base"]["dcm"]["masks"]
            if (mask["group"], mask["desideratum"]) == (group, kind)
        )
        assert alone["chosen"] is True
        assert {**runs[0], "chosen": True} == alone
        dcm = Study.load(tmp_path / STUDY).models["base"].dcm
        heads = dcm.selected(Circuit.entity_tracking(**circuit), kind)[group]
        assert [list(head) for head in heads] == chosen["selected"]
    table = pd.read_csv(tmp_path / "tables" / "masks.csv")
    assert len(table) == 4 * table["chosen"].sum() == len(masks)
    assert "--sparsity 0.01,5.0 --mask-seeds 2" in command(found["settings"])
    watch = Watch()
    reproduce(several, tmp_path, progress=watch)
    assert not watch.seen


def results_seed(results, *purpose):
    return results["seeds"][" ".join(map(str, purpose))]


def test_a_second_command_in_a_folder_keeps_what_the_first_one_found(settings, tmp_path):
    alone = replace(settings, tuned=None, only=("faithfulness",))
    reproduce(alone, tmp_path, join=True)
    watch = Watch()
    both = reproduce(replace(alone, only=("knockout",)), tmp_path, progress=watch, join=True)
    assert both["settings"]["only"] == ["faithfulness", "knockout"]
    assert {"faithfulness", "knockout"} <= both["models"]["base"].keys()
    assert watch.seen == ["base: knockout"]
    # What is added later is joined to what is there, and asking for less takes nothing away.
    before = contents(tmp_path)
    watch = Watch()
    reproduce(alone, tmp_path, progress=watch)
    assert not watch.seen and contents(tmp_path) == before


OTHERS = {
    "seed 3 and not 4": {"seed": 4},
    "boxes 3 and not 2, prompts 6 and not 7": {"prompts": 7, "boxes": 2},
    "engine exact and not hooks": {"engine": "hooks"},
    "sizes 2/2/2/2 and not 2/2/2/3": {"sizes": {**TWO_EACH, "struct_reader": 3}},
    "sparsities 0.01 and not 0.01,1.0": {"sparsities": (0.01, 1.0)},
    "memory none and not 1.0": {"memory": 1.0},
    "a fine-tuned model": {"tuned": None},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_settings_are_refused_and_nothing_finished_is_lost(settings, done, request, other):
    before = contents(done[0])
    watch = Watch()
    with pytest.raises(InputError) as refused:
        reproduce(replace(settings, **other), done[0], progress=watch)
    said = request.node.callspec.id
    assert f"holds a study with {said}; give another folder" in str(refused.value)
    assert not watch.seen and contents(done[0]) == before


def test_another_model_in_a_used_folder_is_refused(settings, done, tmp_path):
    before = contents(done[0])
    other = save_tiny_model(tmp_path / "third", seed=5)
    with pytest.raises(InputError, match="holds a study with another base model;"):
        reproduce(replace(settings, base=str(other)), done[0])
    assert contents(done[0]) == before
    # The same model elsewhere is the same study.
    same = save_tiny_model(tmp_path / "first<b>", seed=1)
    watch = Watch()
    reproduce(replace(settings, base=str(same)), done[0], progress=watch)
    assert not watch.seen
    reproduce(settings, done[0])
    assert contents(done[0]) == before


def test_other_settings_are_refused_in_a_folder_that_is_not_finished(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        reproduce(settings, tmp_path, progress=Watch("base: value_fetcher"))
    before = contents(tmp_path)
    assert before
    with pytest.raises(InputError, match="seed 3 and not 4"):
        reproduce(replace(settings, seed=4), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["null", "[]", "{", "", '{"settings": 5}', "[" * 100_000])
def test_damaged_notes_cost_no_finished_step(settings, tmp_path, damage):
    alone = replace(settings, tuned=None, only=("knockout",), prompts=4, boxes=2)
    reproduce(alone, tmp_path)
    before = contents(tmp_path)
    for name in ("timings.json", "steps/settings.json", "results.json"):
        (tmp_path / name).write_text(damage)
    watch = Watch()
    reproduce(alone, tmp_path, progress=watch)
    assert not watch.seen and contents(tmp_path) == before


def test_no_source_of_the_program_is_part_of_what_a_step_depends_on(settings, tmp_path):
    """A comment in a table's file, or another way to draw, throws nothing away."""
    source = Path(tables.__file__)
    alone = replace(settings, tuned=None, only=("knockout",), prompts=4, boxes=2)
    reproduce(alone, tmp_path / "out")
    changed = tmp_path / "changed"
    shutil.copytree(source.parents[1], changed / "tl_entity")
    with (changed / "tl_entity" / "study" / "tables.py").open("a") as file:
        file.write("# a comment\n")
    again = [sys.executable, "-c", RERUN, str(tmp_path / "out"), alone.base]
    found = subprocess.run(
        again,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(changed)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [str(changed / "tl_entity" / "__init__.py"), "[]"]


RERUN = """
import sys
import tl_entity
from tl_entity.study.reproduce import reproduce
from tl_entity.study.settings import GROUPS, Settings
done = []
settings = Settings(
    base=sys.argv[2], tuned=None, prompts=4, boxes=2, sizes=dict.fromkeys(GROUPS, 2),
    random_circuits=2, mask_pairs=8, draws=1, png=False, all_pairs=True, seed=3,
    only=("knockout",),
)
log = lambda message: done.append(message) if "found finished" not in message else None
reproduce(settings, sys.argv[1], log=log)
print(tl_entity.__file__)
print(done)
"""


def test_a_second_run_in_a_folder_is_told_who_is_at_work(settings, tmp_path):
    with sole_worker(tmp_path), pytest.raises(InputError, match=f"Process {os.getpid()}, since"):
        reproduce(settings, tmp_path)


def test_the_engine_is_part_of_what_an_outcome_depends_on(settings, tmp_path):
    alone = replace(settings, tuned=None, only=("faithfulness",))
    exact = reproduce(alone, tmp_path / "exact")
    watch = Watch()
    hooks = reproduce(replace(alone, engine="hooks"), tmp_path / "hooks", progress=watch)
    assert "base: faithfulness" in watch.seen
    assert hooks["models"]["base"]["faithfulness"] == exact["models"]["base"]["faithfulness"]


def test_no_circuit_is_looked_for_where_there_is_no_ability(settings, tmp_path):
    """What a random model gets right by luck would have a circuit of nothing."""
    guessing = str(save_random_model(tmp_path / "models" / "first<b>", seed=1))
    alone = replace(settings, base=guessing, tuned=None, all_pairs=False, prompts=12)
    watch = Watch()
    results = reproduce(alone, tmp_path / "alone", progress=watch)
    assert watch.seen == ["base: accuracy"]
    assert not (tmp_path / "alone" / "base_circuit.json").exists()
    reason = results["models"]["base"]["no_circuit"]
    right = results["models"]["base"]["accuracy"]["3"]
    assert right["interval"][0] < 1 / 3
    assert f"{right['accuracy']:.3f}" in reason and "at random would be 0.333" in reason
    page = (tmp_path / "alone" / "report.html").read_text()
    assert f"No circuit was looked for in first&lt;b&gt;: {reason}." in page
    assert 'id="circuits"' not in page and 'id="accuracy"' in page
    assert any("no ability" in line for line in summary(results))

    # Beside a model that can, that one is studied.
    both = replace(alone, tuned="default-tuned", only=("faithfulness", "attention"))
    results = reproduce(both, tmp_path / "both")
    base, tuned = results["models"].values()
    assert base["no_circuit"] is not None and tuned["no_circuit"] is None
    assert tuned["faithfulness"]["other_circuits"] == {} and results["verdict"] == []
    page = (tmp_path / "both" / "report.html").read_text()
    assert 'id="faithfulness"' in page and "figure-tuned-value_fetcher" in page
    assert "No circuit was looked for in first" in page


def test_models_that_could_be_compared_are_not_if_one_has_no_circuit(settings, tmp_path):
    guessing = str(save_random_model(tmp_path / "models" / "first<b>", seed=1))
    other = str(save_random_model(tmp_path / "models" / "second", seed=2))
    can_not = replace(settings, base=guessing, tuned=other, all_pairs=False, prompts=12)
    results = reproduce(can_not, tmp_path)
    assert results["not_compared"] == "no circuit was found in first<b>."
    assert results["cmap"] == {} and results["same_circuit"] is None
