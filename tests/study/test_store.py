"""Finished steps are found again; unfinished or spoilt ones are not."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_entity.errors import InputError
from tl_entity.output import check_writable
from tl_entity.results import HEADER, Result, pack, read_number
from tl_entity.study.store import REPORT, RESULTS, TIMINGS, Step, Store, to_json


@dataclass(frozen=True)
class Numbers(Result):
    value: float
    tensor: Float[Tensor, " n"]


class Work:
    def __init__(self, value=1.5):
        self.runs, self.value = 0, value

    def __call__(self):
        self.runs += 1
        return Numbers(self.value, torch.arange(3.0))


STEP = Step(Numbers)


def test_a_step_is_done_once_for_the_same_inputs(tmp_path):
    work = Work()
    first = Store(tmp_path).result("a", STEP, {"x": 1}, work)
    again = Store(tmp_path).result("a", STEP, {"x": 1}, work)
    assert work.runs == 1
    assert first.value == again.value == 1.5
    assert torch.equal(again.tensor, torch.arange(3.0))
    Store(tmp_path).result("a", STEP, {"x": 2}, work)
    assert work.runs == 2


def test_a_step_of_another_version_is_done_again(tmp_path):
    work = Work()
    for version in (1, 1, 2, 2):
        Store(tmp_path).result("a", Step(Numbers, version=version), {}, work)
    assert work.runs == 2


def test_a_plain_record_can_be_a_step_too(tmp_path):
    runs = []

    def compute():
        runs.append(1)
        return {"value": 1.5, "none": math.nan}, {"t": torch.arange(3)}

    for _ in range(2):
        record, tensors = Store(tmp_path).step("a", {"x": 1}, compute)
        assert record == {"value": 1.5, "none": None}
        assert torch.equal(tensors["t"], torch.arange(3))
    assert len(runs) == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def rewritten(change):
    def spoil(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        change(header, tensors)
        save_file(tensors, path, {HEADER: json.dumps(header)})

    return spoil


SPOILT = {
    "cut short": cut,
    "empty": lambda path: path.write_bytes(b""),
    "another file": lambda path: path.write_text("{}"),
    "no header": lambda path: save_file({"tensor": torch.arange(3.0)}, path),
    "a header of null": lambda path: save_file({}, path, {HEADER: "null"}),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a changed number": rewritten(lambda header, tensors: header["content"].update(value=0.9)),
    "a changed tensor": rewritten(lambda header, tensors: tensors["tensor"].add_(1)),
    "an emptied record": rewritten(lambda header, tensors: header.update(content={})),
    "no tensors": rewritten(lambda header, tensors: tensors.clear()),
    "tensors of null": rewritten(lambda header, tensors: header["content"].update(tensor=None)),
    "another class": rewritten(lambda header, tensors: header.update({"class": "Evaluation"})),
    "an older format": rewritten(lambda header, tensors: header.update(format=1)),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_file_is_made_again(tmp_path, spoil):
    work = Work()
    Store(tmp_path).result("a", STEP, {}, work)
    path = tmp_path / "steps" / "a.safetensors"
    whole = path.read_bytes()
    spoil(path)
    if path.is_dir():
        with pytest.raises(InputError, match="can't be written"):
            Store(tmp_path).result("a", STEP, {}, work)
        return
    found = Store(tmp_path).result("a", STEP, {}, work)
    assert work.runs == 2 and found.value == 1.5
    assert path.read_bytes() == whole


def test_a_step_whose_key_was_changed_is_not_that_of_the_other_inputs(tmp_path):
    """A file is believed for what it was made from, and for nothing else."""
    store, work = Store(tmp_path), Work()
    store.result("a", STEP, {"x": 1}, work)
    other = store.result("b", STEP, {"x": 1}, Work(2.5))
    (tmp_path / "steps" / "b.safetensors").replace(tmp_path / "steps" / "a.safetensors")
    assert store.result("a", STEP, {"x": 1}, work).value == 1.5 != other.value


@pytest.mark.parametrize("times", ["null", "5", "[]", "{", "[" * 100_000])
def test_damaged_times_cost_no_finished_step(tmp_path, times):
    (tmp_path / TIMINGS).write_text(times)
    work = Work()
    for _ in range(2):
        Store(tmp_path).result("a", STEP, {}, work)
    assert work.runs == 1
    assert set(json.loads((tmp_path / TIMINGS).read_text())) == {"a"}


def test_a_step_that_is_interrupted_leaves_nothing(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).result("a", STEP, {}, interrupted)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_finished_results_stay_until_there_are_new_ones(tmp_path):
    store = Store(tmp_path)
    store.result("a", STEP, {"x": 1}, Work())
    for name in (RESULTS, REPORT):
        store.write(name, "old")
    store.result("a", STEP, {"x": 2}, Work())
    assert (tmp_path / RESULTS).read_text() == (tmp_path / REPORT).read_text() == "old"


def test_the_same_step_is_the_same_bytes(tmp_path):
    for name in "ab":
        Store(tmp_path / name).result("step", STEP, {"x": 1}, Work())
    files = [tmp_path / name / "steps" / "step.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert Numbers.load(files[0]).value == 1.5
    assert files[0].read_bytes() != pack(Work()())


def test_a_file_in_the_way_is_refused_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        check_writable(tmp_path / "file" / "out")
    check_writable(tmp_path / "new" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_refused():
    with pytest.raises(InputError, match="/proc/out"):
        check_writable(Path("/proc/out"))


def test_json_is_sorted_and_has_no_nan():
    content = {"b": [1.0, math.nan], "a": {"z": [[0, 1]], 7: "<"}, "e": []}
    text = to_json(content)
    assert json.loads(text) == {"b": [1.0, None], "a": {"z": [[0, 1]], "7": "<"}, "e": []}
    assert text.index('"a"') < text.index('"b"')


def test_infinity_comes_back_from_json():
    numbers = [0.5, math.inf, math.nan]
    written = json.loads(to_json({"numbers": numbers}))["numbers"]
    assert written == [0.5, "infinite", None]
    found = [read_number(number) for number in written]
    assert found[:2] == numbers[:2] and math.isnan(found[2])
