"""Results come back from their files as they were, and show what they hold."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from jaxtyping import Float, Float64, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.methods.planted import COPY, NOTE, STAGES, planted_model, planted_pairs
from tl_entity import (
    Circuit,
    Discovery,
    Evaluation,
    Faithfulness,
    Group,
    Head,
    HeadScores,
    InputError,
    MLPScores,
    PairBatch,
    carries,
    cmap_by_group,
    compare,
    completeness,
    discover_circuit,
    evaluate,
    knockout_curve,
    learn_mask,
    learn_masks,
    mean_head_outputs,
    minimality,
    path_patch,
    path_patch_mlps,
    summarize_attention,
)
from tl_entity.methods.activation_patching import CarriedInformation
from tl_entity.methods.attention import AttentionSummary
from tl_entity.methods.cmap import CrossModelPatching
from tl_entity.methods.compare import Comparison
from tl_entity.methods.completeness import Completeness
from tl_entity.methods.dcm import HeadMask, LearnedMasks
from tl_entity.methods.knockout import KnockoutCurve
from tl_entity.methods.minimality import Minimality
from tl_entity.results import FORMAT, HEADER, Result


class Bounds(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Inner:
    name: str
    bounds: Bounds


@dataclass(frozen=True)
class Everything(Result):
    tensor: Float[Tensor, "a b"]
    same_tensor: Float[Tensor, "a b"]
    indices: Int[Tensor, " a"] | None
    nothing: Int[Tensor, " a"] | None
    array: Float64[np.ndarray, " n"]
    heads: tuple[Head, ...]
    by_head: Mapping[Head, float]
    nested: Mapping[str, tuple[Inner, ...]]
    place: tuple[str, Head]
    places: frozenset[tuple[str, Head]]
    number: float
    odd_numbers: tuple[float, ...]
    choice: Literal["q", "k"] | None
    yes: bool
    count: int | None

    def __str__(self) -> str:
        return f"number {self.number} <b>"

    def to_dataframe(self):
        import pandas as pd

        return pd.DataFrame({"name": ["<script>"] * 30, "x": [self.number] * 30})


def everything() -> Everything:
    tensor = torch.tensor([[1.0, -2.0], [math.inf, 0.1]])
    return Everything(
        tensor=tensor,
        same_tensor=tensor,
        indices=torch.tensor([3, 4]),
        nothing=None,
        array=np.array([1e-300, 2.0]),
        heads=(Head(0, 1), Head(10, 3)),
        by_head={Head(2, 0): 0.1, Head(0, 0): 1.0},
        nested={"a/b": (Inner("é", Bounds(0.1, 0.2)),), "": ()},
        place=("last", Head(1, 1)),
        places=frozenset({("last", Head(1, 1)), ("last", Head(0, 9)), ("a", Head(3, 0))}),
        number=0.1 + 0.2,
        odd_numbers=(math.nan, -math.inf),
        choice="k",
        yes=True,
        count=None,
    )


def same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)
        )
    if isinstance(one, Mapping):
        return list(one) == list(other) and same([*one.values()], [*other.values()])
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def test_every_kind_of_field_comes_back_as_it_was(tmp_path):
    everything().save(tmp_path / "all.safetensors")
    found = Everything.load(tmp_path / "all.safetensors")
    assert same(found, everything())
    assert all(type(head) is Head for head in (*found.heads, *found.by_head, found.place[1]))
    assert type(found.nested["a/b"][0].bounds) is Bounds


def test_the_same_result_gives_the_same_bytes(tmp_path):
    for name in "ab":
        everything().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    model, pairs = planted_model(), planted_pairs(12)
    found = discover_circuit(model, pairs, sizes={"copier": 1, "note_taker": 1}, stages=STAGES)
    whole = evaluate(model, pairs.clean)
    part = dataclasses.replace(whole, correct=whole.correct.clone())
    part.correct[:3] = False
    return {
        "HeadScores": found.scores["note_taker"],
        "MLPScores": path_patch_mlps(model, pairs),
        "Discovery": found,
        "Evaluation": whole,
        "Faithfulness": Faithfulness.of(part, whole, seed=0),
        "AttentionSummary": summarize_attention(
            model, pairs.clean, [COPY, Head(1, 0)], from_position="last"
        ),
        **results_on_a_circuit(model, pairs, found),
    }


def results_on_a_circuit(model, pairs: PairBatch, found: Discovery) -> dict[str, Result]:
    means = {"mean_outputs": mean_head_outputs(model, pairs.corrupt)}
    other = disturbed_model()
    again = discover_circuit(other, pairs, sizes={"copier": 1, "note_taker": 1}, stages=STAGES)
    circuit, candidates = found.circuit, [Head(1, head) for head in range(4)]
    dcm = {"position": "last", "batch_size": 4}
    return {
        "CarriedInformation": carries(
            model, {"value": lambda seed: planted_pairs(8, seed)}, circuit, seeds=[0, 1]
        ),
        "CrossModelPatching": cmap_by_group(other, model, pairs.clean, circuit, seed=0),
        "Comparison": compare(found, again, seed=0, draws=20),
        "Completeness": completeness(
            model, pairs.clean, circuit, **means, seed=0, n_random=2, random_size=1
        ),
        "Minimality": minimality(model, pairs.clean, circuit, **means, seed=0),
        "KnockoutCurve": knockout_curve(
            model,
            pairs.clean,
            from_position="last",
            to_position="value",
            random_draws=2,
            seed=0,
        ),
        "HeadMask": learn_mask(model, pairs, candidates, **dcm, validation=planted_pairs(4, 1)),
        "LearnedMasks": learn_masks(model, pairs, candidates, **dcm, seeds=[0, 1]),
    }


def disturbed_model() -> HookedTransformer:
    """The planted model with noise on all its weights."""
    other, generator = planted_model(), torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return other


CLASSES = (
    HeadScores,
    MLPScores,
    Discovery,
    Evaluation,
    Faithfulness,
    AttentionSummary,
    CarriedInformation,
    CrossModelPatching,
    Comparison,
    Completeness,
    Minimality,
    KnockoutCurve,
    HeadMask,
    LearnedMasks,
)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_methods_results_come_back_as_they_were(kind, results, tmp_path):
    result = results[kind.__name__]
    assert type(result) is kind
    result.save(tmp_path / "result")
    assert same(kind.load(tmp_path / "result"), result)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_results_are_one_line_in_print_and_a_table_and_a_figure_in_a_notebook(kind, results):
    result = results[kind.__name__]
    assert repr(result) == f"{kind.__name__}: {result}"
    assert "\n" not in repr(result) and "tensor" not in repr(result)
    assert 20 < len(str(result)) < 200
    shown = result._repr_html_()
    assert shown.count("<table") == 1
    for column in result.table():
        assert f"<th>{column}</th>" in shown
    figure = result.plot()
    assert figure.data and figure.layout.title.text


def test_text_in_a_result_is_no_html_in_a_notebook():
    shown = everything()._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "&lt;b&gt;" in shown
    assert "10 of 30 rows" in shown and shown.count("<tr") == 11


def test_a_score_maps_table_begins_with_the_most_important_head():
    model, pairs = planted_model(), planted_pairs(12)
    scores = path_patch(model, pairs)
    table = scores.table(3)
    assert list(table["head"]) == [str(head) for head in scores.top(3)]
    assert table["head"][0] == str(COPY) and list(table["rank"]) == [1, 2, 3]
    assert table["score"].is_monotonic_increasing
    assert str(COPY) in str(scores)
    into = path_patch(model, pairs, position="value", receivers=[COPY], receiver_input="k")
    rows = into.to_dataframe().set_index("head")
    assert rows["rank"][str(NOTE)] == 1
    assert rows["rank"].isna().sum() == 4  # layer 1 can't reach a head of layer 1
    assert len(into.table(None)) == 4
    low, high = into.intervals[NOTE]
    assert rows.loc[str(NOTE), ["score", "low", "high"]].tolist() == pytest.approx(
        [into.scores[NOTE].item(), low, high]
    )


def test_a_score_maps_figure_outlines_its_most_important_heads_only():
    scores = path_patch(planted_model(), planted_pairs(12))
    hovers = scores.plot(chosen=1).data[0].customdata
    marked = {
        Head(y, x) for y, row in enumerate(hovers) for x, t in enumerate(row) if "chosen" in t
    }
    assert marked == {COPY}
    # Heads that help when taken away are not marked, however many are asked for.
    below = {Head(*i) for i in (scores.scores < 0).nonzero().tolist()}
    hovers = scores.plot(chosen=8).data[0].customdata
    marked = {
        Head(y, x) for y, row in enumerate(hovers) for x, t in enumerate(row) if "chosen" in t
    }
    assert marked == below


def test_a_discovery_shows_its_stages_and_its_circuit_over_a_prompt(results):
    found = results["Discovery"]
    assert list(found.table()["head"]) == [str(COPY), str(NOTE)]
    titles = [note.text for note in found.plot().layout.annotations]
    assert titles == ["copier: last into the logits", "note_taker: value into k of copier"]
    words = "a 1 b 2 c 3 b".split()
    figure = found.diagram(words, {"last": 6, "value": 3})
    nodes = {trace.name: trace.x[0] for trace in figure.data if trace.name}
    assert nodes == {"copier": 6, "note_taker": 3}
    labels = {note.text for note in figure.layout.annotations}
    assert {"k", "logits"} <= labels
    with pytest.raises(InputError, match="'value'"):
        found.diagram(words, {"last": 6})


def test_an_evaluations_figure_counts_its_prompts():
    right = torch.tensor([True, True, False])
    found = Evaluation(right.long(), right, torch.tensor([0.95, 0.93, 0.02]).log())
    bars = {trace.name: trace for trace in found.plot().data}
    assert sum(bars["answered right"].y) == 2 and sum(bars["answered wrong"].y) == 1
    assert bars["answered right"].y[18] + bars["answered right"].y[19] == 2
    assert bars["answered wrong"].y[0] == 1
    (row,) = found.table().to_dict("records")
    assert (row["correct"], row["prompts"]) == (2, 3)


def test_a_circuit_is_a_table_in_a_notebook_and_a_line_elsewhere():
    circuit = Circuit((Group("a<b", "last", (Head(10, 3), Head(0, 1))), Group("none", "last", ())))
    assert repr(circuit) == "Circuit: a<b at last: L10H3 L0H1; none at last: none"
    assert "L10H3 L0H1" in circuit._repr_html_() and "a&lt;b" in circuit._repr_html_()
    assert list(circuit.to_dataframe()["n_heads"]) == [2, 0]
    assert repr([Head(10, 3)]) == "[L10H3]"


def test_files_that_are_something_else_are_refused(tmp_path, results):
    path = tmp_path / "file"
    with pytest.raises(InputError, match="no such file"):
        HeadScores.load(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="not a result"):
        HeadScores.load(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(InputError, match="not a result"):
        HeadScores.load(path)
    results["Evaluation"].save(path)
    with pytest.raises(InputError, match="class Evaluation, not HeadScores"):
        HeadScores.load(path)
    with pytest.raises(InputError, match="can't be written"):
        results["Evaluation"].save(tmp_path)


def test_files_of_another_format_or_with_other_fields_are_refused(tmp_path, results):
    path = tmp_path / "file"

    def write(**changes):
        tensors = {name: torch.zeros(2) for name in ("predicted", "answer_log_probability")}
        content = {"predicted": "predicted", "correct": None, "answer_log_probability": 1}
        # Files of format 1 have no hash.
        header = {"format": 1, "class": "Evaluation", "content": content, **changes}
        save_file(tensors, path, {HEADER: json.dumps(header)})

    write(format=FORMAT + 1)
    with pytest.raises(InputError, match=f"format {FORMAT + 1}"):
        Evaluation.load(path)
    write(format=FORMAT)
    with pytest.raises(InputError, match="damaged"):
        Evaluation.load(path)
    write(content={"predicted": "predicted"})
    with pytest.raises(InputError, match="whole Evaluation"):
        Evaluation.load(path)
    write()
    with pytest.raises(InputError, match="whole Evaluation"):
        Evaluation.load(path)


def rewritten(path, change):
    """The file with a changed header or changed tensors."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, {HEADER: json.dumps(header)})


CHANGES = {
    "a number": lambda header, tensors: header["content"].update(value=0.99),
    "a tensor": lambda header, tensors: tensors["of_model/correct"].logical_not_(),
    "an emptied record": lambda header, tensors: header.update(content={}),
    "no record": lambda header, tensors: header.update(content=None),
    "no tensors": lambda header, tensors: tensors.clear(),
    "a tensor more": lambda header, tensors: tensors.update(more=torch.ones(1)),
    "no hash": lambda header, tensors: header.pop("sha256"),
    "an odd hash": lambda header, tensors: header.update(sha256=5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_result_that_was_changed_is_refused(results, tmp_path, change):
    path = tmp_path / "result"
    results["Faithfulness"].save(path)
    rewritten(path, lambda header, tensors: None)
    assert same(Faithfulness.load(path), results["Faithfulness"])
    rewritten(path, change)
    with pytest.raises(InputError, match="is damaged"):
        Faithfulness.load(path)


@pytest.mark.parametrize("header", ["null", "[]", "5", '"x"', "{", "[" * 100_000, "1" * 10_000])
def test_a_header_that_is_something_else_is_refused(tmp_path, header):
    save_file({"x": torch.ones(1)}, tmp_path / "file", {HEADER: header})
    with pytest.raises(InputError, match="not a result"):
        Evaluation.load(tmp_path / "file")


def test_a_file_cut_short_is_refused(results, tmp_path):
    path = tmp_path / "result"
    results["Evaluation"].save(path)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a result"):
            Evaluation.load(path)


def test_a_result_as_json_has_plain_values():
    found = everything().to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["tensor"] == [[1.0, -2.0], ["infinite", pytest.approx(0.1)]]
    assert found["heads"] == [[0, 1], [10, 3]] and found["by_head"]["L2H0"] == 0.1
    assert found["nested"] == {"a/b": [{"name": "é", "bounds": [0.1, 0.2]}], "": []}
    assert found["odd_numbers"] == [None, None] and found["nothing"] is None


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_result_can_be_written_as_json(kind, results):
    found = results[kind.__name__].to_json()
    assert found and json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_file_from_before_a_field_with_a_default_is_read(tmp_path):
    found = Evaluation(
        torch.tensor([3, 4]), torch.tensor([True, False]), torch.tensor([-0.5, -2.0])
    )
    found.save(tmp_path / "kept")
    with safe_open(tmp_path / "kept", "pt") as file:
        header = json.loads(file.metadata()["tl_entity"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps(header)
    for field in ("values", "metric"):
        assert f'"{field}": null' in text
        text = text.replace(f', "{field}": null', "")
    header = json.loads(text)
    header.pop("sha256", None)
    header["format"] = 1
    save_file(tensors, tmp_path / "before", metadata={"tl_entity": json.dumps(header)})
    again = Evaluation.load(tmp_path / "before")
    assert again.accuracy == 0.5 and again.metric is None
