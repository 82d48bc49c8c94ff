import pytest
import torch

from tests.random_models import random_model, random_prompts
from tl_entity import Head, InputError, PromptBatch, attention_over_prompt, summarize_attention

PROMPTS = random_prompts(6, 8)


@pytest.mark.parametrize("left", [False, True])
def test_rows_sum_to_one(left: bool) -> None:
    heads = [Head(2, 1), Head(0, 3)]
    prompts = random_prompts(6, 8, left=left)
    for name in ("last", "place"):
        for batch_size in (4, 32):
            found = summarize_attention(
                random_model(), prompts, heads, from_position=name, batch_size=batch_size
            )
            assert found.heads == tuple(heads)
            torch.testing.assert_close(found.weights.sum(1), torch.ones(2))


@pytest.mark.parametrize("left", [False, True])
def test_weights_and_offsets_are_those_of_the_pattern(left: bool) -> None:
    model, head = random_model(), Head(1, 2)
    prompts = random_prompts(6, 8, left=left)
    # No name for the first token, so that its weight counts as the first token's.
    places = {name: prompts.position(name) for name in ("last", "place")}
    prompts = PromptBatch(prompts.tokens, prompts.answers, places, prompts.attention_mask)
    found = summarize_attention(model, prompts, [head], from_position="last")
    expected, offsets = dict.fromkeys(found.names, 0.0), []
    for row in range(6):
        # Each prompt alone and unpadded.
        _, cache = model.run_with_cache(prompts.tokens[row][prompts.mask[row]][None])
        weights = cache["blocks.1.attn.hook_pattern"][0, head.head, -1].tolist()
        offsets.append(len(weights) - 1 - weights.index(max(weights)))
        start = int(prompts.mask[row].int().argmax())
        named = {name: int(prompts.position(name)[row]) - start for name in prompts.positions}
        for name, index in {**named, "first_token": 0}.items():
            expected[name] += weights[index] / 6
            weights[index] = 0.0  # a second name for the same token gets nothing
        expected["elsewhere"] += sum(weights) / 6
    assert found.names == ("last", "place", "first_token", "elsewhere")
    assert found.weights[0].tolist() == pytest.approx(list(expected.values()), abs=1e-5)
    share = max(offsets.count(offset) for offset in offsets) / 6
    assert found.offset_share.item() == pytest.approx(share)
    assert offsets.count(int(found.common_offset)) / 6 == pytest.approx(share)


def test_uniform_attention_by_hand() -> None:
    model = random_model(n_layers=1)
    for name in ("W_Q", "b_Q"):
        getattr(model.blocks[0].attn, name).data.zero_()
    positions = {
        name: torch.tensor([at]) for name, at in (("object", 2), ("label", 3), ("last", 4))
    }
    prompts = PromptBatch(torch.arange(5)[None], torch.tensor([0]), positions)
    found = summarize_attention(model, prompts, [Head(0, 1)], from_position="label")
    # Tokens 0 to 3 are seen, a quarter each; the last comes later and is left out.
    assert found.names == ("object", "label", "first_token", "elsewhere")
    assert found.weights[0].tolist() == pytest.approx([0.25] * 4)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="no head L3H0"):
        summarize_attention(random_model(), PROMPTS, [Head(3, 0)], from_position="last")
    with pytest.raises(InputError, match="no position 'nowhere'"):
        summarize_attention(random_model(), PROMPTS, [Head(0, 0)], from_position="nowhere")


@pytest.mark.parametrize("left", [False, True])
def test_one_prompt_in_two_models_is_as_if_it_were_alone(left: bool) -> None:
    models = {"one": random_model(seed=0), "two": random_model(seed=1)}
    prompts, heads = random_prompts(6, 8, left=left), [Head(2, 1), Head(0, 3)]
    for index in range(len(prompts)):
        found = attention_over_prompt(models, prompts, heads, index=index)
        tokens = prompts.tokens[index][prompts.mask[index]]
        assert found.tokens == tuple(str(token) for token in tokens.tolist())
        start = int(prompts.mask[index].int().argmax())
        assert found.positions == {
            name: int(at[index]) - start for name, at in prompts.positions.items()
        }
        for i, model in enumerate(models.values()):
            _, cache = model.run_with_cache(tokens[None])
            for j, head in enumerate(heads):
                expected = cache[f"blocks.{head.layer}.attn.hook_pattern"][0, head.head].float()
                torch.testing.assert_close(found.weights[i, j], expected)


def test_a_prompts_picture_has_a_panel_for_each_head_and_model_and_marks_the_positions() -> None:
    models = {"one": random_model(seed=0), "<i>two": random_model(seed=1)}
    found = attention_over_prompt(models, PROMPTS, [Head(2, 1), Head(0, 3)], index=3)
    figure = found.plot()
    titles = {note.text for note in figure.layout.annotations}
    assert titles == {"L2H1, one", "L2H1, &lt;i&gt;two", "L0H3, one", "L0H3, &lt;i&gt;two"}
    shown = torch.tensor(figure.data[3].z)
    later = torch.ones_like(shown).triu(1).bool()
    assert shown[later].isnan().all()
    torch.testing.assert_close(shown[~later], found.weights[1, 1][~later].double())
    assert len({line.x0 for line in figure.layout.shapes if line.x0 == line.x1}) == len(
        set(found.positions.values())
    )
    table = found.to_dataframe()
    assert len(table) == 2 * 2 * len(found.positions)
    last = table[(table["model"] == "one") & (table["from"] == "last")].iloc[0]
    assert last["weight_1"] == pytest.approx(found.weights[0, 0, found.positions["last"]].max())


def test_there_must_be_such_a_prompt_and_head() -> None:
    with pytest.raises(InputError, match="no prompt 6"):
        attention_over_prompt(random_model(), PROMPTS, [Head(0, 0)], index=6)
    with pytest.raises(InputError, match="L9H0"):
        attention_over_prompt(random_model(), PROMPTS, [Head(9, 0)])
