"""The study of a task that is not the paper's gives what the library's calls give."""

import json
from dataclasses import replace
from importlib import resources

import pytest
import torch
from jsonschema import Draft202012Validator

from tests.study.helpers import save_tiny_model
from tests.study.own_task import STAGES, save_recipe, save_speaker, save_texts
from tests.study.test_killed import files
from tl_entity import (
    Circuit,
    Group,
    Head,
    Stage,
    cmap,
    dataset_pairs,
    discover_circuit,
    evaluate,
    knock_out_attention,
    load_model,
    path_patch,
    pooled_ablation,
    task_pairs,
)
from tl_entity.errors import InputError
from tl_entity.hooks.run import answer_logits
from tl_entity.studies.design import Recipe, StudyDesign, StudyTask
from tl_entity.studies.marked_file import read_recipe, read_rows, rows_for
from tl_entity.studies.shipped import SHIPPED
from tl_entity.study.folder import STUDY
from tl_entity.study.report import command
from tl_entity.study.reproduce import reproduce
from tl_entity.study.results import Study
from tl_entity.study.settings import Settings
from tl_entity.study.task_settings import TaskSettings
from tl_entity.tasks.shipped.draw import TASKS

N_ROWS = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_texts(folder / "pairs.jsonl", N_ROWS)
    save_recipe(folder / "recipe.json")
    save_tiny_model(folder / "base", seed=1)
    save_tiny_model(folder / "tuned", seed=2)
    return folder


@pytest.fixture(scope="module")
def settings(place):
    return TaskSettings(
        base=str(place / "base"),
        tuned=str(place / "tuned"),
        task=str(place / "pairs.jsonl"),
        recipe=str(place / "recipe.json"),
        knowing=("right",),
        random_circuits=2,
        png=False,
        seed=3,
    )


@pytest.fixture(scope="module")
def done(settings, place):
    results = reproduce(settings, place / "out")
    assert results == json.loads((place / "out" / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def pairs(place):
    model = load_model(place / "base")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    whole = dataset_pairs(model.tokenizer, rows, knowing="right")
    return {part: whole[torch.tensor(some)] for part, some in rows_for(N_ROWS, 3).items()}


def circuit_of(record) -> Circuit:
    at = {stage["group"]: stage["position"] for stage in STAGES}
    return Circuit(
        tuple(
            Group(name, position, tuple(Head(*head) for head in record["circuit"][name]))
            for name, position in at.items()
        )
    )


def test_rows_are_shared_out_once():
    for n in (12, 48, 101):
        parts = rows_for(n, 0)
        assert sorted(row for some in parts.values() for row in some) == list(range(n))
        assert len(parts["finding"]) == n // 2
        assert abs(len(parts["testing"]) - len(parts["ablation"])) <= 1
        assert rows_for(n, 1) != parts


def test_accuracy_is_of_the_rows_to_test(place, done, pairs):
    model, tested = load_model(place / "base"), pairs["testing"]
    found = done["models"]["base"]["accuracy"]
    answered = evaluate(model, tested.clean, engine="hooks")
    assert found["answer is the most likely token"]["correct"] == int(answered.correct.sum())
    logits = answer_logits(model, tested.clean)
    rows = torch.arange(len(tested))
    beats = logits[rows, tested.targets] > logits[rows, tested.foils]
    assert found["answer beats foil"]["correct"] == int(beats.sum())
    assert found["answer beats foil"]["prompts"] == N_ROWS // 4


def test_the_circuit_is_that_of_discover_circuit(place, done, pairs):
    model, record = load_model(place / "tuned"), done["models"]["tuned"]
    finding = pairs["finding"]
    right = evaluate(model, finding.clean, engine="hooks").correct
    assert record["pairs"]["kept"] == int(right.sum()) > 8
    stages = (
        Stage("mover", "last"),
        Stage("finder", "last", into="mover", receiver_input="q"),
        Stage("reader", "asked", into="finder", receiver_input="v", edges=(("mover", "v"),)),
    )
    found = discover_circuit(
        model,
        finding[right],
        sizes={"mover": 3, "finder": 2, "reader": 2},
        receiver_sizes={"mover": 2},
        stages=stages,
    )
    assert circuit_of(record) == found.circuit
    assert len(found.circuit["mover"]) > 0
    into = {"mover": None, "finder": ("q", "mover"), "reader": ("v", "mover")}
    for group, stage in record["discovery"].items():
        to = into[group] and {
            "receiver_input": into[group][0],
            "receivers": found.receivers[into[group][1]],
        }
        scores = path_patch(
            model, finding[right], position=stage["position"], engine="hooks", **(to or {})
        ).scores
        torch.testing.assert_close(torch.tensor(stage["scores"]), scores, atol=1e-4, rtol=1e-3)


def test_the_circuit_is_tested_on_other_rows(place, done, pairs):
    base, tuned = load_model(place / "base"), load_model(place / "tuned")
    tested, others = pairs["testing"].clean, pairs["ablation"].corrupt
    record = done["models"]["tuned"]
    circuit = circuit_of(record)
    alone = evaluate(
        tuned, tested, keep=circuit, ablation=pooled_ablation(tuned, others), engine="hooks"
    )
    assert record["faithfulness"]["circuit"]["correct"] == int(alone.correct.sum())
    # What the paper's ablation says of prompts of one length is the paper's alone.
    assert "by_index" not in record["faithfulness"]
    entry = done["cmap"]["tuned_into_base"]["entries"][0]
    moved = {"last": circuit_of(done["models"]["base"])["mover"]}
    found = cmap(base, tuned, tested, moved, engine="hooks")
    assert (entry["group"], entry["correct"]) == ("mover", int(found.correct.sum()))
    curve = record["knockout"]["curves"][0]
    assert curve["from"] == "last" and {c["to"] for c in record["knockout"]["curves"]} >= {"asked"}
    accuracy = knock_out_attention(
        tuned, tested, from_position="last", to_position=curve["to"], engine="hooks"
    )
    assert [layer["accuracy"] for layer in curve["layers"]] == pytest.approx(accuracy.tolist())


def test_nothing_is_said_that_is_the_papers(place, done):
    assert done["task"]["name"] == "pairs.jsonl"
    assert done["task"]["groups"] == ["mover", "finder", "reader"]
    assert done["verdict"] == [] and "dcm" not in done["models"]["base"]
    page = (place / "out" / "report.html").read_text()
    body = page.split("<body>")[1]
    for word in ("value_fetcher", "Llama-7B", "right object", "box asked about", "the paper"):
        assert word not in body, word
    for section in ("circuits", "faithfulness", "same", "cmap", "minimality"):
        assert f'id="{section}"' in body
    assert "mover: into the logits, last" in body
    assert "reader: into the values of finder and the values of mover, asked" in body
    schema = resources.files("tl_entity.study").joinpath("results.schema.json").read_text()
    Draft202012Validator(json.loads(schema)).validate(done)
    assert str(place) not in page and str(place) not in json.dumps(done)


def test_the_study_is_kept_whole_and_its_command_says_it(place, done):
    study = Study.load(place / "out" / STUDY)
    assert study.settings.task.endswith("pairs.jsonl") and study.task.groups[0] == "mover"
    words = command(done["settings"])
    assert words.startswith("tl-entity study --task pairs.jsonl --recipe recipe.json")
    assert "--knowing right" in words and "--sizes" not in words


def test_a_file_that_changed_or_another_task_is_refused_in_a_used_folder(place, settings, done):
    before = files(place / "out")
    other = place / "other" / "pairs.jsonl"
    other.parent.mkdir()
    save_texts(other, N_ROWS, seed=1)
    with pytest.raises(InputError, match="holds a study with texts"):
        reproduce(replace(settings, task=str(other)), place / "out")
    few = place / "other" / "recipe.json"
    few.write_text(json.dumps({"stages": STAGES[:1]}))
    with pytest.raises(InputError, match="holds a study with rec"):
        reproduce(replace(settings, recipe=str(few)), place / "out")
    with pytest.raises(InputError, match=r"task pairs\.jsonl and not boxes"):
        boxes = {"task": "boxes", "recipe": None, "knowing": ()}
        reproduce(replace(settings, **boxes), place / "out")
    # The same texts elsewhere are the same task, and all of it is found finished.
    same = place / "same" / "pairs.jsonl"
    same.parent.mkdir()
    save_texts(same, N_ROWS)
    said = []
    reproduce(replace(settings, task=str(same)), place / "out", log=said.append)
    assert said and all("found finished" in line for line in said)
    reproduce(settings, place / "out")
    assert files(place / "out") == before


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    return save_speaker(tmp_path_factory.mktemp("speaker") / "random", seed=4)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_task_that_ships_is_studied_by_its_name(speaker, name, tmp_path):
    asked = TaskSettings(
        base=str(speaker), tuned=None, task=name, prompts=10, only=(), all_pairs=True, png=False
    )
    results = reproduce(asked, tmp_path)
    model = load_model(speaker)
    pairs = task_pairs(name, model.tokenizer, 10, results["seeds"]["accuracy"])
    logits, rows = answer_logits(model, pairs.clean), torch.arange(10)
    beats = logits[rows, pairs.targets] > logits[rows, pairs.foils]
    accuracy = results["models"]["base"]["accuracy"]
    assert accuracy["answer beats foil"]["correct"] == int(beats.sum())
    right = int((logits.argmax(-1) == pairs.targets).sum())
    assert accuracy["answer is the most likely token"]["correct"] == right
    assert TASKS[name].says in (tmp_path / "report.html").read_text().replace("&#39;", "'")
    assert results["task"]["groups"] == [] and "circuit" not in results["models"]["base"]


def test_the_paper_is_one_study_among_others(place, tmp_path):
    """The same settings as a study of the task of boxes by the paper's recipe: all is finished."""
    asked = {
        "base": str(place / "base"), "tuned": str(place / "tuned"), "prompts": 8, "boxes": 2,
        "random_circuits": 1, "all_pairs": True, "only": ("faithfulness", "cmap"), "png": False,
    }  # fmt: skip
    results, said = reproduce(Settings(**asked), tmp_path), []
    again = reproduce(TaskSettings(**asked, recipe="paper"), tmp_path, log=said.append)
    assert said and all("found finished" in line for line in said)
    assert {**again, "settings": None} == {**results, "settings": None}
    assert "Llama-7B" in (tmp_path / "report.html").read_text()


def test_all_tasks_that_ship_have_their_names():
    assert set(SHIPPED) == set(TASKS)


def test_a_design_from_python(place, tmp_path):
    """Of pairs that a function gives, whatever they are from."""
    base, tuned = (load_model(place / name) for name in ("base", "tuned"))
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    whole = dataset_pairs(tuned.tokenizer, rows, knowing="right")

    def draw(tokenizer, n, seed, part):
        return whole[:n]

    design = StudyDesign(
        StudyTask("two boxes", "Which thing is in the box?", draw),
        Recipe((Stage("mover", "last"),), {"mover": 2}),
        ("comparison", "cmap"),
    )
    given = TaskSettings(
        base=str(place / "base"), tuned=str(place / "tuned"), prompts=20, png=False, all_pairs=True
    )
    results = reproduce(given, tmp_path, design=design)
    found = [
        discover_circuit(m, whole[:20], sizes={"mover": 2}, stages=design.recipe.stages).circuit
        for m in (base, tuned)
    ]
    shared = set(found[0]["mover"]) & set(found[1]["mover"])
    assert len(results["same_circuit"]["whole"]["shared"]) == len(shared)
    assert results["task"]["name"] == "two boxes"
    assert "no command runs it again" in (tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match="no dcm of the task two boxes: it has no kinds"):
        replace(design, experiments=("dcm",))
    with pytest.raises(InputError, match="no comparison of the task two boxes: it is done on a"):
        replace(design, recipe=None)


BAD_ROWS = {
    "line 2, is not JSON": '{"clean": "a", "corrupt": "b", "answer": "c"}\n{"clean": ',
    "line 1, must hold a JSON object, not a list of 2": "[1, 2]",
    "line 1, has no 'corrupt'": '{"clean": "a", "answer": "c"}',
    "line 1, has 5 as 'answer', not a text": '{"clean": "a", "corrupt": "b", "answer": 5}',
    "has 1 rows; a study": '{"clean": "a", "corrupt": "b", "answer": "c"}',
    "1 of 13 rows have a 'foil'; give all or none": "\n".join(
        ['{"clean": "a", "corrupt": "b", "answer": "c"}'] * 12
        + ['{"clean": "a", "corrupt": "b", "answer": "c", "foil": "d"}']
    ),
}


@pytest.mark.parametrize("said", BAD_ROWS)
def test_a_file_of_other_things_is_refused_in_a_sentence(said, tmp_path):
    (tmp_path / "rows.jsonl").write_text(BAD_ROWS[said])
    with pytest.raises(InputError) as refused:
        read_rows(tmp_path / "rows.jsonl")
    assert said in str(refused.value)


def stage(**changes):
    return {"stages": [{**STAGES[0], **changes}]}


BAD_RECIPES = {
    "must hold a list of 'stages'": {"stages": []},
    "has a 'stage', and knows stages, metric, overlaps; did you mean stages": {"stage": []},
    "stage 1, must be a JSON object, not 5": {"stages": [5]},
    "stage 1, has no 'size'": {"stages": [{"group": "a", "position": "last"}]},
    "has 'two' as 'size', not a number of heads": stage(size="two"),
    "has true as 'size'": stage(size=True),
    "has 0 as 'receivers'": stage(receivers=0),
    "has 7 as 'group', not a name": stage(group=7),
    "the group '../x', which files can't be named by": stage(group="../x"),
    "patches into": stage(into="other", receiver_input="qk"),
    "a receiver_input without the group": stage(receiver_input="q"),
    "finds the group 'mover' a second time": {"stages": [STAGES[0], STAGES[0]]},
    "as 'edges', not a list": stage(edges="q"),
    "as 'overlaps'; it is stronger or later": {"stages": STAGES, "overlaps": "none"},
}


@pytest.mark.parametrize("said", BAD_RECIPES)
def test_a_recipe_of_another_form_is_refused_in_a_sentence(said, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(BAD_RECIPES[said]))
    with pytest.raises(InputError) as refused:
        read_recipe(tmp_path / "recipe.json")
    assert said.replace("'two'", '"two"') in str(refused.value)


LATE = {
    "no position 'nowhere'": {"stages": [{**STAGES[0], "position": "nowhere"}]},
    "mover can't have 99 heads": {"stages": [{**STAGES[0], "size": 99}]},
    "which no stage before it finds": {"stages": STAGES[::-1]},
    "No metric is called 'likes'": {"stages": STAGES, "metric": "likes"},
}


@pytest.mark.parametrize("said", LATE)
def test_a_recipe_that_does_not_fit_is_refused_before_any_work(said, settings, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(LATE[said]))
    with pytest.raises(InputError, match=said):
        reproduce(replace(settings, recipe=str(recipe)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_that_make_no_sense_together_are_refused(settings):
    for changes, said in (
        ({"task": "capitals"}, "the task capitals knows its own"),
        ({"recipe": "paper"}, "The paper's recipe is for the task boxes"),
        ({"sizes": {"mover": 2}}, "Sizes go with the paper's recipe"),
        ({"ceiling": True}, "there are no other texts"),
    ):
        with pytest.raises(InputError, match=said):
            replace(settings, **changes)
