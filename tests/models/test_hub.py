"""The hub: what is in its cache is found offline, and what is not to be had is said plainly."""

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file

from tests.models.gguf_helpers import write_gguf
from tests.models.helpers import llama, save
from tests.models.test_adapters import TOKENS, adapt, agrees
from tl_entity.errors import InputError
from tl_entity.models import hub
from tl_entity.models.load import load_model, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def snapshot(cache: Path, repository: str, revision: str = "main", commit: str = "0123") -> Path:
    """An empty snapshot of a repository, as its download leaves it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return folder / "snapshots" / commit


def test_hub_id(cache: Path) -> None:
    save(llama(), snapshot(cache, "someone/tiny"))
    assert load_model("someone/tiny", device="cpu").cfg.n_layers == 3
    assert load_model("someone/tiny", device="cpu", local_files_only=True).cfg.n_layers == 3
    assert load_tokenizer("someone/tiny")("w5")["input_ids"] == [5]


def test_revision(cache: Path) -> None:
    save(llama(), snapshot(cache, "someone/tiny"))
    save(llama(num_hidden_layers=2), snapshot(cache, "someone/tiny", "step-10", "4567"))
    assert load_model("someone/tiny", device="cpu").cfg.n_layers == 3
    assert load_model("someone/tiny", device="cpu", revision="step-10").cfg.n_layers == 2
    with pytest.raises(InputError, match="not in the hub's cache"):
        load_model("someone/tiny", device="cpu", revision="step-11")


def test_repository_with_pickles_alone(cache: Path) -> None:
    folder = save(llama(), snapshot(cache, "someone/tiny"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_model("someone/tiny", device="cpu").cfg.n_layers == 3


def test_pickles_are_asked_for_only_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def fetch(name: str, *, allow_patterns: list[str], **keywords: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / name.partition("/")[2])

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    save(llama(), tmp_path / "modern")
    load_model("someone/modern", device="cpu")
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked.pop())
    assert not asked
    (save(llama(), tmp_path / "old") / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no"):
        load_model("someone/old", device="cpu")
    assert not any(".bin" in pattern for pattern in asked[0])
    assert any(".bin" in pattern for pattern in asked[1])


def test_gguf_file_of_a_repository(cache: Path) -> None:
    folder = snapshot(cache, "someone/tiny-gguf")
    folder.mkdir(parents=True)
    write_gguf(llama(num_hidden_layers=2), folder / "m.gguf")
    assert load_model("someone/tiny-gguf", gguf_file="m.gguf", device="cpu").cfg.n_layers == 2


def test_adapter_of_a_repository_and_a_registered_pair(cache: Path) -> None:
    base = save(llama(), snapshot(cache, "huggyllama/llama-7b"))
    expected = adapt(base, snapshot(cache, "tiedong/goat-lora-7b"))
    by_name = load_model("goat-7b", device="cpu")
    agrees(by_name, expected)
    by_id = load_model("huggyllama/llama-7b", adapter="tiedong/goat-lora-7b", device="cpu")
    assert torch.equal(by_id(TOKENS), by_name(TOKENS))
    plain = load_model("llama-7b", device="cpu")
    assert not torch.equal(plain(TOKENS), by_name(TOKENS))


def test_base_that_an_adapter_names_is_not_fetched(cache: Path) -> None:
    base = save(llama(), snapshot(cache, "someone/base"))
    folder = snapshot(cache, "someone/adapter")
    adapt(base, folder)
    file = folder / "adapter_config.json"
    changed = json.loads(file.read_text()) | {"base_model_name_or_path": "someone/else"}
    file.write_text(json.dumps(changed))
    load_model(base, adapter=folder, device="cpu")
    with pytest.raises(InputError, match="adapter= with its base"):
        load_model("someone/adapter", device="cpu")


def test_not_in_the_cache() -> None:
    with pytest.raises(InputError, match="no folder someone/absent, and it can't be had"):
        load_model("someone/absent", device="cpu")
    with pytest.raises(InputError, match=r"huggyllama/llama-7b.* offline"):
        load_model("llama-7b", device="cpu")


def response(error: type[Exception]) -> Callable[..., str]:
    def fail(*arguments: object, **keywords: object) -> str:
        request = httpx.Request("GET", "https://huggingface.co")
        raise error("a long\nmessage", response=httpx.Response(403, request=request))

    return fail


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError, ("gated", "https://huggingface.co/someone/tiny", "HF_TOKEN")),
        (errors.RepositoryNotFoundError, ("no such repository", "HF_TOKEN")),
        (errors.RevisionNotFoundError, ("no revision 'v9'",)),
    ],
)
def test_what_the_hub_refuses(
    error: type[Exception], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "snapshot_download", response(error))
    with pytest.raises(InputError) as caught:
        load_model("someone/tiny", device="cpu", revision="v9", token="hf_secret")
    message = str(caught.value)
    assert "\n" not in message and "hf_secret" not in message
    for word in words:
        assert word in message
