"""The pieces of text that tables are made of."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from tl_entity.heads import Head
from tl_entity.results import read_number
from tl_entity.studies.design import Words
from tl_entity.studies.entity_tracking import NAME
from tl_entity.study.experiment_results import MOST_LIKELY
from tl_entity.study.results import StudiedTask

if TYPE_CHECKING:
    import pandas as pd

NO_VALUE, MINUS = "\u2013", "\u2212"
NONE = Markup('<span class="soft">none</span>')

Table = dict[str, Any]
"""Header, rows and caption, for the template that shows tables."""

_INTERVAL, _UNBROKEN = re.compile(r"\[([^],[]+), ([^],[]+)\]"), "[\\1,\u00a0\\2]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """A table, no interval of which is broken over two lines."""
    return {
        "header": header,
        "rows": [[unbroken(cell) for cell in row] for row in rows],
        "caption": caption,
    }


def unbroken(text: str) -> str:
    """The text with its intervals held together."""
    return text if isinstance(text, Markup) else _INTERVAL.sub(_UNBROKEN, text)


def frame_table(frame: "pd.DataFrame", names: dict[str, str]) -> Table:
    """Some columns of a data frame under other names, numbers to three places."""

    def cell(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return NO_VALUE if math.isnan(value) else signed(f"{value:.3f}")
        return NO_VALUE if value is None else str(value) or NONE

    rows = [[cell(value) for value in row] for row in frame[list(names)].to_numpy(object).tolist()]
    return table(list(names.values()), rows)


def heads_text(heads: Sequence[Sequence[int]]) -> str:
    """Heads by name."""
    return " ".join(str(Head(*head)) for head in heads) or NONE


def words_of(content: Mapping[str, Any]) -> Words:
    """What names are called in a study, of the content of its results.json."""
    return StudiedTask(content["task"]["name"]).words


def is_of_boxes(content: Mapping[str, Any]) -> bool:
    """Whether a study is of the paper's task."""
    return content["task"]["name"] == NAME


def main_accuracy(content: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's accuracy on the prompts studied, of the content of results.json."""
    what = str(content["settings"]["boxes"]) if is_of_boxes(content) else MOST_LIKELY
    return model["accuracy"][what]


def prompts_words(content: Mapping[str, Any]) -> str:
    """The prompts studied, in words."""
    boxes = content["settings"]["boxes"]
    return f"{boxes} boxes" if is_of_boxes(content) else content["task"]["name"]


def group_cell(group: str, words: Words) -> str:
    """`A value_fetcher`; names without a letter as they are."""
    if group not in words.letters:
        return group
    return Markup("{} <code>{}</code>").format(words.letters[group], group)


def share_text(found: Mapping[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = found["interval"]
    return f"{found['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def ratio_text(found: Mapping[str, Any]) -> str:
    """A faithfulness with its interval."""
    value, (low, high) = found["faithfulness"], map(read_number, found["interval"])
    if value is None or math.isnan(value):
        return "not defined (nothing is answered right)"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def agreement_text(found: Mapping[str, Any]) -> str:
    """How often what is left alone answers as the whole model does."""
    low, high = found["agreement_interval"]
    return f"{found['agreement']:.3f} [{low:.3f}, {high:.3f}]"


def mechanism_sentence(model: Mapping[str, Any]) -> str:
    """What was found in a model, in a sentence."""
    found = model["mechanism"]
    if "nodes" not in found:
        return f"In {model['label']} no mechanism could be looked for: {found['why_not']}"
    alone, n, n_all = found["alone"], len(found["nodes"]), found["n_all"]
    return (
        f"In {model['label']} {n} of {n_all} nodes alone keep {ratio_text(alone)} of its accuracy. "
        f"They answer {agreement_text(alone)} of {alone['model']['prompts']} prompts as the whole "
        "model does."
    )


def number_text(value: float | None) -> str:
    """A number to two places."""
    return NO_VALUE if value is None else signed(f"{value:.2f}")


def signed(number: str) -> str:
    """A number with a minus sign as in print."""
    return number.replace("-", MINUS)


def size(model: Mapping[str, Any]) -> int:
    """Heads in a model's circuit."""
    return sum(map(len, model["circuit"].values()))


def sizes_text(circuit: Mapping[str, Sequence[Any]], groups: Sequence[str]) -> str:
    """Heads of each group: `2/2/2/4`."""
    return "/".join(str(len(circuit[group])) for group in groups)
