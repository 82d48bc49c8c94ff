"""What can't be loaded is refused in one sentence that names the file or the tensor."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.helpers import llama, mistral, qwen2, save
from tl_entity.errors import InputError
from tl_entity.models.load import load_model

Tensors = dict[str, torch.Tensor]
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # Heads wider than d_model / n_heads, so that no two matrices of a layer have equal sides.
    return save(llama(num_key_value_heads=2, head_dim=16), tmp_path / "checkpoint")


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    copies = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / FILE)


def refused(folder: Path | str, *words: str, **keywords: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_model(folder, **{"device": "cpu", **keywords})
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no folder")
    refused(str(tmp_path / "nowhere"), "nowhere", "no folder")
    refused("no-such-name", "no-such-name", "default-base")


def test_file_instead_of_a_folder(folder: Path) -> None:
    refused(folder / FILE, FILE, "is a file")


def test_folder_without_config(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, str(tmp_path), "adapter")


@pytest.mark.parametrize("content", ["{", "[1]", "{}", "null", '{"model_type": null}'])
def test_broken_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, "config.json")


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "nonsense"}, "nonsense"),
        ({"mlp_bias": True}, "gate_proj"),
        ({"rope_parameters": DYNAMIC}, "dynamic"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"hidden_act": "relu2"}, "relu2"),
        ({"model_type": "mixtral"}, "experts"),
        ({"model_type": "gemma2"}, "capped"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta 0.0"),
        ({"partial_rotary_factor": 0.5}, "rotated"),
        ({"num_key_value_heads": 3}, "3 key-value heads"),
        # What transformers itself finds wrong is passed on, field and all.
        ({"hidden_size": "many"}, "hidden_size"),
        ({"hidden_size": "many"}, "int"),
        ({"intermediate_size": -1}, "intermediate_size -1"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta 'x'"),
    ],
)
def test_what_cannot_be_represented(folder: Path, changes: dict, word: str) -> None:
    change_config(folder, **changes)
    refused(folder, word)


@pytest.mark.parametrize(
    "changes",
    [{"sliding_window": 0}, {"sliding_window": "x"}, {"layer_types": ["full_attention"]}],
)
def test_window_that_makes_no_sense(tmp_path: Path, changes: dict) -> None:
    folder = save(mistral(sliding_window=16), tmp_path)
    change_config(folder, **changes)
    refused(folder, str(folder), *changes)


def test_truncated_weights(folder: Path) -> None:
    file = folder / FILE
    whole = file.read_bytes()
    for length in (len(whole) - 100, 20, 0):
        file.write_bytes(whole[:length])
        refused(folder, str(file), "damaged")


def test_no_weights(folder: Path) -> None:
    (folder / FILE).unlink()
    refused(folder, str(folder), "no *.safetensors")


@pytest.mark.parametrize(
    "key", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
)
def test_missing_tensor(folder: Path, key: str) -> None:
    change_weights(folder, lambda tensors: tensors.pop(key))
    refused(folder, str(folder), "lacks", key)


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.k_proj.bias"])
def test_missing_bias_is_not_taken_for_zero(tmp_path: Path, key: str) -> None:
    folder = save(qwen2(), tmp_path)
    change_weights(folder, lambda tensors: tensors.pop(key))
    refused(folder, "lacks", key)


def test_missing_embedding_of_a_tied_model(tmp_path: Path) -> None:
    folder = save(llama(tie_word_embeddings=True), tmp_path)
    change_weights(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    refused(folder, "lacks", "model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("model.layers.0.extra", "config.json"),
        # Hugging Face would pass over a bias that the configuration doesn't announce.
        ("model.layers.0.self_attn.q_proj.bias", "config.json"),
        ("model.layers.0.mlp.gate_proj.bias", "gated MLP"),
        ("model.layers.0.mlp.up_proj.bias", "gated MLP"),
    ],
)
def test_unknown_tensor(folder: Path, key: str, word: str) -> None:
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(64)}))
    refused(folder, FILE, key, word)


def test_layer_beyond_the_configuration(folder: Path) -> None:
    change_config(folder, num_hidden_layers=2)
    refused(folder, FILE, "model.layers.2.")


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(8)}))
    load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "change",
    [{"intermediate_size": 64}, {"vocab_size": 41}, {"head_dim": 8}, {"num_key_value_heads": 4}],
)
def test_sizes_that_the_configuration_denies(folder: Path, change: dict) -> None:
    change_config(folder, **change)
    refused(folder, FILE, "has shape")


@pytest.mark.parametrize("projection", ["q_proj", "o_proj"])
def test_exchanged_axes(folder: Path, projection: str) -> None:
    # The number of elements is right; only the shape tells.
    key = f"model.layers.1.self_attn.{projection}.weight"
    change_weights(folder, lambda tensors: tensors.update({key: tensors[key].T}))
    refused(folder, FILE, key, "has shape")


@pytest.mark.parametrize("shape", [(), (7,), (1, 2, 3)])
def test_tensor_of_another_rank(folder: Path, shape: tuple[int, ...]) -> None:
    key = "model.layers.1.self_attn.o_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({key: torch.ones(shape)}))
    refused(folder, FILE, key, "has shape")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensor(folder: Path, dtype: torch.dtype) -> None:
    key = "model.layers.0.mlp.down_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    refused(folder, FILE, key, "quantised")


def test_missing_shard(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path, max_shard_size="20KB")
    gone = sorted(folder.glob("*.safetensors"))[0]
    gone.unlink()
    refused(folder, "index.json", gone.name)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_broken_index(tmp_path: Path, content: str) -> None:
    folder = save(llama(), tmp_path, max_shard_size="20KB")
    index = folder / f"{FILE}.index.json"
    index.write_text(content)
    refused(folder, str(index))


def test_index_that_reaches_outside_its_folder(folder: Path) -> None:
    (folder / FILE).rename(folder.parent / FILE)
    for name in (f"../{FILE}", str(folder.parent / FILE)):
        index = {"weight_map": {"model.norm.weight": name}}
        (folder / f"{FILE}.index.json").write_text(json.dumps(index))
        refused(folder, "index.json", "not in")


def test_tensor_in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors")
    save_file(
        {"model.norm.weight": tensors["model.norm.weight"]},
        folder / "model-00002-of-00002.safetensors",
    )
    refused(folder, "model.norm.weight", "00001", "00002")


def test_missing_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, str(folder), "has no tokenizer", "tokenizer.json", "tokenizer=")


def test_missing_tokenizer_of_a_kind_that_transformers_makes_up(tmp_path: Path) -> None:
    """Of Qwen2, transformers builds a tokenizer without a vocabulary, which reads nothing."""
    folder = save(qwen2(), tmp_path / "checkpoint")
    for file in folder.glob("token*"):
        file.unlink()
    refused(folder, str(folder), "has no tokenizer", "tokenizer=")


@pytest.mark.parametrize("dtype", ["int7", torch.int8])
def test_unknown_dtype(folder: Path, dtype: str | torch.dtype) -> None:
    refused(folder, "dtype", "bfloat16", dtype=dtype)


@pytest.mark.parametrize("device", ["nonsense", "meta:x"])
def test_unknown_device(folder: Path, device: str) -> None:
    refused(folder, device, device=device)


def test_device_without_numbers(folder: Path) -> None:
    refused(folder, "meta", device="meta")
    refused(folder, "meta", device="meta", backend="bridge")


def test_revision_of_a_folder(folder: Path) -> None:
    refused(folder, str(folder), "'v2'", "hub id", revision="v2")


def test_more_positions_than_tables_hold(folder: Path) -> None:
    change_config(folder, max_position_embeddings=10**12)
    refused(folder, str(folder), "max_position_embeddings", str(10**12))


def test_more_layers_than_there_can_be(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**6)
    refused(folder, str(folder), "num_hidden_layers", str(10**6))


@pytest.mark.parametrize("n_devices", [0, 2])
def test_devices_that_are_not_there(folder: Path, n_devices: int) -> None:
    refused(folder, f"n_devices={n_devices}", "'cpu'", n_devices=n_devices)


def test_code_in_a_checkpoint_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    change_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.EvilConfig"})
    refused(folder, "evil")
    change_config(folder, model_type="llama", auto_map={"AutoConfig": "evil.EvilConfig"})
    load_model(folder, device="cpu")
    file = folder / "tokenizer_config.json"
    settings = {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with suppress(InputError):  # refused, or read without it
        load_model(folder, device="cpu")
    assert not mark.exists()
