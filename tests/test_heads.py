import json
import pickle
from pathlib import Path

import pytest

from tl_entity import Circuit, Group, Head, InputError, Node
from tl_entity.heads import heads_by_position, without


def test_heads_are_named_and_read_by_name() -> None:
    assert str(Head(10, 3)) == "L10H3"
    assert Head.parse(" L10H3 ") == Head(10, 3) == (10, 3)
    for text in ("L10", "10.3", "L1H3x", "L-1H3", ""):
        with pytest.raises(InputError, match="like L10H3"):
            Head.parse(text)


def test_groups_are_reached_by_name_and_joined_by_position() -> None:
    circuit = Circuit.entity_tracking(
        value_fetcher=[(3, 1), (2, 0)], pos_transmitter=[(1, 1)], struct_reader=[(0, 5)]
    )
    assert circuit.value_fetcher == circuit["value_fetcher"] == (Head(3, 1), Head(2, 0))
    assert circuit.pos_detector == ()
    assert circuit.sizes == {
        "value_fetcher": 2,
        "pos_transmitter": 1,
        "pos_detector": 0,
        "struct_reader": 1,
    }
    assert len(circuit) == 4
    assert circuit.heads_at() == {
        "last": (Head(3, 1), Head(2, 0), Head(1, 1)),
        "query_label": (),
        "previous_query_label": (Head(0, 5),),
    }
    assert "pos_transmitter at last: L1H1" in str(circuit)
    with pytest.raises(KeyError):
        circuit["value_fetchers"]
    with pytest.raises(AttributeError, match="value_fetchers"):
        circuit.value_fetchers
    with pytest.raises(InputError, match="value_fetchers: no such group"):
        Circuit.entity_tracking(value_fetchers=[(0, 0)])


def test_circuits_survive_pickling() -> None:
    circuit = Circuit.entity_tracking(value_fetcher=[(3, 1)])
    assert pickle.loads(pickle.dumps(circuit)) == circuit


def test_a_head_acts_once_at_a_position() -> None:
    with pytest.raises(InputError, match=r"L3H1 .*'last'.*value_fetcher and pos_transmitter"):
        Circuit.entity_tracking(value_fetcher=[(3, 1)], pos_transmitter=[(3, 1)])
    with pytest.raises(InputError, match="L3H1"):
        Circuit.entity_tracking(value_fetcher=[(3, 1), (2, 0), (3, 1)])
    with pytest.raises(InputError, match="names a group twice"):
        Circuit((Group("a", "last", ()), Group("a", "early", ())))
    # At another position the same head is another part of the circuit.
    assert len(Circuit.entity_tracking(value_fetcher=[(3, 1)], pos_detector=[(3, 1)])) == 2


def test_the_file_is_the_papers_and_comes_back_the_same(tmp_path: Path) -> None:
    content = {
        "value_fetcher": [[3, 1], [2, 0]],
        "pos_transmitter": [[1, 1]],
        "pos_detector": [],
        "struct_reader": [[0, 5]],
    }
    file = tmp_path / "circuit.json"
    file.write_text(json.dumps(content))
    circuit = Circuit.load(file)
    assert circuit.value_fetcher == (Head(3, 1), Head(2, 0))
    assert [group.position for group in circuit] == [
        "last",
        "last",
        "query_label",
        "previous_query_label",
    ]
    circuit.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == content
    assert Circuit.load(tmp_path / "again.json") == circuit
    file.write_text(json.dumps({"pos_detector": [[1, 2]]}))
    assert Circuit.load(file) == Circuit.entity_tracking(pos_detector=[(1, 2)])


def test_own_groups_keep_their_positions(tmp_path: Path) -> None:
    circuit = Circuit(
        (
            Group("movers", "last", (Head(2, 3),)),
            Group("value_fetcher", "correct_object", (Head(1, 0), Head(1, 1))),
        )
    )
    circuit.save(tmp_path / "own.json")
    assert Circuit.load(tmp_path / "own.json") == circuit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[[1, 2]]", "object of groups"),
        ('{"value_fetcher": [[1]]}', "'value_fetcher' must be a list of"),
        ('{"value_fetcher": [[1, -2]]}', "'value_fetcher' must be a list of"),
        ('{"value_fetcher": [[1, true]]}', "'value_fetcher' must be a list of"),
        ('{"value_fetcher": [["1", "2"]]}', "'value_fetcher' must be a list of"),
        ('{"value_fetcher": 3}', "'value_fetcher' must be a list of"),
        ('{"movers": [[1, 2]]}', "'movers' needs its position"),
        ('{"movers": {"position": "last"}}', "'movers' must be a list of"),
        ('{"value_fetcher": [[1, 2], [1, 2]]}', "L1H2 is in the circuit twice"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "circuit.json"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        Circuit.load(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such circuit file"):
        Circuit.load(tmp_path / "none.json")


def test_a_folder_is_no_circuit(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        Circuit.load(tmp_path)


def test_heads_are_taken_away_only_at_their_own_position() -> None:
    circuit = Circuit.entity_tracking(value_fetcher=[(3, 1), (2, 0)], pos_detector=[(3, 1)])
    left = without(circuit, {"last": [Head(3, 1)], "nowhere": [Head(2, 0)]})
    assert left == {"last": (Head(2, 0),), "query_label": (Head(3, 1),), "previous_query_label": ()}
    assert heads_by_position({"last": [(1, 2)]}) == {"last": (Head(1, 2),)}
    assert heads_by_position(None) == {}


def test_a_node_is_written_as_it_is_read() -> None:
    for node, text in (
        (Node(10, 3, "label"), "L10H3@label"),
        (Node(2, None, "subject.last"), "MLP2@subject.last"),
    ):
        assert str(node) == text
        assert Node.parse(text) == node
    for wrong in ("L10H3", "L10@label", "MLP@label", "L1H2@"):
        with pytest.raises(InputError, match="does not name a node"):
            Node.parse(wrong)


def test_a_circuit_is_cut_down_group_by_group() -> None:
    circuit = Circuit.entity_tracking(
        value_fetcher=[(3, 1), (2, 0), (3, 2)], pos_detector=[(1, 1)], struct_reader=[(0, 0)]
    )
    found = circuit.restrict({"value_fetcher": [(3, 2), (3, 1)], "pos_detector": []})
    assert found.value_fetcher == (Head(3, 1), Head(3, 2))
    assert found.pos_detector == () and found.struct_reader == (Head(0, 0),)
    assert found.sizes == {**circuit.sizes, "value_fetcher": 2, "pos_detector": 0}
    with pytest.raises(InputError, match=r"L1H1 is not in the group 'value_fetcher'"):
        circuit.restrict({"value_fetcher": [(1, 1)]})
    with pytest.raises(InputError, match="no group 'nothing'"):
        circuit.restrict({"nothing": []})
