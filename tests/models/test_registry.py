import subprocess
import sys
from pathlib import Path

import pytest

from tl_entity.errors import InputError
from tl_entity.models import registry


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
