"""A task of one's own, from marked texts to a circuit: indirect object identification.

`When Mary and John went to the store, John gave a book to` is followed by `Mary`. A two-layer model
is trained on such sentences here, which takes seconds; what is found in it says nothing about other
models.
"""

import random

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.random_models import word_tokenizer
from tl_entity import (
    Circuit,
    Head,
    InputError,
    PairBatch,
    Stage,
    dataset_pairs,
    dataset_prompts,
    discover_circuit,
    evaluate,
    learn_mask,
    load_model,
    marked_pairs,
    marked_prompts,
    mean_head_outputs,
    path_patch,
    summarize_attention,
)
from tl_entity.metrics import LOGIT_DIFFERENCE
from tl_entity.tasks.own import read_marks

NAMES = "Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Liam Mary Noah Olive Paul"
PLACES = "store park school garden station"
TEXT = (
    "When [[{one}|{a}]] [[after_{one}|and]] [[{two}|{b}]] [[after_{two}|went]] to the {place} , "
    "[[repeated|{c}]] gave a book to"
)
WORDS = f"When and went to the , gave a book {NAMES} {PLACES}".split()

HEADS = [Head(layer, head) for layer in range(2) for head in range(4)]

STAGES = (
    Stage("name_mover", "last"),
    Stage("query_builder", "last", into="name_mover", receiver_input="q"),
)


def texts(n: int, seed: int) -> list[dict[str, str]]:
    """Clean sentences, corrupt ones of three other names, the right name and the wrong one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        a, b, x, y, z = rng.sample(NAMES.split(), 5)
        place = rng.choice(PLACES.split())
        repeated, names = rng.choice(((a, ("earlier", "other")), (b, ("other", "earlier"))))
        how = {"place": place, "one": names[0], "two": names[1]}
        rows.append(
            {
                "clean": TEXT.format(a=a, b=b, c=repeated, **how),
                "corrupt": TEXT.format(a=x, b=y, c=z, **how),
                "answer": b if repeated == a else a,
                "foil": repeated,
            }
        )
    return rows


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


@pytest.fixture(scope="module")
def model():
    words = tokenizer()
    torch.manual_seed(0)
    small = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
        )
    )
    optimizer = torch.optim.AdamW(small.parameters(), lr=3e-3)
    for batch in dataset_pairs(words, texts(110 * 48, seed=1)).clean.chunks(48):
        loss = torch.nn.functional.cross_entropy(small(batch.tokens).logits[:, -1], batch.answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return load_model(small, tokenizer=words)


@pytest.fixture(scope="module")
def pairs(model) -> PairBatch:
    return dataset_pairs(model.tokenizer, Dataset.from_list(texts(40, seed=0)))


def test_the_task_is_found_and_solved(model, pairs):
    assert evaluate(model, pairs.clean).accuracy > 0.9
    names = {"earlier", "after_earlier", "other", "after_other", "repeated", "last"}
    assert set(pairs.clean.positions) == names
    words = model.tokenizer
    for i in range(5):
        tokens, at = pairs.clean.tokens[i], pairs.clean.positions
        assert tokens[at["other"][i]] == pairs.clean.answers[i] == pairs.targets[i]
        assert tokens[at["earlier"][i]] == tokens[at["repeated"][i]] == pairs.foils[i]
        assert words.decode(tokens[at["last"][i]]) == "to"


@pytest.mark.parametrize(
    ("position", "receivers", "receiver_input"),
    [("last", None, None), ("last", 2, "q"), ("last", 2, "v"), ("repeated", 2, "k")],
)
def test_scores_agree_with_plain_hooks(model, pairs, position, receivers, receiver_input):
    heads = None if receivers is None else path_patch(model, pairs).top(receivers)
    how = {"position": position, "receivers": heads, "receiver_input": receiver_input}
    for metric in ({}, {"metric": LOGIT_DIFFERENCE}):
        exact, hooks = (
            path_patch(model, pairs, **how, **metric, engine=engine)
            for engine in ("exact", "hooks")
        )
        torch.testing.assert_close(exact.per_example, hooks.per_example, atol=1e-4, rtol=1e-3)
        if receiver_input in (None, "q"):
            assert exact.scores.min() < -0.01  # something is found


def test_a_circuit_of_ones_own_stages(model, pairs):
    sizes = {"name_mover": 4, "query_builder": 4}
    found = discover_circuit(model, pairs, sizes=sizes, stages=STAGES)
    assert {head.layer for head in found.circuit["name_mover"]} == {1}
    assert {head.layer for head in found.circuit["query_builder"]} == {0}
    assert found.circuit.heads_at().keys() == {"last"}


@pytest.mark.parametrize("engine", ["exact", "hooks"])
def test_heads_at_ones_own_positions_are_ablated(model, pairs, engine):
    means = mean_head_outputs(model, pairs.corrupt)
    how = {"mean_outputs": means, "engine": engine}
    without_last = evaluate(model, pairs.clean, remove={"last": HEADS}, **how)
    assert without_last.accuracy < 0.4
    # Nothing above the first layer is read from there.
    assert evaluate(model, pairs.clean, remove={"earlier": HEADS[4:]}, **how).accuracy > 0.9
    kept = evaluate(model, pairs.clean, keep=dict.fromkeys(pairs.clean.positions, HEADS), **how)
    assert kept.accuracy > evaluate(model, pairs.clean, keep={}, **how).accuracy


def test_a_circuit_of_ones_own_groups_is_kept_with_its_positions(model, pairs, tmp_path):
    sizes = {"name_mover": 2, "query_builder": 1}
    found = discover_circuit(model, pairs, sizes=sizes, stages=STAGES).circuit
    found.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == found


def test_name_movers_look_at_the_other_name(model, pairs):
    mover = path_patch(model, pairs).top(1)
    seen = summarize_attention(model, pairs.clean, mover, from_position="last")
    weights = dict(zip(seen.names, seen.weights[0].tolist(), strict=True))
    # At the name itself, or at the next word, which layer 0 has told the name.
    other, earlier = (weights[name] + weights[f"after_{name}"] for name in ("other", "earlier"))
    assert other > 1.5 * earlier


def test_other_methods_take_it_too(model):
    """DCM: the heads whose output brings the counterfactual's name."""
    rows = texts(64, seed=7)
    counterfactual = texts(64, seed=8)
    pairs = marked_pairs(
        model.tokenizer,
        [row["clean"] for row in rows],
        [row["clean"] for row in counterfactual],
        answers=[row["answer"] for row in rows],
        targets=[row["answer"] for row in counterfactual],
    )
    assert not torch.equal(pairs.targets, pairs.clean.answers)
    mask = learn_mask(model, pairs, HEADS, position="last", batch_size=16, epochs=4)
    assert mask.losses[-1] < mask.losses[0]
    assert 1 in {head.layer for head in mask.selected}


MARKED = "the [[thing|cup]] is in Box [[box|A]] and"


def words() -> PreTrainedTokenizerFast:
    return word_tokenizer("the cup is in Box A B and ball".split())


def test_marks_are_taken_out_and_found():
    marked = read_marks("[[a|x]]y [[b|z]]", "w")
    assert marked.text == "xy z" and marked.answer == "w"
    assert {name: marked.text[slice(*span)] for name, span in marked.spans.items()} == {
        "a": "x",
        "b": "z",
    }
    batch = marked_prompts(words(), [MARKED], ["B"])
    assert batch.tokens.tolist() == [
        words()(MARKED.replace("[[thing|cup]]", "cup").replace("[[box|A]]", "A"))["input_ids"]
    ]
    assert {name: index.tolist() for name, index in batch.positions.items()} == {
        "thing": [2],
        "box": [6],
        "last": [7],
    }


def test_texts_of_unequal_length_are_padded_and_masked():
    pairs = marked_pairs(
        words(), ["the [[thing|cup]] is"], ["Box A and the [[thing|ball]] is"], answers=["in"]
    )
    assert pairs.clean.positions["thing"].tolist() == [2]
    assert pairs.corrupt.positions["thing"].tolist() == [5]
    batch = marked_prompts(words(), ["the cup", "Box"], None)
    assert batch.mask.sum(1).tolist() == [3, 2]
    assert batch.answers.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a [[x|b [[y|c]]]] d", "'y' stands inside 'x'"),
        ("a [[x|b [[y|c]] d", "brackets of another form"),
        ("a [[x|]] d", "brackets of another form"),
        ("a [[x|b|c]] d", "brackets of another form"),
        ("a [[x.first|b]] d", "'x.first' is made of other marks"),
        ("a [[last|b]]", "always the final token"),
        ("a [[x| b]]", "without spaces"),
        ("a [[x]] b", "brackets of another form"),
        ("a [[x|b]", "brackets of another form"),
        ("a [[x|b]] ", "ends with a space"),
    ],
)
def test_marks_of_another_form_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        read_marks(text)


def test_words_of_several_tokens_and_unequal_names_are_refused():
    with pytest.raises(InputError, match=r"'cup zebra' \(x\).*not one token.*<unk>"):
        marked_prompts(words(), ["the [[x|cup zebra]] in"])
    with pytest.raises(InputError, match=r"'cu' \(x\).*not one token or several whole ones.*'cup'"):
        marked_prompts(words(), ["the [[x|cu]]p in"])
    with pytest.raises(InputError, match=r"'x' stands for 2 tokens of prompt 0.*x\.first or x"):
        marked_prompts(words(), ["the [[x|cup is]] in"]).position("x")
    with pytest.raises(InputError, match="answer 'is in'"):
        marked_prompts(words(), ["the [[x|cup]]"], ["is in"])
    with pytest.raises(InputError, match="The clean prompts name x, the corrupt ones y"):
        marked_pairs(words(), ["the [[x|cup]]"], ["the [[y|cup]]"], answers=["is"])
    with pytest.raises(InputError, match="1 clean prompts, 2 corrupt prompts"):
        marked_pairs(words(), ["the"], ["the", "the"], answers=["is"])


def test_rows_with_missing_columns_are_refused_by_name():
    rows = [{"clean": "the [[x|cup]]", "corrupt": "the [[x|ball]]", "answer": "is"}]
    pairs = dataset_pairs(words(), Dataset.from_list(rows))
    assert pairs.foils is None and torch.equal(pairs.targets, pairs.clean.answers)
    with pytest.raises(InputError, match="Row 0 has no text in a column 'text'; it has clean"):
        dataset_prompts(words(), rows)
    with pytest.raises(InputError, match="Row 1 has no text in a column 'foil'"):
        dataset_pairs(words(), [{**rows[0], "foil": "A"}, rows[0]])
    prompts = dataset_prompts(words(), [{"sentence": "the [[x|cup]]"}], text="sentence")
    assert prompts.answers.tolist() == [-1]
