"""Numbers are Hugging Face's, weights are the file's, the tokenizer is the checkpoint's own."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models.helpers import in_float64, llama, mistral, qwen2, qwen3, save
from tl_entity.models.load import load_model

ROPE = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
}

CHECKPOINTS = {
    "llama": llama,
    "grouped-query": lambda: llama(num_key_value_heads=2),
    "multi-query": lambda: llama(num_key_value_heads=1),
    "wide heads": lambda: llama(head_dim=16),
    "wide heads, grouped": lambda: llama(head_dim=16, num_key_value_heads=2),
    "tied": lambda: llama(tie_word_embeddings=True),
    "attention biases": lambda: llama(attention_bias=True),
    "attention biases, grouped": lambda: llama(attention_bias=True, num_key_value_heads=2),
    "eps": lambda: llama(rms_norm_eps=1e-2),
    **{
        act: lambda act=act: llama(hidden_act=act)
        for act in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish")
    },
    "mistral": lambda: mistral(num_key_value_heads=2),
    "mistral with a window": lambda: mistral(num_key_value_heads=2, sliding_window=16),
    "qwen2": qwen2,
    "qwen2 with a window in some layers": lambda: qwen2(
        use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen2 with a window that is not used": lambda: qwen2(sliding_window=16),
    "qwen3": qwen3,
    "qwen3 grouped, biased, tied": lambda: qwen3(
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=True
    ),
    "qwen2 grouped, tied": lambda: qwen2(num_key_value_heads=2, tie_word_embeddings=True),
    **{
        f"rope {kind}": lambda rope=rope: llama(rope_parameters=rope) for kind, rope in ROPE.items()
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_are_hugging_faces(kind: str, tmp_path: Path) -> None:
    reference = CHECKPOINTS[kind]()
    folder = save(reference, tmp_path)
    tokens = torch.randint(0, 40, (3, 90), generator=torch.Generator().manual_seed(1))
    expected = in_float64(reference)(tokens).logits
    assert expected.std() > 0.1  # a model that says the same everywhere would prove nothing
    ours = load_model(folder, dtype="float64", device="cpu")(tokens)
    # Rotary angles are float32 in any dtype, and both take the same ones.
    torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)
    ours = load_model(folder, device="cpu")(tokens).double()
    torch.testing.assert_close(ours.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["default", *ROPE])
def test_configuration_alone_says_how_to_rotate(kind: str, tmp_path: Path) -> None:
    changes = {"rope_parameters": ROPE[kind]} if kind in ROPE else {}
    attn = load_model(save(llama(**changes), tmp_path), device="cpu").blocks[0].attn
    sin, cos = attn.calculate_sin_cos_rotary(8, 128, base=attn.cfg.rotary_base)
    torch.testing.assert_close(attn.rotary_cos, cos, atol=1e-4, rtol=0)
    torch.testing.assert_close(attn.rotary_sin, sin, atol=1e-4, rtol=0)


def test_long_prompts_agree(tmp_path: Path) -> None:
    # Longer than the tables that TransformerLens starts with, where it would compute its own.
    reference = llama(
        rope_parameters=ROPE["llama3"], max_position_embeddings=4096, num_hidden_layers=2
    )
    tokens = torch.randint(0, 40, (1, 2500), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference(tokens).logits.log_softmax(-1)
        model = load_model(save(reference, tmp_path), device="cpu")
        ours = model(tokens).log_softmax(-1)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert model.blocks[0].attn.rotary_cos.data_ptr() == model.blocks[1].attn.rotary_cos.data_ptr()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_agrees_as_far_as_it_goes(dtype: str | torch.dtype, tmp_path: Path) -> None:
    reference = llama()
    model = load_model(save(reference, tmp_path), dtype=dtype, device="cpu")
    tokens = torch.arange(30)[None]
    logits = model(tokens)
    assert logits.dtype == model.W_E.dtype == model.cfg.dtype != torch.float32
    torch.testing.assert_close(logits.float(), reference(tokens).logits, atol=0.3, rtol=0)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    reference = llama(num_key_value_heads=2)
    model = load_model(save(reference, tmp_path), device="cpu")
    tokens = torch.randint(3, 40, (1, 9), generator=torch.Generator().manual_seed(3))
    alone = reference(tokens).logits
    padding = torch.zeros(1, 4, dtype=torch.long)
    there = torch.ones_like(tokens)
    left = model(torch.cat([padding, tokens], 1), attention_mask=torch.cat([padding, there], 1))
    right = model(torch.cat([tokens, padding], 1), attention_mask=torch.cat([there, padding], 1))
    torch.testing.assert_close(left[:, 4:], alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(right[:, :9], alone, atol=1e-4, rtol=0)


def test_embeddings_said_to_be_tied_that_are_not(tmp_path: Path) -> None:
    # As transformers does: a matrix of its own in the file is what counts.
    folder = save(llama(), tmp_path)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('embeddings": false', 'embeddings": true'))
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert reference.config.tie_word_embeddings
    tokens = torch.arange(10)[None]
    ours = load_model(folder, device="cpu")(tokens)
    torch.testing.assert_close(ours, reference(tokens).logits, atol=1e-4, rtol=0)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    reference = llama()
    whole = save(reference, tmp_path / "whole")
    sharded = save(reference, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = torch.arange(10)[None]
    assert torch.equal(
        load_model(whole, device="cpu")(tokens), load_model(sharded, device="cpu")(tokens)
    )


def test_nothing_requires_gradients(tmp_path: Path) -> None:
    model = load_model(save(llama(num_key_value_heads=2), tmp_path), device="cpu")
    assert not model.training
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory map")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_lie_in_the_mapped_file(tied: bool, tmp_path: Path) -> None:
    reference = qwen2(num_key_value_heads=2, tie_word_embeddings=tied)
    model = load_model(save(reference, tmp_path), device="cpu")
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(tmp_path / "model.safetensors")):
            start, end = line.split()[0].split("-")
            mapped.append(range(int(start, 16), int(end, 16)))
    assert mapped
    for name, parameter in model.named_parameters():
        from_file = any(parameter.data_ptr() in region for region in mapped)
        made_up = name.endswith(("b_O", "b_in", "b_out", "b_U"))  # Qwen2 has none of these
        assert from_file != made_up, name


def test_changing_a_weight_does_not_reach_the_file(tmp_path: Path) -> None:
    file = save(llama(), tmp_path) / "model.safetensors"
    before = file.read_bytes()
    model = load_model(tmp_path, device="cpu")
    model.blocks[0].attn.W_Q.mul_(2)
    assert file.read_bytes() == before
    assert not torch.equal(load_model(tmp_path, device="cpu").W_Q[0], model.W_Q[0])


@pytest.mark.parametrize("prepends_bos", [False, True])
def test_tokenizer_is_the_checkpoints_own(prepends_bos: bool, tmp_path: Path) -> None:
    model = load_model(save(llama(), tmp_path, prepends_bos=prepends_bos), device="cpu")
    expected = [0, 5, 7] if prepends_bos else [5, 7]
    assert model.tokenizer("w5 w7")["input_ids"] == expected
    assert model.to_tokens("w5 w7").tolist() == [expected]
    assert model.cfg.tokenizer_prepends_bos is prepends_bos
    assert model.tokenizer.padding_side == "right"
    assert model.tokenizer.pad_token == "</s>"


def test_padding_token_without_a_row_is_replaced(tmp_path: Path) -> None:
    save(llama(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 40
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert model.tokenizer.pad_token_id == 1
