"""The numbers on the page about mechanisms are those of the files that the scripts wrote."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mechanism"
PAGE = (ROOT / "docs" / "howto" / "mechanism.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["default-base", "default-tuned", "smollm2_capitals"])
def test_peers(name, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert script["table"](content) in PAGE


def test_two_models() -> None:
    content = json.loads((RESULTS / "shipped_pair.json").read_text(encoding="utf-8"))
    words_for = {
        "base in base": "the base's in the base",
        "base in tuned": "the base's in the fine-tune",
        "tuned in base": "the fine-tune's in the base",
        "tuned in tuned": "the fine-tune's in the fine-tune",
    }
    for where, words in words_for.items():
        row = next(row for row in content["inside"] if row["mechanism"] == where)
        cells = [row["agreement"], row["KL"], row["random"]]
        shown = [f"{cells[0]:.2f}", f"{cells[1]:.3f}", f"{cells[2]:.2f}"]
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| {words} |"))
        assert line.endswith(" | ".join(part.removeprefix("0") for part in shown) + " |")
    for one, other in zip(content["base"]["searches"], content["tuned"]["searches"], strict=True):
        jaccards = [f"{row['jaccard']:.2f}"[1:] for row in (one, other) if row["jaccard"]]
        counts = [str(one["nodes"]), str(other["nodes"])]
        found = [
            line
            for line in PAGE.splitlines()
            if line.startswith("| ")
            and all(f"| {part}" in line for part in counts)
            and all(f"| {part} |" in line for part in jaccards)
        ]
        assert found, one["search"]
    assert {name: len(nodes) for name, nodes in content["settled"].items()} == {
        "kept": 22,
        "lost": 2,
        "gained": 0,
    }
    assert "**22 nodes\nare kept, 2 lost**" in PAGE
    for name in ("base", "tuned"):
        groups = {group["group"]: group for group in content[name]["groups"]}
        for group in ("query_label into v of last", "last into q of last"):
            assert groups[group]["carries"] == "position"
            nodes = ", ".join(groups[group]["nodes"].split())
            assert name != "base" or f"| `{group}` | {nodes} |" in PAGE
