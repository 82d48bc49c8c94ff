"""Pickles, models in memory, tokenizers: the same numbers, and no code that runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from tests.models.helpers import llama, qwen2, save
from tl_entity.errors import InputError
from tl_entity.models.load import load_model, load_tokenizer

TOKENS = torch.arange(10)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(llama(num_key_value_heads=2, head_dim=16), tmp_path / "checkpoint")


def pickled(folder: Path, *, shards: int = 1, old: bool = False) -> Path:
    """The same checkpoint with `.bin` files."""
    other = folder.parent / "pickled"
    shutil.copytree(folder, other)
    tensors = load_file(other / "model.safetensors")
    (other / "model.safetensors").unlink()
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    if shards == 1:
        names = ["pytorch_model.bin"]
    where = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        content = {key: tensors[key] for key in tensors if where[key] == name}
        torch.save(content, other / name, _use_new_zipfile_serialization=not old)
    if shards > 1:
        index = other / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": where}))
    return other


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("old", [False, True])
def test_pickles(folder: Path, shards: int, old: bool) -> None:
    expected = load_model(folder, device="cpu")(TOKENS)
    other = pickled(folder, shards=shards, old=old)
    assert torch.equal(load_model(other, device="cpu")(TOKENS), expected)


def test_pickles_are_mapped(folder: Path) -> None:
    file = pickled(folder) / "pytorch_model.bin"
    before = file.read_bytes()
    model = load_model(file.parent, device="cpu")
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = line.split()[0].split("-")
            mapped.append(range(int(start, 16), int(end, 16)))
    assert any(model.W_E.data_ptr() in region for region in mapped)
    model.W_E.mul_(2)
    assert file.read_bytes() == before


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_model(folder, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("old", [False, True])
def test_code_in_a_pickle_does_not_run(folder: Path, tmp_path: Path, old: bool) -> None:
    mark = tmp_path / "it ran"

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path.touch, (mark,))

    file = pickled(folder) / "pytorch_model.bin"
    torch.save({"lm_head.weight": Evil()}, file, _use_new_zipfile_serialization=not old)
    refused(file.parent, str(file), "only tensors")
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1], {"lm_head.weight": 3}, {3: torch.ones(1)}])
def test_pickles_of_other_things(folder: Path, content: object) -> None:
    file = pickled(folder) / "pytorch_model.bin"
    torch.save(content, file)
    refused(file.parent, str(file), "other things than tensors")


@pytest.mark.parametrize(
    "odd", [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.ones(3, device="meta")]
)
def test_pickles_of_odd_tensors(folder: Path, odd: torch.Tensor) -> None:
    file = pickled(folder) / "pytorch_model.bin"
    torch.save({"lm_head.weight": odd}, file)
    refused(file.parent, str(file), "lm_head.weight", "no plain tensor")


@pytest.mark.parametrize("old", [False, True])
def test_damaged_pickles(folder: Path, old: bool) -> None:
    file = pickled(folder, old=old) / "pytorch_model.bin"
    whole = file.read_bytes()
    for length in (len(whole) - 300, len(whole) // 2, 100, 3, 0):
        file.write_bytes(whole[:length])
        refused(file.parent, str(file), "damaged")


def test_shards_of_two_checkpoints(folder: Path, tmp_path: Path) -> None:
    other = pickled(folder, shards=2)
    third = pickled(save(llama(num_hidden_layers=2), tmp_path / "x" / "checkpoint"), shards=2)
    shard = "pytorch_model-00002-of-00002.bin"
    shutil.copy(third / shard, other / shard)
    refused(other, shard.partition("-")[0])


def test_index_naming_another_kind_of_file(folder: Path) -> None:
    other = pickled(folder, shards=2)
    index = other / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "config.json"}}))
    refused(other, "config.json", "no file of weights")


def test_sentencepiece_tokenizer_puts_one_beginning(tmp_path: Path) -> None:
    # As LLaMA's: a mark for a space, bytes for what it lacks, and <s> put by the template.
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "a", "b", "\u2581a"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    folder = save(llama(vocab_size=len(pieces)), tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    model = load_model(folder, device="cpu")
    given = model.tokenizer.convert_ids_to_tokens(model.to_tokens("a b\u00e9")[0].tolist())
    assert given == ["<s>", "\u2581a", "\u2581", "b", "<0xC3>", "<0xA9>"]
    assert model.cfg.default_prepend_bos


@pytest.mark.parametrize("tied", [False, True])
def test_model_in_memory_is_shared(tied: bool) -> None:
    reference = qwen2(num_key_value_heads=2, tie_word_embeddings=tied)
    model = load_model(reference, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), reference(TOKENS).logits, atol=1e-4, rtol=0)
    theirs = {parameter.data_ptr() for parameter in reference.parameters()}
    for name, parameter in model.named_parameters():
        made_up = name.endswith(("b_O", "b_in", "b_out", "b_U"))
        assert (parameter.data_ptr() in theirs) != made_up, name
    assert reference.lm_head.weight.requires_grad
    assert model.tokenizer is None


def test_model_in_memory_with_an_adapter_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    from tests.models.test_adapters import adapt, agrees

    expected = adapt(folder, tmp_path / "adapter")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    agrees(load_model(reference, adapter=tmp_path / "adapter", device="cpu"), expected)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_tokenizer_of_a_model_in_memory(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder)
    model = load_model(reference, device="cpu")
    assert model.to_tokens("w5 w7").tolist() == [[5, 7]]
    other = load_model(llama(), tokenizer=folder, device="cpu")
    assert other.to_tokens("w5 w7").tolist() == [[5, 7]]
    given = load_tokenizer(folder)
    assert load_model(folder, tokenizer=given, device="cpu").tokenizer is given


def test_models_in_memory_that_are_refused(folder: Path) -> None:
    import peft

    tiny = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=5))
    with pytest.raises(InputError, match="gpt2"):
        load_model(tiny, device="cpu")
    with pytest.raises(InputError, match="no causal language model"):
        load_model(torch.nn.Linear(2, 2), device="cpu")
    with pytest.raises(InputError, match="no causal language model"):
        load_model(llama().model, device="cpu")
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (wrapped, wrapped.base_model.model):
        with pytest.raises(InputError, match="carries an adapter"):
            load_model(model, device="cpu")
    with pytest.raises(InputError, match="offloaded"):
        load_model(llama().to("meta"), device="cpu")
    with pytest.raises(InputError, match="gguf_file="):
        load_model(llama(), gguf_file="x.gguf", device="cpu")
