"""The tables of `benchmarks/card.py`."""

from collections.abc import Mapping
from typing import Any

CARD = "card"
"""Files of results whose names begin so are tables of a card."""

DIGITS = {"float64": ".0e", "float32": ".0e", "TF32": ".1g", "bfloat16": ".1g"}


def card_tables(results: Mapping[str, Any]) -> list[str]:
    """What `card.py` measured."""
    machine, sizes = results["machine"], results["sizes"]
    lines = [
        f"## {machine['device']}, by `bash benchmarks/card.sh`",
        "",
        f"torch {machine['torch']}, CUDA {machine['cuda']}; wall seconds of one run after one of a",
        "single pair. *Of the rate*: counted operations a second over those of one product of two",
        "8192 x 8192 matrices of the same kind, just before. Peak memory has the weights in it.",
        "",
    ]
    for name in [name for name in results if name.startswith("stages, ")]:
        found = results[name]
        lines += [
            f"### {sizes['model']}, path patching of all heads, {name.removeprefix('stages, ')}",
            "",
            f"The card's products: {found['tflop_per_second_of_products']:.0f} TFLOP/s. Pairs of "
            "53 tokens.",
            "",
            "| stage | pairs | seconds | TFLOP | of the rate | peak GiB |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for stage, row in found.items():
            if isinstance(row, Mapping):
                lines.append(
                    f"| {stage} | {row['pairs']} | {row['seconds']:.2f} | {row['tflop']:.0f} "
                    f"| {row['share_of_rate']:.0%} | {row['peak_gib']:.1f} |"
                )
        lines.append("")
    if "parity" in results:
        lines += _parity(results["parity"])
    return lines


def _parity(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [
        "### Every method on the card against the CPU in float64",
        "",
        "A random model of three layers whose weights are large, so that every path matters; the",
        "largest difference over the largest number. Scores of a single pair relative to its own",
        "small probability are what bfloat16 does worst.",
        "",
        f"| method | {' | '.join(DIGITS)} |",
        f"|---|{'--:|' * len(DIGITS)}",
    ]
    for method, row in found.items():
        cells = [
            format(row[precision], digits) if isinstance(row[precision], float) else "failed"
            for precision, digits in DIGITS.items()
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]
