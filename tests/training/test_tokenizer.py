"""The word-level tokenizer of the default pair."""

from transformers import AutoTokenizer

from tl_entity.tasks.boxes import LABELS, usable_words
from tl_entity.tasks.nouns import OBJECTS
from tl_entity.training.tokenizer import VOCABULARY, build_tokenizer, save_tokenizer

SENTENCE = "The apple is in Box E, the bell is in Box Q. Box Q contains the"


def test_sentences_come_back_readable_with_the_start_token_first():
    tokenizer = build_tokenizer()
    ids = tokenizer(SENTENCE)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(SENTENCE.replace(",", " ,").replace(".", " .").split())
    assert tokenizer.decode(ids, skip_special_tokens=True) == SENTENCE


def test_every_object_and_label_is_one_known_token():
    assert usable_words(build_tokenizer()) == (OBJECTS, LABELS)


def test_no_word_is_listed_twice():
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_marks_need_no_spaces_and_unknown_words_are_unknown():
    tokenizer = build_tokenizer()
    spaced, tight = (tokenizer(text)["input_ids"] for text in ("x -> 3 ; y = 5", "x->3; y=5"))
    assert spaced == tight
    assert tokenizer("zebra")["input_ids"][-1] == tokenizer.unk_token_id


def test_saved_tokenizer_loads_the_same(tmp_path):
    save_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = SENTENCE + " bell. x = 3; x -> 3;"
    assert loaded(text)["input_ids"] == build_tokenizer()(text)["input_ids"]
    assert loaded.pad_token_id == VOCABULARY.index("<pad>")
