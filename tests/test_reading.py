"""JSON and text that somebody else wrote: plain data within bounds, or one sentence."""

import json
import os

import pytest

from tests.models.test_adapters import adapt
from tests.study.helpers import save_tiny_model
from tl_entity import Circuit, InputError, load_model, load_prompts
from tl_entity.heads import Head, as_head
from tl_entity.models.adapter_config import matches
from tl_entity.models.files import weight_files
from tl_entity.reading import MOST_DEPTH, parse_json, read_json, read_text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": }', ["is not a JSON file", "column 7"]),
        (b'{"a": 1,\n"b": }', ["line 2, column 6"]),
        (b"", ["is not a JSON file"]),
        (b"[1]", ["must hold a JSON object, not a list of 1"]),
        (b"null", ["must hold a JSON object, not null"]),
        (b"5", ["must hold a JSON object, not 5"]),
        (b'{"a": NaN}', ["NaN is no number"]),
        (b'{"a": -Infinity}', ["-Infinity is no number"]),
        (b'{"a": 1e999}', ["1e999 is too large"]),
        (b'{"a": ' + b"9" * 5000 + b"}", ["has 5000 digits"]),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", ["nested too deep"]),
        (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", ["nested too deep"]),
        (b'{"a": "\\ud800"}', ["half a character"]),
        (b'{"\\uD800": 1}', ["half a character"]),
        (b'{"a": "\xff"}', ["not a UTF-8 text file", "byte 7"]),
        ('{"a": 1}'.encode("utf-16"), ["not a UTF-8 text file"]),
    ],
)
def test_what_is_no_json_within_bounds_is_one_sentence_that_names_the_file(
    tmp_path, content, words
):
    file = tmp_path / "odd.json"
    file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_json(file)
    said = str(refused.value)
    assert len(said.splitlines()) == 1 and str(file) in said
    for word in words:
        assert word in said


def test_what_is_within_bounds_is_read_as_json_reads_it(tmp_path):
    deep: object = 1
    for _ in range(MOST_DEPTH - 2):
        deep = [deep]
    content = {"a": [1, -2.5, 1e300, True, None, "\u00e9\U0001f600"], "deep": deep, "": {}}
    file = tmp_path / "plain.json"
    # With the mark that some editors put at the beginning.
    file.write_text(json.dumps(content), encoding="utf-8-sig")
    assert read_json(file) == content
    assert parse_json('"\\ud83d\\ude00"', "text") == "\U0001f600"


def test_files_that_are_none_are_not_waited_for(tmp_path):
    pipe = tmp_path / "model.safetensors"
    os.mkfifo(pipe)
    for read in (read_text, Circuit.load):
        with pytest.raises(InputError, match="no plain file"):
            read(pipe)
    for kind, missing in (("no such file", tmp_path / "none"), ("it is a folder", tmp_path)):
        with pytest.raises(InputError, match=kind):
            read_text(missing)
    with pytest.raises(InputError, match="no such file"):
        read_text("a\0b")
    with pytest.raises(InputError, match="no plain file"):
        weight_files(tmp_path)


def test_a_circuit_of_many_heads_and_one_that_is_there_twice():
    heads = [(layer, head) for layer in range(200) for head in range(500)]
    assert len(Circuit.entity_tracking(value_fetcher=heads)) == 100_000
    with pytest.raises(InputError, match="L7H3 is in the circuit twice"):
        Circuit.entity_tracking(value_fetcher=[*heads, (7, 3)])


def test_heads_are_what_people_write():
    assert as_head((1, 2)) == as_head([1, 2]) == as_head("L1H2") == as_head(Head(1, 2)) == (1, 2)
    for odd in ([1], (1, 2, 3), None, 3, (1, True), (1, -2), (1, "2"), "1.2"):
        with pytest.raises(InputError, match=r"no head|does not name a head"):
            as_head(odd)


def test_many_prompts_are_read_with_news_and_the_bad_line_is_found(tmp_path):
    tokenizer = load_model("default-base").tokenizer
    good = "The cup is in Box B, the key is in Box C. Box B contains the cup."
    lines = [json.dumps({"sentence": good})] * 2500
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8-sig")
    told: list[int] = []
    prompts = load_prompts(file, tokenizer, progress=told.append)
    assert len(prompts) == 2500 and told == [1000, 1000, 500]
    for at in (0, 1234, 2499):
        bad = [*lines]
        bad[at] = bad[at].replace("cup", "zebra")
        bad[-1] = bad[-1].replace("key", "zebra")
        file.write_text("\n".join(bad))
        with pytest.raises(InputError, match=rf"line {at + 1}: .*zebra"):
            load_prompts(file, tokenizer)


def test_a_pattern_that_goes_back_and_forth_for_ever_is_refused():
    module = "model.layers.0.self_attn.q_proj"
    assert matches(r".*\.(q|k)_proj", module) and not matches("q_proj", module)
    with pytest.raises(InputError, match="takes for ever"):
        matches(r"(.|\w)+[!?]", module * 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": 1e308}, "too large"),
        ({"r": 1e-30}, "at least 1"),
        ({"target_modules": "a{99999999999999999999}"}, "pattern"),
    ],
)
def test_adapters_whose_settings_make_no_sense(tmp_path, change, words):
    base = save_tiny_model(tmp_path / "base", seed=1)
    adapter = tmp_path / "lora"
    adapt(base, adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=words):
        load_model(base, adapter=adapter)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"}, "attention_factor 'x'"),
        (
            {"rope_type": "yarn", "factor": 2.0, "beta_fast": [1]},
            "no configuration that can be read",
        ),
        ({"rope_type": "default", "rope_theta": 1e999}, "Infinity is no number"),
    ],
)
def test_rotary_settings_that_make_no_sense(tmp_path, rope, words):
    folder = save_tiny_model(tmp_path / "base", seed=1)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, **rope}
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load_model(folder)


@pytest.mark.parametrize("device", ["cpu:999", "abacus", "", "cuda:x", "meta"])
def test_devices_that_are_not_there(device):
    with pytest.raises(InputError, match="device"):
        load_model("default-base", device=device)
