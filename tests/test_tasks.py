import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.random_models import word_tokenizer
from tl_entity import InputError, PromptBatch, discovery_pairs, load_prompts
from tl_entity.tasks.boxes import (
    LABELS,
    BoxPrompt,
    box_dataset,
    box_prompts,
    mark_sentence,
    sample_prompts,
    save_prompts,
)
from tl_entity.tasks.marked import one_token_words, tokenize_marked
from tl_entity.tasks.nouns import OBJECTS

FORM = ["The", "the", "is", "in", "Box", "contains", ",", "."]
TOKENIZER = word_tokenizer([*FORM, *OBJECTS, *LABELS])


def solve(text: str) -> str:
    """The answer, by reading the text as a person would."""
    wanted = re.search(r"Box (\w) contains the$", text)[1]
    (answer,) = re.findall(rf"[Tt]he (\w+) is in Box {wanted}[,.]", text)
    return answer


def words_at(batch: PromptBatch, name: str) -> list[str]:
    tokens = batch.tokens[torch.arange(len(batch)), batch.position(name)]
    return TOKENIZER.convert_ids_to_tokens(tokens.tolist())


@pytest.mark.parametrize("n_boxes", [1, 2, 7, 12])
def test_answers_are_what_a_reader_finds(n_boxes: int) -> None:
    for prompt in sample_prompts(50, n_boxes=n_boxes, seed=1):
        assert solve(prompt.text) == prompt.answer
        assert len(set(prompt.objects)) == len(set(prompt.labels)) == n_boxes
        assert prompt.sentence == f"{prompt.text} {prompt.answer}."


def test_every_segment_is_asked_about() -> None:
    asked = {prompt.query_index for prompt in sample_prompts(200, n_boxes=5, seed=0)}
    assert asked == {0, 1, 2, 3, 4}


def test_the_seed_decides() -> None:
    assert sample_prompts(5, seed=3) == sample_prompts(5, seed=3)
    assert sample_prompts(5, seed=3) != sample_prompts(5, seed=4)


def test_positions_are_the_right_tokens_also_when_lengths_differ() -> None:
    prompts = [p for n in (2, 5, 3) for p in sample_prompts(4, n_boxes=n, seed=n)]
    batch = tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], TOKENIZER)
    assert batch.attention_mask is not None
    assert words_at(batch, "query_label") == [prompt.query_label for prompt in prompts]
    assert words_at(batch, "previous_query_label") == [prompt.query_label for prompt in prompts]
    assert words_at(batch, "correct_object") == [prompt.answer for prompt in prompts]
    assert words_at(batch, "last") == ["the"] * len(prompts)
    assert TOKENIZER.convert_ids_to_tokens(batch.answers.tolist()) == [p.answer for p in prompts]
    assert (batch.position("previous_query_label") < batch.position("query_label")).all()
    for row, prompt in enumerate(prompts):
        real = batch.tokens[row][batch.mask[row]].tolist()
        assert real == TOKENIZER(prompt.text)["input_ids"]


def test_other_phrasings_are_read_too() -> None:
    text = "Listen. The cup is in Box B, and the red key is in Box C. So, Box B contains the cup."
    marked = mark_sentence(text)
    assert marked.text.endswith("So, Box B contains the")
    assert [text[slice(*span)] for span in marked.spans.values()] == ["B", "B", "cup"]
    assert marked.spans["previous_query_label"][0] < marked.spans["query_label"][0]


def test_words_of_several_tokens_are_left_out_or_refused() -> None:
    small = word_tokenizer([*FORM, "cup", "key", *LABELS[:3]])
    assert one_token_words(small, ["cup", "key", "apple"]) == ("cup", "key")
    text = "The apple is in Box A. Box A contains the"
    with pytest.raises(InputError, match=r"'apple' \(correct_object\).*not one token.*<unk>"):
        tokenize_marked([mark_sentence(text)], small)
    batch = box_prompts(small, 20, n_boxes=2, seed=0)
    assert set(small.convert_ids_to_tokens(batch.answers.tolist())) == {"cup", "key"}
    with pytest.raises(InputError, match="4 boxes need as many labels, but only 3"):
        box_prompts(small, 1, n_boxes=4, seed=0)
    with pytest.raises(InputError, match="3 boxes need as many objects, but only 2"):
        box_prompts(small, 1, n_boxes=3, seed=0)


def test_jsonl_round_trip(tmp_path: Path) -> None:
    prompts = sample_prompts(6, seed=0)
    save_prompts(prompts, tmp_path / "prompts.jsonl")
    loaded = load_prompts(tmp_path / "prompts.jsonl", TOKENIZER)
    direct = tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], TOKENIZER)
    assert torch.equal(loaded.tokens, direct.tokens)
    assert torch.equal(loaded.answers, direct.answers)
    assert loaded.positions.keys() == direct.positions.keys()
    assert len(load_prompts(tmp_path / "prompts.jsonl", TOKENIZER, limit=2)) == 2


GOOD = "The cup is in Box B, the key is in Box C. Box B contains the cup."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not JSON"]),
        ("[1]", ['{"sentence"']),
        (json.dumps({"text": GOOD}), ['{"sentence"']),
        (json.dumps({"sentence": "Hello."}), ["question"]),
        (json.dumps({"sentence": GOOD.replace(" cup.", "")}), ["lacks the answer"]),
        (json.dumps({"sentence": GOOD.replace("the cup.", "the key.")}), ["cup", "not the key"]),
        (json.dumps({"sentence": GOOD.replace("Box B c", "Box D c")}), ["Box D", "0 times"]),
        (json.dumps({"sentence": GOOD.replace("Box C", "Box B")}), ["Box B", "2 times"]),
        (json.dumps({"sentence": GOOD.replace("cup", "zebra")}), ["zebra", "not one token"]),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, words: list[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"sentence": GOOD}) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        load_prompts(file, TOKENIZER)
    for word in [f"{file}, line 3: ", *words]:
        assert word in str(caught.value)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_prompts(tmp_path / "none.jsonl", TOKENIZER)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no prompts"):
        load_prompts(tmp_path / "empty.jsonl", TOKENIZER)


def test_dataset_holds_the_sentences() -> None:
    prompts = sample_prompts(3, seed=0)
    dataset = box_dataset(prompts)
    assert dataset.column_names == ["sentence"]
    assert dataset[1]["sentence"] == prompts[1].sentence


def test_pairs_share_nothing_but_the_form() -> None:
    pairs = discovery_pairs(TOKENIZER, 40, n_boxes=5, seed=0)
    assert torch.equal(pairs.targets, pairs.clean.answers)
    assert (pairs.corrupt.answers < 0).all()
    form = set(FORM) | {"<s>"}
    stand_ins = set()
    for row in range(len(pairs)):
        clean, corrupt = (
            TOKENIZER.convert_ids_to_tokens(batch.tokens[row].tolist())
            for batch in (pairs.clean, pairs.corrupt)
        )
        assert not (set(clean) - form) & (set(corrupt) - form)
        query = int(pairs.corrupt.position("query_label")[row])
        assert corrupt[query] in LABELS
        assert corrupt[query] not in corrupt[:query]
        stand_in = int(pairs.corrupt.position("previous_query_label")[row])
        assert corrupt[stand_in - 1 : stand_in + 1] == ["Box", corrupt[stand_in]]
        assert stand_in < query
        stand_ins.add(stand_in)
    assert len(stand_ins) == 5  # drawn anew for each pair
    again = discovery_pairs(TOKENIZER, 40, n_boxes=5, seed=0)
    assert torch.equal(pairs.corrupt.tokens, again.corrupt.tokens)


def test_pairs_are_the_same_if_all_their_prompts_are() -> None:
    pairs, again = (discovery_pairs(TOKENIZER, 6, n_boxes=3, seed=1) for _ in range(2))
    assert pairs.same_as(again)
    assert pairs[:4].same_as(again[torch.arange(4)])
    assert not pairs.same_as(again[:4])
    assert not pairs.same_as(again[torch.tensor([1, 0, 2, 3, 4, 5])])
    mixed = replace(again, corrupt=again.corrupt[torch.tensor([1, 0, 2, 3, 4, 5])])
    assert not pairs.same_as(mixed)


def test_pairs_that_would_have_to_share_labels_are_refused() -> None:
    with pytest.raises(InputError, match="13 boxes need 27 labels"):
        discovery_pairs(TOKENIZER, 1, n_boxes=13, seed=0)


def test_prompt_without_answer_has_no_sentence() -> None:
    with pytest.raises(ValueError, match="no answer"):
        _ = BoxPrompt(("cup",), ("A",), "B").sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": {}}, "'last'"),
        ({"positions": {"last": [2, 3]}}, "prompt 1 is 3"),
        ({"positions": {"last": [2, -1]}}, "prompt 1 is -1"),
        ({"attention_mask": [[1, 1, 1], [1, 1, 0]]}, "prompt 1 is 2"),
        ({"attention_mask": [[1, 0, 1], [1, 1, 1]]}, "holes"),
        ({"positions": {"last": [2, 1]}}, "tokens after"),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(changes: dict, message: str) -> None:
    fields = {"positions": {"last": [2, 2]}, "attention_mask": None, **changes}
    mask = fields["attention_mask"]
    with pytest.raises(InputError, match=message):
        PromptBatch(
            tokens=torch.zeros(2, 3, dtype=torch.long),
            answers=torch.zeros(2, dtype=torch.long),
            positions={n: torch.tensor(p) for n, p in fields["positions"].items()},
            attention_mask=None if mask is None else torch.tensor(mask),
        )


def test_chunks_are_the_prompts_in_order() -> None:
    batch = box_prompts(TOKENIZER, 5, n_boxes=2, seed=0)
    chunks = list(batch.chunks(2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert torch.equal(torch.cat([chunk.tokens for chunk in chunks]), batch.tokens)
    joined = torch.cat([chunk.position("query_label") for chunk in chunks])
    assert torch.equal(joined, batch.position("query_label"))
