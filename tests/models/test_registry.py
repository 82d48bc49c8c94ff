import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tl_entity.cli import main
from tl_entity.errors import InputError
from tl_entity.models import registry
from tl_entity.versions import check_transformer_lens


def test_names_need_no_torch() -> None:
    code = "import sys, tl_entity.models.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def make_package(root: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as if installed at `root`, with its data in `data`."""
    folder = data / "default_pair" / "base"
    folder.mkdir(parents=True)
    monkeypatch.setattr(registry, "__file__", str(root / "tl_entity" / "models" / "registry.py"))
    return folder


@pytest.mark.parametrize("data", ["data", "tl_entity/data"])
def test_data_is_found_in_a_checkout_and_in_an_installed_package(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_package(tmp_path, tmp_path / data, monkeypatch)
    assert registry.locate("default-base") == folder
    assert registry.planted_circuit("default-base") is None
    (folder / "planted.json").write_text("{}")
    assert registry.planted_circuit("default-base") == folder / "planted.json"


def test_data_that_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_package(tmp_path, tmp_path / "data", monkeypatch)
    with pytest.raises(InputError, match="default-tuned"):
        registry.locate("default-tuned")
    make_package(tmp_path / "empty", tmp_path / "elsewhere", monkeypatch)
    with pytest.raises(InputError, match="data that ships"):
        registry.locate("default-base")


def test_what_is_neither_a_name_nor_there_is_nowhere(tmp_path: Path) -> None:
    assert registry.locate(tmp_path) == tmp_path
    assert registry.locate("someone/something") is None
    assert registry.planted_circuit("someone/something") is None


def test_every_name_is_one_models() -> None:
    names = [model.name for model in registry.REGISTRY]
    assert len(set(names)) == len(names)
    for model in registry.REGISTRY:
        assert (model.folder is None) != (model.hub_id is None)
        assert registry.registered(model.name) is model
        for repository in (model.hub_id, model.adapter):
            assert repository is None or repository.count("/") == 1


def test_parameters_of_what_ships_are_what_it_has() -> None:
    for model in registry.REGISTRY:
        folder = registry.locate(model.name)
        if model.folder is not None and folder is not None:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                sizes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
            assert sum(math.prod(size) for size in sizes) == model.parameters


def test_a_folder_goes_before_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert registry.locate("llama-7b") is None
    (tmp_path / "llama-7b").mkdir()
    assert registry.locate("llama-7b") == Path("llama-7b")
    assert registry.registered("llama-7b") is None


def test_listing_has_a_line_a_model_with_its_memory() -> None:
    head, *lines = registry.listing()
    assert len(lines) == len(registry.REGISTRY)
    (goat,) = (line for line in lines if line.startswith("goat-7b"))
    assert goat.split("  ")[-1].strip() == "huggyllama/llama-7b + tiedong/goat-lora-7b"
    for cell in ("6.74 B", "27 GB", "13.5 GB", "LLaMA, research only"):
        assert cell in goat
    for line, model in zip(lines, registry.REGISTRY, strict=True):
        assert line.index(model.licence) == head.index("licence")


def test_command_lists_the_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert capsys.readouterr().out.splitlines() == registry.listing()


@pytest.mark.parametrize(("version", "fits"), [("3.9.0", True), ("4.0.0", False), ("4.3.1", False)])
def test_transformer_lens_without_hooked_transformer(version: str, fits: bool) -> None:
    if fits:
        check_transformer_lens(version)
        return
    with pytest.raises(InputError, match=r"pip install 'transformer_lens>=3\.9,<4'"):
        check_transformer_lens(version)
