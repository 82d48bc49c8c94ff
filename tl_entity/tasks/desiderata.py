"""What information a head may carry, as pairs of prompts: the desiderata of DCM, as data.

A desideratum (Prakash et al. 2024, §4.1 and appendix) is a kind of pair: a base prompt, a
counterfactual prompt, and the target, which the base run should answer once whatever carries the
information is taken from the counterfactual. `DESIDERATA` describes each kind in a few lines;
`desideratum_pairs` makes pairs of any of them.

In every pair both prompts ask about different segments, and they share no object and no label,
except the one label that a `box_label_value` pair is about. Where a desideratum alters the text,
the counterfactual is the altered one and the base has the usual form. What is said of "the segment
asked about" is altered there alone, all other segments keeping the usual form.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Formatter
from types import MappingProxyType
from typing import Literal

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.boxes import KNOWING, BoxPrompt, box_roles, sample_prompts, usable_words
from tl_entity.tasks.encode import encode
from tl_entity.tasks.marked import MarkedText, Span, tokenize_marked

Information = Literal["object_value", "box_label_value", "position"]
"""What is taken from the counterfactual: the object that it answers with, the label that it asks
about, or the position of the segment that it asks about."""

EXTRA_OBJECTS, EXTRA_LABELS = ("object_1", "object_2"), ("label_1", "label_2")
"""Slots of a form for words that occur nowhere else in the pair."""


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


@dataclass(frozen=True)
class DesideratumPair:
    """One pair as text.

    Attributes:
        base: the prompt that is answered.
        counterfactual: the prompt that the information is taken from.
        target: the object that the base run should name with that information.
    """

    base: MarkedText
    counterfactual: MarkedText
    target: str


@checked
def sample_desideratum_pairs(
    desideratum: Desideratum | str,
    n_pairs: int,
    *,
    n_boxes: int = 7,
    seed: int,
    objects: tuple[str, ...],
    labels: tuple[str, ...],
) -> list[DesideratumPair]:
    """Random pairs of one kind; the same seed gives the same pairs.

    With one seed all desiderata have the same base prompts, and those that only write the
    counterfactual in another form have the same objects, labels and questions throughout.

    Raises:
        InputError: if there is no such desideratum, too few labels or objects for the prompts of a
            pair to share none, or too few boxes to ask about another one.
    """
    kind = find_desideratum(desideratum)
    bases = sample_prompts(n_pairs, n_boxes=n_boxes, seed=seed, objects=objects, labels=labels)
    _check_words(kind, n_boxes, len(objects), len(labels))
    # String seeds keep these streams apart from each other and from the one of the base prompts.
    generator = random.Random(f"{kind.carried} {kind.target_shift} {seed}")
    extra_words = random.Random(f"extra words {seed}")
    pairs = []
    for base in bases:
        counterfactual, target = _counterfactual(kind, base, objects, labels, generator)
        extra = _extra_words(extra_words, (base, counterfactual), objects, labels)
        pairs.append(
            DesideratumPair(
                write_prompt(base, kind.base, extra),
                write_prompt(counterfactual, kind.counterfactual, extra),
                target,
            )
        )
    return pairs


@checked
def desideratum_pairs(
    tokenizer: PreTrainedTokenizerBase,
    desideratum: Desideratum | str,
    n_pairs: int,
    *,
    n_boxes: int = 7,
    seed: int,
) -> PairBatch:
    """Random pairs of one kind as tokens: clean is the base, corrupt the counterfactual, and the
    targets are what the base run should answer with the counterfactual's information.

    Both prompts have the positions `last`, `query_label`, `previous_query_label` and
    `correct_object`, each its own; the counterfactual's `correct_object` is the object of the
    segment it asks about.

    Raises:
        InputError: as `sample_desideratum_pairs`, counting only objects and labels of one token;
            or if the tokenizer has no token for a word that the prompts are written with.
    """
    kind = find_desideratum(desideratum)
    objects, labels = usable_words(tokenizer)
    pairs = sample_desideratum_pairs(
        kind, n_pairs, n_boxes=n_boxes, seed=seed, objects=objects, labels=labels
    )
    for side in ([pair.base for pair in pairs], [pair.counterfactual for pair in pairs]):
        _check_known(kind, side, tokenizer)
    # The target's token is found as an answer's is: as the word that follows the base prompt.
    answered = [replace(pair.base, answer=pair.target) for pair in pairs]
    return PairBatch(
        clean=tokenize_marked([pair.base for pair in pairs], tokenizer),
        corrupt=tokenize_marked([pair.counterfactual for pair in pairs], tokenizer),
        targets=tokenize_marked(answered, tokenizer).answers,
    )


@checked
def desideratum_draws(
    tokenizer: PreTrainedTokenizerBase,
    desiderata: Sequence[Desideratum | str],
    n_pairs: int,
    *,
    n_boxes: int = 7,
) -> dict[str, Callable[[int], PairBatch]]:
    """For each desideratum a function from a seed to pairs, for methods that repeat their draws.

    Raises:
        InputError: if there is no such desideratum; the functions raise as `desideratum_pairs`.
    """

    def draw(kind: Desideratum) -> Callable[[int], PairBatch]:
        return lambda seed: desideratum_pairs(tokenizer, kind, n_pairs, n_boxes=n_boxes, seed=seed)

    kinds = [find_desideratum(desideratum) for desideratum in desiderata]
    return {kind.name: draw(kind) for kind in kinds}


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


@checked
def write_prompt(
    prompt: BoxPrompt, form: Form = USUAL, extra: Mapping[str, str] | None = None
) -> MarkedText:
    """Write a prompt in a form and mark its named positions.

    Args:
        prompt: what the boxes hold and which one is asked about.
        form: how to say it.
        extra: the words for the form's `{object_1}`, `{label_1}`, ... slots.

    Raises:
        InputError: if no box has the queried label, or a slot has no word.
    """
    asked = prompt.query_index
    if asked is None:
        raise InputError(f"No box is labelled {prompt.query_label!r} in {prompt.text!r}.")
    extra = extra or {}
    writer = _Writer()
    writer.add(form.before, extra)
    for i, (noun, label) in enumerate(zip(prompt.objects, prompt.labels, strict=True)):
        words = {**extra, "object": noun, "label": label}
        writer.add(form.between if i else "", {})
        if i == asked:
            names = {"object": "correct_object", "label": "previous_query_label"}
            writer.add(form.asked_segment or form.segment, words, names)
        else:
            writer.add(form.segment, words)
    writer.add(form.after, extra)
    writer.add(form.question, {**extra, "label": prompt.query_label}, {"label": "query_label"})
    names = ("query_label", "previous_query_label", "correct_object")
    text = re.sub(r"(^|\. )([a-z])", lambda start: start[0].upper(), writer.text)
    return MarkedText(
        text=text,
        spans={name: writer.spans[name] for name in names},
        answer=prompt.answer if form.is_true else None,
        roles=box_roles(text),
        knowing=KNOWING,
    )


class _Writer:
    """A text written piece by piece, with the places of named words."""

    def __init__(self) -> None:
        self.text = ""
        self.spans: dict[str, Span] = {}

    def add(
        self, template: str, words: Mapping[str, str], names: Mapping[str, str] | None = None
    ) -> None:
        """Write a template's text and the words of its slots; note where the named ones are."""
        for text, slot, _, _ in Formatter().parse(template):
            self.text += text
            if slot is None:
                continue
            if slot not in words:
                raise InputError(f"There is no word for the slot {{{slot}}} of {template!r}.")
            start = len(self.text)
            self.text += words[slot]
            if names and slot in names:
                self.spans[names[slot]] = (start, len(self.text))


def _counterfactual(
    kind: Desideratum,
    base: BoxPrompt,
    objects: tuple[str, ...],
    labels: tuple[str, ...],
    generator: random.Random,
) -> tuple[BoxPrompt, str]:
    """A counterfactual prompt for a base prompt, and the target."""
    n_boxes, asked = len(base.labels), base.query_index
    other_labels = generator.sample([word for word in labels if word not in base.labels], n_boxes)
    other_objects = generator.sample(
        [word for word in objects if word not in base.objects], n_boxes
    )
    others = [index for index in range(n_boxes) if index != asked]
    if kind.carried == "box_label_value":
        box = generator.choice(others)
        # Elsewhere than in the base, or position would lead to the target too.
        index = generator.choice([index for index in others if index != box])
        other_labels[index] = base.labels[box]
        target = base.objects[box]
    elif kind.carried == "object_value":
        index = generator.choice(others)
        target = other_objects[index]
    else:
        shift = kind.target_shift
        # The target is never what the base prompt answers by itself.
        index = generator.choice([i for i in others if (i + shift) % n_boxes != asked])
        target = base.objects[(index + shift) % n_boxes]
    return BoxPrompt(tuple(other_objects), tuple(other_labels), other_labels[index]), target


def _extra_words(
    generator: random.Random,
    prompts: Sequence[BoxPrompt],
    objects: tuple[str, ...],
    labels: tuple[str, ...],
) -> dict[str, str]:
    """Words for the extra slots that are in none of the prompts, as many as there are."""
    words: dict[str, str] = {}
    for slots, all_words, used in (
        (EXTRA_OBJECTS, objects, [noun for prompt in prompts for noun in prompt.objects]),
        (EXTRA_LABELS, labels, [label for prompt in prompts for label in prompt.labels]),
    ):
        unused = [word for word in all_words if word not in used]
        drawn = generator.sample(unused, min(len(slots), len(unused)))
        words |= dict(zip(slots, drawn, strict=False))
    return words


def _check_words(kind: Desideratum, n_boxes: int, n_objects: int, n_labels: int) -> None:
    fewest = 3 if kind.carried == "box_label_value" or kind.target_shift % n_boxes else 2
    if n_boxes < fewest:
        raise InputError(
            f"The desideratum {kind.name!r} needs at least {fewest} boxes to ask about another one."
        )
    slots = {
        slot
        for form in (kind.base, kind.counterfactual)
        for template in (form.before, form.segment, form.asked_segment or "", form.after)
        for _, slot, _, _ in Formatter().parse(template)
    }
    objects_needed = 2 * n_boxes + len(slots & {*EXTRA_OBJECTS})
    labels_needed = 2 * n_boxes + len(slots & {*EXTRA_LABELS})
    if n_labels < labels_needed or n_objects < objects_needed:
        raise InputError(
            f"Pairs of {n_boxes} boxes for {kind.name!r} need {labels_needed} labels and "
            f"{objects_needed} objects, but {n_labels} and {n_objects} can be used; "
            "ask for fewer boxes."
        )


def _check_known(
    kind: Desideratum, texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse texts with words that the tokenizer has no token for, naming the words."""
    if tokenizer.unk_token_id is None:
        return
    unknown = {
        text.text[slice(*offsets)]
        for text, encoded in zip(
            texts, encode(tokenizer, [text.text for text in texts]), strict=True
        )
        for token, offsets in zip(encoded.ids, encoded.offsets, strict=True)
        if token == tokenizer.unk_token_id and offsets[0] < offsets[1]
    }
    if unknown:
        raise InputError(
            f"This tokenizer has no token for {', '.join(map(repr, sorted(unknown)))}, "
            f"which prompts of the desideratum {kind.name!r} are written with."
        )
