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

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.boxes import KNOWING, BoxPrompt, box_roles, sample_prompts, usable_words
from tl_entity.tasks.desideratum import DESIDERATA as DESIDERATA
from tl_entity.tasks.desideratum import MAIN_DESIDERATA as MAIN_DESIDERATA
from tl_entity.tasks.desideratum import USUAL as USUAL
from tl_entity.tasks.desideratum import Desideratum as Desideratum
from tl_entity.tasks.desideratum import Form as Form
from tl_entity.tasks.desideratum import Information as Information
from tl_entity.tasks.desideratum import find_desideratum as find_desideratum
from tl_entity.tasks.encode import encode
from tl_entity.tasks.marked import MarkedText, Span, tokenize_marked

EXTRA_OBJECTS, EXTRA_LABELS = ("object_1", "object_2"), ("label_1", "label_2")
"""Slots of a form for words that occur nowhere else in the pair."""


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
