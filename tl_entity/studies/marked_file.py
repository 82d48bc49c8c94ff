"""A task of one's own from a file of marked texts, and a recipe for its circuit from another.

The task's file has a JSON object a line, with the columns of `tl_entity.dataset_pairs`:

    {"clean": "The [[thing|apple]] is in Box [[label|A]] ...", "corrupt": "...", "answer": "apple"}

and "foil" and "target" where they are wanted. The recipe's file has one object:

    {"stages": [{"group": "mover", "position": "last", "size": 2},
                {"group": "marker", "position": "label.first", "into": "mover",
                 "receiver_input": "v", "size": 2}],
     "metric": "logit difference"}

Needs no torch before prompts are drawn.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tl_entity.errors import InputError, did_you_mean
from tl_entity.reading import described, parse_json, read_json, read_text
from tl_entity.studies.design import Part, Recipe, StudyTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tl_entity.tasks.batches import PairBatch

COLUMNS = ("clean", "corrupt", "answer", "target", "foil")
"""What a row may have; the first three are needed."""

PARTS: Mapping[Part, int] = {"finding": 2, "testing": 1, "ablation": 1}
"""How the rows are shared out: half of them to find, a quarter each to test and to make ablations
of."""

FEWEST_ROWS = 12
"""With fewer rows there is nothing to be shared out."""

_STAGE = ("group", "position", "into", "receiver_input", "size", "receivers", "edges")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a file of marked texts.

    Raises:
        InputError: naming the line that is no object of texts or lacks one that is needed; if there
            are too few rows, or only some have a target or foil.
    """
    rows: list[dict[str, str]] = []
    for number, line in enumerate(read_text(path, what="task file").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number},"
        row = parse_json(line, place)
        if not isinstance(row, dict):
            raise InputError(f"{place} must hold a JSON object, not {described(row)}.")
        texts = cast(dict[str, Any], row)
        for name in COLUMNS:
            if name in COLUMNS[:3] and name not in texts:
                raise InputError(f"{place} has no {name!r}; a row has {', '.join(COLUMNS[:3])}.")
            if name in texts and not isinstance(texts[name], str):
                raise InputError(f"{place} has {described(texts[name])} as {name!r}, not a text.")
        rows.append({name: texts[name] for name in COLUMNS if name in texts})
    if len(rows) < FEWEST_ROWS:
        raise InputError(
            f"{path} has {len(rows)} rows; a study shares them out to find, to test and to make "
            f"ablations of, and needs {FEWEST_ROWS} at least."
        )
    for name in COLUMNS[3:]:
        n = sum(name in row for row in rows)
        if 0 < n < len(rows):
            raise InputError(f"{path}: {n} of {len(rows)} rows have a {name!r}; give all or none.")
    return rows


def rows_for(n_rows: int, seed: int) -> dict[Part, list[int]]:
    """Which rows are for what: a random order of them, cut by `PARTS`."""
    order = list(range(n_rows))
    random.Random(f"rows {seed}").shuffle(order)
    found: dict[Part, list[int]] = {}
    whole, start, shares = sum(PARTS.values()), 0, 0
    for part, share in PARTS.items():
        shares += share
        end = n_rows * shares // whole
        found[part] = order[start:end]
        start = end
    return found


def marked_file(
    path: str | Path, *, knowing: Sequence[str] = (), space: bool = True, seed: int = 0
) -> StudyTask:
    """The task that a file of marked texts is.

    Args:
        path: the file.
        knowing: names of the marks that depend on what is asked.
        space: whether the answer follows after a space.
        seed: of which rows are for what.

    Raises:
        InputError: as `read_rows`.
    """
    rows, name = read_rows(path), Path(path).name
    whole: list[tuple[Any, PairBatch]] = []
    share = rows_for(len(rows), seed)

    def pairs(tokenizer: "PreTrainedTokenizerBase", n: int, seed: int, part: Part) -> "PairBatch":
        from torch import tensor

        from tl_entity.tasks.own import dataset_pairs

        # All together, so that every part has the same roles in the same order.
        if not whole or whole[0][0] is not tokenizer:
            read = dataset_pairs(tokenizer, rows, knowing=tuple(knowing), space=space)
            whole[:] = [(tokenizer, read)]
        return whole[0][1][tensor(share[part][:n])]

    content = [rows, list(knowing), space, seed]
    return StudyTask(
        name=name,
        says=f"What follows each of the {len(rows)} texts of {name}?",
        pairs=pairs,
        inputs={"rows": hashlib.sha256(repr(content).encode()).hexdigest()},
        has_foils="foil" in rows[0],
        n_pairs={part: len(some) for part, some in share.items()},
    )


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The content of a recipe's file.

    Raises:
        InputError: naming what is missing, unknown or of another type.
    """
    content = read_json(path, what="recipe file")
    _check_names(content, ("stages", "metric", "overlaps"), str(path))
    stages = content.get("stages")
    if not isinstance(stages, list) or not stages:
        raise InputError(f"{path} must hold a list of 'stages', one a group that is to be found.")
    for name, choices in (("metric", ()), ("overlaps", ("stronger", "later"))):
        given = content.get(name, "stronger")
        if not isinstance(given, str) or (choices and given not in choices):
            known = f"; it is {' or '.join(choices)}" if choices else ", not a name"
            raise InputError(f"{path} has {described(given)} as {name!r}{known}.")
    found: list[str] = []
    for number, stage in enumerate(cast(list[Any], stages), start=1):
        place = f"{path}, stage {number},"
        if not isinstance(stage, dict):
            raise InputError(f"{place} must be a JSON object, not {described(stage)}.")
        _check_stage(cast(dict[str, Any], stage), place)
        if stage["group"] in found:
            raise InputError(f"{place} finds the group {stage['group']!r} a second time.")
        found.append(stage["group"])
    return content


def recipe_of(content: Mapping[str, Any]) -> Recipe:
    """The recipe that a file's content says.

    Raises:
        InputError: as `tl_entity.Stage`; if no metric has the name.
    """
    from tl_entity.methods.discovery import Stage
    from tl_entity.metrics import RELATIVE_PROBABILITY, as_metric

    stages = [
        Stage(
            stage["group"],
            stage["position"],
            into=stage.get("into"),
            receiver_input=stage.get("receiver_input"),
            edges=tuple((group, which) for group, which in stage.get("edges", ())),
        )
        for stage in content["stages"]
    ]
    each = {stage["group"]: stage for stage in content["stages"]}
    return Recipe(
        stages=tuple(stages),
        sizes={name: stage["size"] for name, stage in each.items()},
        receiver_sizes={n: stage["receivers"] for n, stage in each.items() if "receivers" in stage},
        metric=as_metric(content.get("metric", RELATIVE_PROBABILITY.name)).name,
        overlaps=content.get("overlaps", "stronger"),
    )


def _check_stage(stage: Mapping[str, Any], place: str) -> None:
    _check_names(stage, _STAGE, place)
    for name in ("group", "position", "size"):
        if name not in stage:
            raise InputError(f"{place} has no {name!r}; each has a group, its position and size.")
    for name in ("group", "position", "into", "receiver_input"):
        if not isinstance(stage.get(name, ""), str):
            raise InputError(f"{place} has {described(stage[name])} as {name!r}, not a name.")
    if not _GROUP.fullmatch(stage["group"]):
        raise InputError(
            f"{place} has the group {stage['group']!r}, which files can't be named by; use "
            "letters, digits, _ and -."
        )
    for name in ("size", "receivers"):
        size = stage.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise InputError(f"{place} has {described(size)} as {name!r}, not a number of heads.")
    edges = [([stage["into"], stage.get("receiver_input")])] if "into" in stage else []
    given = stage.get("edges", [])
    if not isinstance(given, list):
        raise InputError(f"{place} has {described(given)} as 'edges', not a list of them.")
    for edge in [*edges, *cast(list[Any], given)]:
        pair = isinstance(edge, list) and len(cast(list[Any], edge)) == 2
        if not pair or not isinstance(edge[0], str) or edge[1] not in ("q", "k", "v"):
            raise InputError(
                f"{place} patches into {described(edge)}; name a group found before and its input, "
                "q, k or v."
            )
    if "receiver_input" in stage and "into" not in stage:
        raise InputError(f"{place} has a receiver_input without the group that it is of ('into').")


def _check_names(content: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for name in content:
        if name not in known:
            meant = did_you_mean(name, known)
            raise InputError(f"{place} has a {name!r:.60}, and knows {', '.join(known)}{meant}")
