"""The documentation builds without a warning, fetches nothing, and its examples run."""

import doctest
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import tl_entity

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]

WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "tl_entity").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built_and_fetches_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    loads = re.compile(r"""<(?:script|img|iframe|source)[^>]*?\ssrc=["']?(?:https?:)?//""")
    links = re.compile(r"""<link(?![^>]*rel=["']?canonical)[^>]*?\shref=["']?(?:https?:)?//""")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not loads.search(text) and not links.search(text), page


def test_every_page_has_its_place_in_the_contents(site):
    contents = (site / "index.html").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in contents


@pytest.mark.parametrize("study", ["qwen", "qwen_mechanism"])
def test_every_number_of_a_study_is_that_of_its_files(study, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "studies"))
    script = runpy.run_path(str(ROOT / "docs" / "studies" / f"{study}.py"))
    kept = (ROOT / "docs" / "studies" / f"{study}.md").read_text(encoding="utf-8")
    assert script["page"]() == kept


def test_the_reference_has_every_public_name(site):
    text = "\n".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    missing = [
        name for name in tl_entity.__all__ if not re.search(rf'id="tl_entity[\w.]*\.{name}"', text)
    ]
    assert missing == []


def test_the_reference_has_every_public_module_once():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    named = [
        line.removeprefix("::: ")
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("::: ")
    ]
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "tl_entity").rglob("*.py")
        if not path.name.startswith("_")
    }
    assert sorted(named) == sorted(modules)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), names)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_in_docstrings_hold(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
