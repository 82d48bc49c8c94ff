"""The tokens are those of tokenizer.json, and each has an embedding."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models.helpers import llama, save
from tests.models.test_adapters import adapt
from tl_entity.errors import InputError
from tl_entity.methods.plan import read_configuration
from tl_entity.models.load import load_model, load_tokenizer, with_adapter

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
CLASSES = [
    "PreTrainedTokenizerFast",
    "LlamaTokenizerFast",
    "Qwen2TokenizerFast",
    "LlamaTokenizer",
    None,
]
TEXTS = [
    "The apple is in Box A, the bell is in Box B. Box A contains the",
    "<s>The  apple <|user|> is</s> 1234 <|user|>\n na\u00efve \u65e5 APPLE's",
]
WORDS = ["The", "the", "apple", "bell", "is", "in", "Box", "A", "B", "contains", ",", ".", "1234"]
BEGIN = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BEGIN_AND_END = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
)


def words() -> Tokenizer:
    names = ["<unk>", "<s>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """Bytes and a few merges; numbers in groups of three digits."""
    merges = [("T", "h"), ("Th", "e"), ("\u0120", "B"), ("o", "x"), ("\u0120B", "ox"), ("1", "2")]
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(names)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    after: Any = BEGIN,
    family: str = "llama",
    **settings: Any,
) -> Tokenizer:
    """The files of a tokenizer, and what its tokenizer.json says read by tokenizers alone."""
    folder.mkdir(exist_ok=True)
    specials = [AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>", "<|user|>")]
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = after
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if value is not None})
    )
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("kind", [words, byte_level])
def test_tokens_are_those_of_the_file(
    family: str, class_name: str | None, kind: Any, tmp_path: Path
) -> None:
    reference = write(tmp_path, kind(), family=family, tokenizer_class=class_name, **NAMES)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = reference.encode(text)
        given = tokenizer(text, return_offsets_mapping=True)
        assert given["input_ids"] == expected.ids
        assert given["offset_mapping"] == expected.offsets
    assert tokenizer.get_vocab() == reference.get_vocab()  # no token that the model never saw
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.unk_token == "<unk>"


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("after", [None, BEGIN, BEGIN_AND_END])
@pytest.mark.parametrize("setting", [True, False])
def test_special_tokens_are_put_as_the_file_says(
    class_name: str | None, after: Any, setting: bool, tmp_path: Path
) -> None:
    settings = {"tokenizer_class": class_name, "add_bos_token": setting, "add_eos_token": setting}
    reference = write(tmp_path, byte_level(), after=after, **NAMES, **settings)
    assert load_tokenizer(tmp_path)("The Box")["input_ids"] == reference.encode("The Box").ids


@pytest.mark.parametrize("class_name", ["LlamaTokenizerFast", "Unheard"])
def test_what_the_file_does_not_hold_is_carried_over(class_name: str, tmp_path: Path) -> None:
    write(
        tmp_path,
        words(),
        tokenizer_class=class_name,
        chat_template="{{ bos_token }}{{ messages[0]['content'] }}",
        model_max_length=77,
        **NAMES,
    )
    tokenizer: Any = load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "the apple"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<s>the apple"
    assert tokenizer.model_max_length == 77
    assert set(tokenizer("the apple")) == {"input_ids", "attention_mask"}


def test_names_that_are_left_to_the_class(tmp_path: Path) -> None:
    # As in old checkpoints, whose settings name no special token.
    write(tmp_path, words(), tokenizer_class="LlamaTokenizerFast")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer("zebra")["input_ids"][-1] == tokenizer.unk_token_id


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, words(), **NAMES)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text()[:300])
    with pytest.raises(InputError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path)


def foreign(n_words: int = 50) -> PreTrainedTokenizerFast:
    """A tokenizer like the checkpoint's, but `w3` to `w39` have other numbers, and it has more."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {f"w{n_words + 2 - i}": i for i in range(3, n_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_another_models_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "base")
    foreign().save_pretrained(folder)
    # Number 40 is the first that the embedding of 40 rows lacks.
    for refused in (
        lambda: load_model(folder, device="cpu"),
        lambda: load_model(folder, device="cpu", backend="bridge"),
        lambda: read_configuration(str(folder), device="cpu"),
    ):
        with pytest.raises(InputError, match=f"{folder}.*another model's.*'w12'.*40.* 40 tokens"):
            refused()
    with pytest.raises(InputError, match=r"tokenizer given.*another model's"):
        load_model(folder, tokenizer=foreign(), device="cpu")
    assert load_model(folder, tokenizer=foreign(40), device="cpu").tokenizer("w39")


def test_added_tokens_without_an_embedding(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path, prepends_bos=True)
    tokenizer: Any = load_tokenizer(folder)
    tokenizer.add_tokens(["never"])
    tokenizer.save_pretrained(folder)
    assert load_model(folder, device="cpu").tokenizer.convert_tokens_to_ids("never") == 40
    # One that stands in every text can't be done without.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="never $A", special_tokens=[("never", 40)]
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"'never'.*40"):
        load_model(folder, device="cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(llama(), tmp_path / "base", prepends_bos=True)


def test_an_adapters_own_tokenizer_is_used(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapt(base, adapter)
    plain = load_model(base, device="cpu")
    assert plain.to_tokens("w5 w7").tolist() == [[0, 5, 7]]
    assert load_model(base, adapter=adapter, device="cpu").to_tokens("w5").tolist() == [[0, 5]]
    # The adapter was trained on other numbers, and without a beginning.
    foreign(40).save_pretrained(adapter)
    for tuned in (load_model(base, adapter=adapter, device="cpu"), with_adapter(plain, adapter)):
        assert tuned.to_tokens("w5 w7").tolist() == [[37, 35]]
        assert not tuned.cfg.default_prepend_bos
    given: Any = plain.tokenizer
    for tuned in (
        load_model(base, adapter=adapter, tokenizer=given, device="cpu"),
        with_adapter(plain, adapter, tokenizer=given),
    ):
        assert tuned.tokenizer is given
    assert plain.to_tokens("w5 w7").tolist() == [[0, 5, 7]]


def test_an_adapters_tokenizer_that_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapt(base, adapter)
    foreign().save_pretrained(adapter)
    plain = load_model(base, device="cpu")
    for refused in (
        lambda: load_model(base, adapter=adapter, device="cpu"),
        lambda: with_adapter(plain, adapter),
    ):
        with pytest.raises(InputError, match=f"{adapter}.*another model's.*'w12'"):
            refused()
    assert with_adapter(plain, adapter, tokenizer=plain.tokenizer).tokenizer is plain.tokenizer
