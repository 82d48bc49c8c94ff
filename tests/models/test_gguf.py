"""GGUF files give the numbers of the model that was written to them."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models.gguf_helpers import BYTE_TOKENS, write_gguf
from tests.models.helpers import in_float64, llama, mistral, qwen2, qwen3, save
from tl_entity.errors import InputError
from tl_entity.models.load import load_model, load_tokenizer

PROMPTS = torch.randint(0, 40, (2, 60), generator=torch.Generator().manual_seed(1))
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # quantised rows come in blocks of 32


def load(file: Path, **keywords: Any) -> Any:
    return load_model(file, device="cpu", **keywords)


def agrees(model: Any, reference: PreTrainedModel) -> None:
    with torch.no_grad():
        expected = in_float64(reference)(PROMPTS).logits.log_softmax(-1)
    ours = model(PROMPTS).double().log_softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "llama, grouped": lambda **c: llama(num_key_value_heads=2, **c),
    "llama, tied": lambda **c: llama(tie_word_embeddings=True, **c),
    "llama, biased": lambda **c: llama(attention_bias=True, num_key_value_heads=2, **c),
    "llama, wide heads": lambda **c: llama(head_dim=32, **c),
    "mistral": mistral,
    "qwen2": lambda **c: qwen2(num_key_value_heads=2, **c),
    "qwen3": lambda **c: qwen3(num_key_value_heads=2, **c),
}


@pytest.mark.parametrize("name", MODELS)
def test_architectures(name: str, tmp_path: Path) -> None:
    reference = write_gguf(MODELS[name](rms_norm_eps=1e-5), tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf")
    agrees(model, reference)
    assert model.cfg.eps == 1e-5  # as it was before it was written as a float32


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
)
def test_kinds_of_numbers(kind: Kind, tmp_path: Path) -> None:
    reference = write_gguf(llama(**WIDE), tmp_path / "m.gguf", kind=kind)
    agrees(load(tmp_path / "m.gguf"), reference)


def test_decoding_piece_by_piece_is_decoding_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(llama(**WIDE), tmp_path / "m.gguf", kind=Kind.Q4_0)
    whole = load(tmp_path / "m.gguf")
    monkeypatch.setattr("tl_entity.models.gguf_file.DECODED_BYTES", 3 * 64 * 4)
    assert torch.equal(load(tmp_path / "m.gguf").W_E, whole.W_E)


@pytest.mark.parametrize(
    ("values", "rope"),
    [
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            },
        ),
    ],
)
def test_rotary_scaling(values: dict, rope: dict, tmp_path: Path) -> None:
    reference = write_gguf(llama(rope_parameters=rope), tmp_path / "m.gguf", values=values)
    agrees(load(tmp_path / "m.gguf"), reference)


def llama3(tmp_path: Path, change: float = 1.0) -> PreTrainedModel:
    """A model rotated as Llama 3.1 is, whose file holds the factors alone."""
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    reference = llama(rope_parameters=rope, head_dim=32)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](reference.config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    factors = plain / scaled
    assert factors.unique().numel() > 3
    factors[factors.argsort()[len(factors) // 2 + 1]] *= change
    write_gguf(reference, tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors})
    return reference


def test_rotary_factors_of_llama_3(tmp_path: Path) -> None:
    reference = llama3(tmp_path)
    model = load(tmp_path / "m.gguf")
    agrees(model, reference)
    assert model.cfg.use_NTK_by_parts_rope and model.cfg.NTK_by_parts_factor == 8.0


def test_rotary_factors_of_no_llama_3(tmp_path: Path) -> None:
    llama3(tmp_path, change=1.1)
    refused(tmp_path / "m.gguf", "rope_freqs.weight", "Llama 3")


def test_window(tmp_path: Path) -> None:
    reference = write_gguf(
        mistral(sliding_window=16), tmp_path / "m.gguf", values={"attention.sliding_window": 16}
    )
    agrees(load(tmp_path / "m.gguf"), reference)


def test_plain_numbers_lie_in_the_mapped_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(qwen2(), file)
    before = file.read_bytes()
    model = load(file)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = line.split()[0].split("-")
            mapped.append(range(int(start, 16), int(end, 16)))
    assert any(model.W_E.data_ptr() in region for region in mapped)
    assert any(model.blocks[1].attn.W_Q.data_ptr() in region for region in mapped)
    model.W_E.mul_(2)
    assert file.read_bytes() == before


def test_file_of_a_folder_and_the_tokenizer_beside_it(tmp_path: Path) -> None:
    # The folder's own weights are another model's; its tokenizer has the same vocabulary.
    save(llama(), tmp_path, prepends_bos=True)
    reference = write_gguf(llama(num_hidden_layers=2), tmp_path / "m.gguf")
    model = load_model(tmp_path, gguf_file="m.gguf", device="cpu")
    agrees(model, reference)
    assert model.to_tokens("w5 w7").tolist() == [[0, 5, 7]]


def test_tokenizer_of_the_file(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf")
    assert model.tokenizer.convert_ids_to_tokens([0, 5, 39]) == ["<s>", "w5", "w39"]
    assert model.tokenizer.bos_token == "<s>"
    for alone in (
        load_tokenizer(tmp_path / "m.gguf"),
        load_tokenizer(tmp_path, gguf_file="m.gguf"),
    ):
        assert alone.get_vocab() == model.tokenizer.get_vocab()
    assert model.cfg.tokenizer_prepends_bos  # as llama.cpp does where the file doesn't say


@pytest.mark.parametrize(("pre", "pieces"), [("llama-bpe", ["12"]), ("smollm", ["1", "2"])])
def test_byte_level_tokenizer_splits_numbers_as_the_model_was_trained(
    pre: str, pieces: list[str], tmp_path: Path
) -> None:
    size = len(BYTE_TOKENS)
    write_gguf(llama(vocab_size=size), tmp_path / "m.gguf", byte_level=pre)
    model = load(tmp_path / "m.gguf")
    ids = model.to_tokens("a12")[0].tolist()
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["a", *pieces]
    assert not model.cfg.tokenizer_prepends_bos


def test_tokenizer_beside_it_with_another_vocabulary_is_not_taken(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"w5": 5', '"other": 5'))
    write_gguf(llama(), tmp_path / "m.gguf")
    model = load(tmp_path / "m.gguf")
    assert model.tokenizer.convert_ids_to_tokens([5]) == ["w5"]


def test_adapter_on_a_quantised_file(tmp_path: Path) -> None:
    from tests.models.test_adapters import TOKENS, adapt

    reference = write_gguf(llama(**WIDE), tmp_path / "m.gguf", kind=Kind.Q8_0)
    base = save(reference, tmp_path / "base")
    expected = adapt(base, tmp_path / "adapter").log_softmax(-1)
    model = load(tmp_path / "m.gguf", adapter=tmp_path / "adapter")
    ours = model(TOKENS).double().log_softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def refused(file: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load(file)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"expert_count": 8}, "experts"),
        ({"attention.value_length": 4}, "values"),
        ({"rope.dimension_count": 4}, "rotated"),
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.attn_factor": 1.2}, "attn_factor"),
        ({"attention.head_count": 5}, "head"),
        ({"attention.head_count_kv": 3}, "3 key-value heads"),
        ({"embedding_length": 48}, "shape"),
        ({"block_count": 2}, "blk.2"),
        ({"feed_forward_length": 40}, "shape"),
        ({"context_length": 0}, "max_position_embeddings"),
    ],
)
def test_header(values: dict, word: str, tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "m.gguf", values=values)
    refused(tmp_path / "m.gguf", word.replace("blk.2", "layers.2"))


@pytest.mark.parametrize(
    "name",
    [
        "block_count",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
        "token_embd.weight",
        "blk.1.ffn_up.weight",
    ],
)
def test_what_is_missing(name: str, tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "m.gguf", drop=[name])
    shown = name.replace("blk.1.ffn_up", "model.layers.1.mlp.up_proj")
    refused(tmp_path / "m.gguf", "m.gguf", "lacks", shown)


def test_other_architecture(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(llama(), file)
    file.write_bytes(file.read_bytes().replace(b"llama", b"grok!"))
    refused(file, "grok!", "qwen3")


def test_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(llama(), file)
    whole = file.read_bytes()
    for length in (len(whole) - 5000, len(whole) // 4, 500, 30, 4, 0):
        file.write_bytes(whole[:length])
        refused(file, str(file))
    file.write_bytes(b"GGML" + whole[4:])
    refused(file, "no GGUF file")
    file.write_bytes(whole[:4] + b"\x01" + whole[5:])
    refused(file, "version 1")


def test_missing_file(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    with pytest.raises(InputError, match="no GGUF file"):
        load_model(tmp_path, gguf_file="other.gguf", device="cpu")


def test_folder_whose_file_is_not_named(tmp_path: Path) -> None:
    write_gguf(llama(), tmp_path / "m.gguf")
    refused(tmp_path, "gguf_file=")


def header_with(value: bytes, *, n_values: int = 1) -> bytes:
    """A file whose only value is called `a`."""
    counts = struct.pack("<IQQ", 3, 0, n_values)
    return b"GGUF" + counts + struct.pack("<Q", 1) + b"a" + value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # A list of bytes, a list of empty texts, and lists in lists: more than is ever meant.
        (header_with(struct.pack("<IIQ", 9, 0, 3 << 20) + bytes(3 << 20)), "more than"),
        (header_with(struct.pack("<IIQ", 9, 8, 3 << 20) + bytes(24 << 20)), "more than"),
        (header_with(struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10**5), "too deep"),
        (header_with(b"", n_values=10**9), "more than"),
    ],
)
def test_headers_that_would_take_minutes_are_refused(tmp_path, content, words):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_model(file)


def test_lists_of_numbers_are_read_whole(tmp_path):
    from tl_entity.models.gguf_header import read_header

    numbers = {0: ("B", [0, 255]), 5: ("i", [-7, 2**31 - 1]), 12: ("d", [1e300, -0.5])}
    for kind, (code, values) in numbers.items():
        packed = struct.pack("<IIQ", 9, kind, len(values)) + struct.pack(f"<2{code}", *values)
        (tmp_path / "model.gguf").write_bytes(header_with(packed))
        assert read_header(tmp_path / "model.gguf").values == {"a": values}
