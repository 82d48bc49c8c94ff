"""Every token has a role, and none of them tells which box is asked about."""

import pytest
import torch

from tl_entity import InputError, PromptBatch, box_prompts, discovery_pairs, load_tokenizer
from tl_entity.tasks.boxes import box_roles, mark_sentence
from tl_entity.tasks.marked import MarkedText, tokenize_marked

TOKENIZER = load_tokenizer("default-base")


def words_and_roles(batch: PromptBatch, row: int = 0) -> list[tuple[str, str]]:
    assert batch.roles is not None
    return [
        (TOKENIZER.decode([token]), batch.role_names[role])
        for token, role in zip(batch.tokens[row].tolist(), batch.roles[row].tolist(), strict=True)
    ]


def test_the_words_of_a_box_prompt_have_the_roles_of_any_segment() -> None:
    text = "The apple is in Box E, the bell is in Box Q. Box Q contains the"
    batch = tokenize_marked([mark_sentence(text)], TOKENIZER)
    segment = ["the", "object", "is", "in", "box", "label"]
    assert [role for _, role in words_and_roles(batch)] == [
        "beginning",
        *segment,
        "comma",
        *segment,
        "stop",
        "query_box",
        "query_label",
        "contains",
        "last",
    ]
    assert batch.knowing == ("previous_query_label", "correct_object")


def test_roles_are_blind_to_the_box_asked_about() -> None:
    text = "The apple is in Box E, the bell is in Box Q. Box {} contains the"
    asked = [tokenize_marked([mark_sentence(text.format(label))], TOKENIZER) for label in "EQ"]
    assert torch.equal(asked[0].roles, asked[1].roles)
    assert asked[0].role_names == asked[1].role_names
    assert not torch.equal(
        asked[0].position("previous_query_label"), asked[1].position("previous_query_label")
    )


def test_words_outside_segments_have_roles_of_their_own() -> None:
    text = (
        "A lamp fell. The apple is in Box E, and so the bell is in Box Q, as said. "
        "Box Q contains the"
    )
    roles = {text[slice(*span)]: role for role, span in box_roles(text)}
    assert roles["lamp"] == "before" and roles["so"] == "between" and roles["said"] == "after"
    assert roles["bell"] == "object" and roles["apple"] == "object"


def test_a_name_stands_for_its_tokens() -> None:
    batch = box_prompts(TOKENIZER, 5, n_boxes=3, seed=0)
    labels = batch.where("label")
    assert labels.sum(1).tolist() == [3] * 5
    for row in range(5):
        assert labels[row, batch.position("previous_query_label")[row]]
    assert torch.equal(batch.where("last").int().argmax(1), batch.position("last"))
    assert torch.equal(batch.first_token("label"), labels.int().argmax(1))
    with pytest.raises(InputError, match=r"no position 'nowhere'.*roles are beginning"):
        batch.where("nowhere")


def test_roles_go_with_the_prompts() -> None:
    pairs = discovery_pairs(TOKENIZER, 6, n_boxes=3, seed=0)
    some = pairs[torch.tensor([4, 1])].clean.to("cpu")
    assert torch.equal(some.roles, pairs.clean.roles[[4, 1]])
    assert some.role_names == pairs.clean.role_names and some.knowing == pairs.clean.knowing
    assert [len(chunk.roles) for chunk in pairs.clean.chunks(4)] == [4, 2]


def test_padding_has_no_role() -> None:
    texts = [
        "The apple is in Box E. Box E contains the",
        "The apple is in Box E, the bell is in Box Q. Box Q contains the",
    ]
    batch = tokenize_marked([mark_sentence(text) for text in texts], TOKENIZER)
    assert torch.equal(batch.roles >= 0, batch.mask)


def test_roles_that_contradict_the_prompts_are_refused() -> None:
    tokens, zeros = torch.tensor([[3, 4, 5]]), torch.tensor([0])
    made = {"tokens": tokens, "answers": zeros, "positions": {"last": torch.tensor([2])}}
    names = ("a", "last")
    right = PromptBatch(**made, roles=torch.tensor([[0, 0, 1]]), role_names=names)
    assert right.where("a").tolist() == [[True, True, False]]
    with pytest.raises(InputError, match="Token 1 of prompt 0 has role 2"):
        PromptBatch(**made, roles=torch.tensor([[0, 2, 1]]), role_names=names)
    with pytest.raises(InputError, match="share a name"):
        PromptBatch(**made, roles=torch.tensor([[0, 0, 1]]), role_names=("a", "a"))
    with pytest.raises(InputError, match="'last' names a position and a role"):
        PromptBatch(**made, roles=torch.tensor([[1, 0, 0]]), role_names=names)
    with pytest.raises(InputError, match="say of no token"):
        PromptBatch(**made, role_names=names)
    with pytest.raises(InputError, match="1 of 2 prompts say which roles"):
        text = mark_sentence("The apple is in Box E. Box E contains the")
        tokenize_marked([text, MarkedText(text.text, text.spans)], TOKENIZER)
