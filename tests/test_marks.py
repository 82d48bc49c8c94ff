"""Marks of several tokens and in several places give every token a role, whatever the padding."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.random_models import random_model, word_tokenizer
from tl_entity import (
    Head,
    InputError,
    PromptBatch,
    evaluate,
    marked_pairs,
    marked_prompts,
    path_patch,
    pooled_ablation,
)
from tl_entity.tasks.aligned import AlignedPairs

WORDS = "the very old keys on table door to cabinet are is red cup".split()
TOKENIZER = word_tokenizer(WORDS)
TEXTS = [
    "the [[subject|very old keys]] on the table [[link|to]] the",
    "[[subject|keys]] [[link|to]] the red door",
    "the red [[subject|old cup]] [[link|on]] the cabinet to the",
]
BY_HAND = [
    "beginning subject.before subject subject subject subject.after subject.after subject.after "
    "link last",
    "beginning subject link link.after link.after last",
    "beginning subject.before subject.before subject subject link link.after link.after link.after "
    "last",
]


def roles_of(batch: PromptBatch, row: int) -> str:
    assert batch.roles is not None
    return " ".join(batch.role_names[role] for role in batch.roles[row][batch.mask[row]].tolist())


def padded_left(batch: PromptBatch) -> PromptBatch:
    """The same prompts, their padding moved to the left."""
    shifts = (~batch.mask).sum(1)

    def rolled(rows: Tensor | None) -> Tensor:
        assert rows is not None
        return torch.stack([row.roll(int(n)) for row, n in zip(rows, shifts, strict=True)])

    return replace(
        batch,
        tokens=rolled(batch.tokens),
        attention_mask=rolled(batch.attention_mask),
        roles=rolled(batch.roles),
        positions={name: index + shifts for name, index in batch.positions.items()},
        spans={name: rolled(where) for name, where in batch.spans.items()},
    )


def batches() -> dict[str, PromptBatch]:
    right = marked_prompts(TOKENIZER, TEXTS, ["are", "is", "is"])
    return {"right": right, "left": padded_left(right)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_token_has_the_role_that_a_person_gives_it(side) -> None:
    batch = batches()[side]
    assert [roles_of(batch, row) for row in range(3)] == BY_HAND
    shifts = (~batch.mask).sum(1) if side == "left" else torch.zeros(3, dtype=torch.long)
    assert (batch.position("subject.first") - shifts).tolist() == [2, 1, 3]
    assert (batch.position("subject.last") - shifts).tolist() == [4, 1, 4]
    assert batch.where("subject").sum(1).tolist() == [3, 1, 2]
    assert torch.equal(batch.where("subject.last").int().argmax(1), batch.position("subject.last"))
    # One token in every prompt: a position, its own first and last.
    assert (batch.position("link") - shifts).tolist() == [8, 2, 5]
    assert torch.equal(batch.position("link.first"), batch.position("link"))
    assert batch.knowing == ()
    with pytest.raises(InputError, match=r"'subject' stands for 3 tokens .* subject\.first or"):
        batch.position("subject")


def test_a_name_may_come_in_several_places() -> None:
    text = "[[thing|old keys]] on the [[place|table]], [[thing|cup]] on the [[place|red door]]"
    batch = marked_prompts(word_tokenizer([*WORDS, ","]), [text + " the"])
    assert roles_of(batch, 0) == (
        "beginning thing thing thing.after thing.after place place.after thing "
        "thing.after thing.after place place last"
    )
    at = {name: batch.where(name)[0].nonzero()[:, 0].tolist() for name in ("place", "thing")}
    assert at == {"place": [5, 10, 11], "thing": [1, 2, 7]}
    ends = {name: where[0].nonzero()[:, 0].tolist() for name, where in batch.spans.items()}
    assert ends == {
        "place.first": [5, 10],
        "place.last": [5, 11],
        "thing.first": [1, 7],
        "thing.last": [2, 7],
    }
    with pytest.raises(InputError, match=r"'thing\.first' stands for 2 tokens of prompt 0"):
        batch.position("thing.first")


def test_a_mark_that_knows_gives_positions_and_no_role() -> None:
    texts = [
        "the [[thing|[[right|red cup]]]] and [[thing|door]] to [[asked|the]] table",
        "the [[thing|cup]] and [[thing|[[right|old keys]]]] to [[asked|the]] table",
    ]
    tokenizer = word_tokenizer([*WORDS, "and"])
    batch = marked_prompts(tokenizer, texts, knowing="right")
    assert "right" not in batch.role_names
    assert [roles_of(batch, row) for row in range(2)] == [
        "beginning thing.before thing thing thing.after thing thing.after asked last",
        "beginning thing.before thing thing.after thing thing thing.after asked last",
    ]
    assert batch.where("right").nonzero().tolist() == [[0, 2], [0, 3], [1, 4], [1, 5]]
    assert batch.position("right.last").tolist() == [3, 5]
    assert batch.knowing == ("right", "right.first", "right.last")
    assert batch[1:].where("right").nonzero().tolist() == [[0, 4], [0, 5]]
    with pytest.raises(InputError, match="stands inside"):
        marked_prompts(tokenizer, texts)
    with pytest.raises(InputError, match="No mark has the name wrong"):
        marked_prompts(tokenizer, texts, knowing=["right", "wrong"])


def test_the_partition_is_blind_to_marks_that_know() -> None:
    """The same words with the knowing mark elsewhere have the same roles."""
    one = "the [[thing|[[right|cup]]]] on [[thing|door]] to"
    other = "the [[thing|cup]] on [[thing|[[right|door]]]] to"
    first, second = (marked_prompts(TOKENIZER, [text], knowing="right") for text in (one, other))
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.roles, second.roles)
    assert first.role_names == second.role_names
    assert first.position("right").tolist() != second.position("right").tolist()


def test_texts_whose_marks_all_know_or_that_have_none_have_roles_too() -> None:
    assert roles_of(marked_prompts(TOKENIZER, "the old cup is"), 0) == (
        "beginning unmarked unmarked unmarked last"
    )
    known = marked_prompts(TOKENIZER, "the [[other|old]] cup is", knowing="other")
    assert roles_of(known, 0) == "beginning unmarked unmarked unmarked last"
    assert known.position("other").tolist() == [2]
    # A mark at the final token keeps its name there.
    assert roles_of(marked_prompts(TOKENIZER, "the old [[verb|is]]"), 0) == (
        "beginning verb.before verb.before verb"
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_pooled_ablation_is_the_mean_over_the_tokens_of_a_role(side, n_kv_heads) -> None:
    model = random_model(n_kv_heads=n_kv_heads)
    batch = batches()[side]
    found = pooled_ablation(model, batch)
    assert found.role_names == batch.role_names and "right" not in found.role_names
    for role in dict.fromkeys(" ".join(BY_HAND).split()):
        outputs = []
        for row, names in enumerate(BY_HAND):
            alone = batch.tokens[row][batch.mask[row]][None]
            _, cache = model.run_with_cache(alone)
            z = torch.stack([cache["z", layer][0] for layer in range(model.cfg.n_layers)])
            outputs += [z[:, at] for at, name in enumerate(names.split()) if name == role]
        index = found.role_names.index(role)
        torch.testing.assert_close(found.outputs[:, index], torch.stack(outputs).mean(0))


@pytest.mark.parametrize("name", ["subject", "subject.last", "link.after", "right"])
@pytest.mark.parametrize("engine", ["exact", "hooks"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_heads_are_removed_at_all_tokens_of_a_name(name, engine, side) -> None:
    model = random_model()
    texts = [text.replace("red", "[[right|red]]") for text in TEXTS[1:]]
    batch = marked_prompts(TOKENIZER, texts, ["are", "is"], knowing="right")
    assert batch.attention_mask is not None
    batch = padded_left(batch) if side == "left" else batch
    heads = [Head(0, 1), Head(1, 2), Head(1, 3)]
    ablation = pooled_ablation(model, batch)
    removed = evaluate(model, batch, remove={name: heads}, ablation=ablation, engine=engine)
    roles = [role.split() for role in BY_HAND[1:]]
    of_name = {
        "subject": [[1], [3, 4]],
        "subject.last": [[1], [4]],
        "link.after": [[3, 4], [6, 7, 8]],
        "right": [[4], [2]],
    }[name]
    for row in range(2):
        alone = batch.tokens[row][batch.mask[row]][None]

        def ablate(z: Tensor, hook: object, row: int = row) -> Tensor:
            for layer, head in heads:
                if hook.name == f"blocks.{layer}.attn.hook_z":
                    for token in of_name[row]:
                        role = ablation.role_names.index(roles[row][token])
                        z[0, token, head] = ablation.outputs[layer, role, head]
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", ablate) for layer in range(2)]
        logits = model.run_with_hooks(alone, fwd_hooks=hooks)[0, -1]
        expected = logits.log_softmax(-1)[batch.answers[row]]
        torch.testing.assert_close(removed.answer_log_probability[row], expected)
    whole = evaluate(model, batch)
    assert (removed.answer_log_probability - whole.answer_log_probability).abs().max() > 1e-3


def test_prompts_of_different_length_are_aligned_by_role() -> None:
    clean = ["the [[subject|very old keys]] on the table [[link|to]] the"] * 2
    corrupt = [
        "the [[subject|old red cup]] [[link|on]] door the",
        "the red [[subject|very old door]] on the red table [[link|to]] the",
    ]
    pairs = marked_pairs(TOKENIZER, clean, corrupt, answers=["are", "are"])
    twins = AlignedPairs.draw(pairs, seed=None)
    subject = twins.tokens("subject")
    assert subject.rows.tolist() == [0, 0, 0, 1, 1, 1]
    assert subject.clean.tolist() == [2, 3, 4, 2, 3, 4]
    assert subject.corrupt.tolist() == [2, 3, 4, 3, 4, 5]
    assert twins.tokens("subject.last").corrupt.tolist() == [4, 5]
    assert twins.tokens("last").corrupt.tolist() == [7, 11]
    with pytest.raises(InputError, match=r"has 3 clean and 0 corrupt tokens of 'subject\.after"):
        twins.tokens("subject.after")


@pytest.mark.parametrize("position", ["subject.first", "subject.last", "link"])
def test_heads_are_patched_at_either_end_of_a_mark(position) -> None:
    model = random_model()
    pairs = marked_pairs(
        TOKENIZER,
        [TEXTS[0], TEXTS[1]],
        [TEXTS[2], TEXTS[0]],
        answers=["are", "is"],
    )
    how = {"position": position, "receivers": [Head(2, 0)], "receiver_input": "v"}
    exact, hooks = (path_patch(model, pairs, **how, engine=e) for e in ("exact", "hooks"))
    torch.testing.assert_close(exact.per_example, hooks.per_example)
    assert exact.per_example.abs().max() > 1e-4
    with pytest.raises(InputError, match="'subject' stands for 3 tokens of prompt 0"):
        path_patch(model, pairs, position="subject")


def test_answers_may_go_on_where_the_text_ends() -> None:
    tokenizer = word_tokenizer(["the", "cup", "-", "is"])
    batch = marked_prompts(tokenizer, "the [[x|cup]]-", "is", space=False)
    assert tokenizer.convert_ids_to_tokens(batch.tokens[0].tolist())[-1] == "-"
    assert tokenizer.decode([int(batch.answers)]) == "is"
    spaced = marked_prompts(tokenizer, "the [[x|cup]] ", "is", space=False)
    assert spaced.tokens.shape[1] == 3
