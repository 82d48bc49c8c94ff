import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.models.helpers import llama, qwen2, save
from tl_entity.errors import InputError
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
    "tied": lambda: llama(tie_word_embeddings=True),
    "attention biases": lambda: llama(attention_bias=True),
    "eps": lambda: llama(rms_norm_eps=1e-2),
    "qwen2": qwen2,
    "qwen2 grouped, tied": lambda: qwen2(num_key_value_heads=2, tie_word_embeddings=True),
    **{
        f"rope {kind}": lambda rope=rope: llama(rope_parameters=rope) for kind, rope in ROPE.items()
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_logits_are_hugging_faces(kind: str, tmp_path: Path) -> None:
    reference = CHECKPOINTS[kind]().double()
    folder = save(reference, tmp_path)
    tokens = torch.randint(0, 40, (3, 90), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits
    assert expected.std() > 0.1  # a model that says the same everywhere would prove nothing
    ours = load_model(folder, dtype="float64", device="cpu")(tokens)
    # Hugging Face computes norms and RoPE tables in float32 whatever the dtype.
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    ours = load_model(folder, device="cpu")(tokens).double()
    torch.testing.assert_close(ours.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    reference = llama(num_key_value_heads=2)
    model = load_model(save(reference, tmp_path), device="cpu")
    tokens = torch.randint(3, 40, (1, 9))
    alone = model(tokens)
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.long), torch.ones_like(tokens)], 1)
    torch.testing.assert_close(model(left, attention_mask=mask)[:, 4:], alone)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    reference = llama()
    whole = save(reference, tmp_path / "whole")
    sharded = save(reference, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    tokens = torch.arange(10)[None]
    assert torch.equal(
        load_model(whole, device="cpu")(tokens), load_model(sharded, device="cpu")(tokens)
    )


def test_weights_are_views_of_the_file_and_frozen(tmp_path: Path) -> None:
    model = load_model(save(llama(num_key_value_heads=2), tmp_path), device="cpu")
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
    # A copy would be contiguous in TransformerLens's own layout; a view keeps the checkpoint's.
    assert model.blocks[0].attn.W_Q.transpose(1, 2).is_contiguous()
    assert model.blocks[0].attn.W_O.permute(2, 0, 1).is_contiguous()
    assert model.blocks[0].mlp.W_in.T.is_contiguous()
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        key = file.get_tensor("model.layers.0.self_attn.k_proj.weight")
    assert torch.equal(model.blocks[0].attn._W_K.transpose(1, 2).reshape(key.shape), key)


def test_tokenizer_is_the_checkpoints_own(tmp_path: Path) -> None:
    model = load_model(save(llama(), tmp_path), device="cpu")
    assert model.tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert model.tokenizer.padding_side == "right"
    assert model.cfg.tokenizer_prepends_bos is False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(llama(num_key_value_heads=2), tmp_path)


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")


def refused(folder: Path | str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(folder, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no folder")
    refused("no-such-name", "no-such-name", "default-base")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "config.json")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"mlp_bias": True}, "MLP has biases"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"hidden_act": "relu"}, "relu"),
    ],
)
def test_other_architectures_are_refused(folder: Path, changes: dict, word: str) -> None:
    change_config(folder, **changes)
    refused(folder, word)


def test_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "not JSON")


def test_truncated_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "model.safetensors", "damaged")


def test_missing_weights_are_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, "blocks.1.mlp.W_in")
    (folder / "model.safetensors").unlink()
    refused(folder, "no *.safetensors")


def test_unknown_tensor_is_refused(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(2)}))
    refused(folder, "model.layers.0.extra")


def test_layer_beyond_the_configuration_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    refused(folder, "model.layers.2.")


@pytest.mark.parametrize(
    "change", [{"intermediate_size": 64}, {"vocab_size": 41}, {"head_dim": 16}]
)
def test_wrong_sizes_are_refused(folder: Path, change: dict) -> None:
    change_config(folder, **change)
    refused(folder, "shape")


def test_shards_that_are_missing_are_refused(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path, max_shard_size="20KB")
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    refused(folder, gone.name)


def test_missing_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, "tokenizer")


@pytest.mark.parametrize("keywords", [{"adapter": "x"}, {"gguf_file": "x"}, {"backend": "bridge"}])
def test_what_is_not_there_yet_is_refused(folder: Path, keywords: dict) -> None:
    with pytest.raises(InputError, match="not supported yet"):
        load_model(folder, **keywords)


def test_unknown_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="int7"):
        load_model(folder, dtype="int7")
