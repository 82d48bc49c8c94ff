"""The kinds of information that desiderata tell apart: what the prompts of a pair share."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from tl_entity._typing import checked
from tl_entity.errors import InputError

Information = Literal["object_value", "box_label_value", "position"]
"""What is taken from the counterfactual: the object that it answers with, the label that it asks
about, or the position of the segment that it asks about."""


@dataclass(frozen=True)
class Form:
    """How a box prompt is written.

    `{object}` and `{label}` stand for those of a segment or of the question; `{object_1}`,
    `{object_2}`, `{label_1}` and `{label_2}` for words that occur nowhere else in the pair.
    Sentences get their capital letter by themselves.

    Attributes:
        before: what comes ahead of the segments.
        segment: a segment.
        asked_segment: the segment that the question is about; None to write it as the others.
        between: what stands between two segments.
        after: what comes behind the segments.
        question: the question.
        is_true: False if the segment asked about denies what the others state, so that the
            question has no right answer.
    """

    before: str = ""
    segment: str = "the {object} is in Box {label}"
    asked_segment: str | None = None
    between: str = ", "
    after: str = ""
    question: str = ". Box {label} contains the"
    is_true: bool = True


USUAL = Form()
"""The form of the task's prompts: `The apple is in Box E, the bell is in Box Q. ...`."""


@dataclass(frozen=True)
class Desideratum:
    """A kind of pair that tells apart what heads carry.

    Attributes:
        name: what `desideratum_pairs` is given.
        says: what the pair is and what the target is, in a sentence.
        carried: the information taken from the counterfactual. The target is the counterfactual's
            answer (`object_value`), the base object in the box that the counterfactual asks about
            (`box_label_value`), or the base object in the segment of the same number as the one
            that the counterfactual asks about (`position`).
        base: how the base prompt is written.
        counterfactual: how the counterfactual is written.
        target_shift: for `position`, how many segments further the target is; after the last
            segment comes the first. Anything but 0 makes a control.
    """

    name: str
    says: str
    carried: Information = "position"
    base: Form = USUAL
    counterfactual: Form = USUAL
    target_shift: int = 0


_KINDS: tuple[Desideratum, ...] = (
    Desideratum(
        "object_value",
        "The counterfactual has other objects and labels and asks about another segment; the "
        "target is the counterfactual's object.",
        carried="object_value",
    ),
    Desideratum(
        "box_label_value",
        "The counterfactual asks about a label that the base has too, in another segment of "
        "either; the target is the base object in the box of that label.",
        carried="box_label_value",
    ),
    Desideratum(
        "position",
        "The counterfactual has other objects and labels and asks about another segment; the "
        "target is the base object in the segment of that number.",
    ),
    Desideratum(
        "text_before",
        "As position, with a sentence without boxes ahead of the counterfactual's segments.",
        counterfactual=Form(before="the {object_1} is next to the {object_2}. "),
    ),
    Desideratum(
        "text_after",
        "As position, with a sentence without boxes behind the counterfactual's segments.",
        counterfactual=Form(after=". the {object_1} is next to the {object_2}"),
    ),
    Desideratum(
        "segment_before",
        "As position, with one more segment ahead of the counterfactual's; it is not counted.",
        counterfactual=Form(before="the {object_1} is in Box {label_1}, "),
    ),
    Desideratum(
        "segment_after",
        "As position, with one more segment behind the counterfactual's.",
        counterfactual=Form(after=", the {object_1} is in Box {label_1}"),
    ),
    Desideratum(
        "box_statement",
        "As position, with a statement about two boxes without objects right before the segment "
        "that the counterfactual asks about; it is not counted.",
        counterfactual=Form(
            asked_segment="Box {label_1} is next to Box {label_2}, the {object} is in Box {label}"
        ),
    ),
    Desideratum(
        "extra_tokens",
        "As position, with two more words between object and box in the segment that the "
        "counterfactual asks about.",
        counterfactual=Form(asked_segment="the {object} was and is in Box {label}"),
    ),
    Desideratum(
        "comma_after_object",
        "As position, with a comma after each object of the counterfactual.",
        counterfactual=Form(segment="the {object}, is in Box {label}"),
    ),
    Desideratum(
        "no_commas",
        "As position, with no commas between the counterfactual's segments.",
        counterfactual=Form(between=" "),
    ),
    Desideratum(
        "is_not_in",
        "As position, with the segment that the counterfactual asks about saying `is not in`.",
        counterfactual=Form(
            asked_segment="the {object} is not in Box {label}",
            is_true=False,
        ),
    ),
    Desideratum(
        "label_first",
        "As position, with the segment that the counterfactual asks about in the order `Box X "
        "contains the y`.",
        counterfactual=Form(asked_segment="Box {label} contains the {object}"),
    ),
    Desideratum(
        "next_position",
        "Control: as position, but the target is the base object one segment further, so that "
        "heads which carry position miss it.",
        target_shift=1,
    ),
)


DESIDERATA: Mapping[str, Desideratum] = MappingProxyType({kind.name: kind for kind in _KINDS})
"""All desiderata by name: the paper's three, then its eleven further ones for position.

The added segments and statements of `segment_before` and `box_statement` are not counted in the
target, as in the paper: position that is counted from the start of the text would miss it.
"""


MAIN_DESIDERATA: tuple[str, ...] = ("object_value", "box_label_value", "position")
"""The three that tell the kinds of information apart."""


@checked
def find_desideratum(desideratum: Desideratum | str) -> Desideratum:
    """The desideratum of this name; one that is given as itself is returned.

    Raises:
        InputError: if there is none of that name.
    """
    if isinstance(desideratum, Desideratum):
        return desideratum
    if desideratum not in DESIDERATA:
        raise InputError(
            f"There is no desideratum {desideratum!r}; there are {', '.join(DESIDERATA)}."
        )
    return DESIDERATA[desideratum]
