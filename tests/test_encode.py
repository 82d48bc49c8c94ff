"""Special tokens in prompts: one beginning, also where a chat template rendered it."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tl_entity import load_model
from tl_entity.tasks.encode import encode
from tl_entity.tasks.marked import one_token_words
from tl_entity.tasks.own import marked_pairs, marked_prompts

NAMES = ["<unk>", "<s>", "</s>", "<lang>", "[INST]", "[/INST]", "The", "apple", "is", "in", "Box"]
NAMES += ["A", "B", ".", "contains", "the", "bell", "pear"]
IDS = {name: index for index, name in enumerate(NAMES)}
AROUND = [("<s>", 1), ("</s>", 2), ("<lang>", 3)]


def template(single: str) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=AROUND)


AFTER: dict[str, Any] = {
    "nothing": None,
    "a beginning": template("<s> $A"),
    "beginning and end": template("<s> $A </s>"),
    "an end": template("$A </s>"),
    "two tokens before": template("<s> <lang> $A </s>"),
    "in a sequence": processors.Sequence([processors.ByteLevel(), template("<s> $A")]),
    "as BERT": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
}
BEFORE = {
    "nothing": [],
    "an end": [],
    "two tokens before": [1, 3],
}
"""What stands before a plain text; a beginning in the others."""

CHAT = "{{ bos_token }} [INST] {{ messages[0]['content'] }} [/INST]"


def tokenizer(after: Any = None, **settings: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if after is not None:
        words.post_processor = after
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=["<lang>", "[INST]", "[/INST]"],
        chat_template=CHAT,
        **settings,
    )


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


@pytest.mark.parametrize("kind", AFTER)
def test_a_rendered_chat_has_the_templates_own_tokens(kind: str) -> None:
    reads: Any = tokenizer(AFTER[kind])
    marked = "The [[object|apple]] is in Box A . Box A contains the"
    plain = "The apple is in Box A . Box A contains the"
    chat = [{"role": "user", "content": plain}]
    own = reads.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert own == ids(f"<s> [INST] {plain} [/INST]")
    text = reads.apply_chat_template([{"role": "user", "content": marked}], tokenize=False)
    batch = marked_prompts(reads, [text], ["apple"])
    assert batch.tokens.tolist() == [own]
    assert batch.answers.tolist() == [IDS["apple"]]
    assert batch.position("object").tolist() == [3]
    assert batch.position("last").tolist() == [len(own) - 1]


@pytest.mark.parametrize("kind", AFTER)
def test_a_plain_text_keeps_its_beginning_and_is_left_open(kind: str) -> None:
    reads = tokenizer(AFTER[kind])
    before = BEFORE.get(kind, [1])
    texts = ["The [[object|apple]] is in Box", "The [[object|bell]] is in Box A . Box"]
    batch = marked_prompts(reads, texts, ["A", "B"])
    rows = [before + ids("The apple is in Box"), before + ids("The bell is in Box A . Box")]
    assert batch.tokens.tolist() == [rows[0] + [2, 2, 2], rows[1]]
    assert batch.answers.tolist() == [IDS["A"], IDS["B"]]
    assert batch.position("object").tolist() == [len(before) + 1] * 2
    assert batch.position("last").tolist() == [len(row) - 1 for row in rows]
    assert one_token_words(reads, ["apple", "zebra", "apple."]) == ("apple",)


def test_a_beginning_that_the_tokenizers_settings_ask_for() -> None:
    reads = tokenizer(add_bos_token=True, add_eos_token=True)
    texts = [encoded.ids for encoded in encode(reads, ["<s> The apple", "The apple"])]
    assert texts == [ids("<s> The apple")] * 2


def test_white_space_before_the_beginning() -> None:
    reads = tokenizer(AFTER["beginning and end"])
    (encoded,) = encode(reads, ["\n <s>The apple"])
    assert encoded.ids == ids("<s> The apple")
    assert encoded.offsets == [(2, 5), (5, 8), (9, 14)]


def test_only_what_the_text_lacks_is_put_before_it() -> None:
    reads = tokenizer(AFTER["two tokens before"])
    texts = ["The apple", "<lang> The apple", "<s> The apple", "The <s> apple"]
    assert [encoded.ids for encoded in encode(reads, texts)] == [
        ids("<s> <lang> The apple"),
        ids("<s> <lang> The apple"),
        ids("<s> The apple"),  # as a template gives it
        ids("<s> <lang> The <s> apple"),  # no beginning where it stands
    ]


def test_pairs_targets_and_foils_after_a_rendered_chat() -> None:
    reads = tokenizer(AFTER["beginning and end"])
    pairs = marked_pairs(
        reads,
        ["<s> [INST] The [[object|apple]] is in Box"],
        ["<s> [INST] The [[object|bell]] is in Box"],
        answers=["A"],
        targets=["B"],
        foils=["pear"],
    )
    assert pairs.clean.tokens.tolist() == [ids("<s> [INST] The apple is in Box")]
    assert pairs.corrupt.tokens.tolist() == [ids("<s> [INST] The bell is in Box")]
    assert pairs.targets.tolist() == [IDS["B"]]
    assert pairs.foils is not None
    assert pairs.foils.tolist() == [IDS["pear"]]


def test_transformer_lens_is_told_of_the_beginning(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(NAMES), hidden_size=16, intermediate_size=16, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(AFTER["a beginning"]).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert model.to_tokens("The apple").tolist() == [ids("<s> The apple")]
    rendered = model.to_tokens("<s> The apple", prepend_bos=False)
    assert rendered.tolist() == [ids("<s> The apple")]
