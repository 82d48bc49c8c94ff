"""The entity-tracking task: which object is in the queried box (Prakash et al. 2024, §2)."""

import gc
import json
import random
import re
import string
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.output import write_atomically
from tl_entity.reading import parse_json, read_text
from tl_entity.tasks.batches import PromptBatch
from tl_entity.tasks.marked import MarkedText, Span, one_token_words, tokenize_marked
from tl_entity.tasks.nouns import OBJECTS

if TYPE_CHECKING:
    from datasets import Dataset

LABELS: tuple[str, ...] = tuple(string.ascii_uppercase)
"""The labels a box can have."""

KNOWING: tuple[str, ...] = ("previous_query_label", "correct_object")
"""The named positions that depend on which box is asked about."""

SEGMENT_ROLES: tuple[str, ...] = ("the", "object", "is", "in", "box", "label")
"""The roles of a segment's words, whichever segment it is."""

QUERY_ROLES: tuple[str, ...] = ("query_box", "query_label", "contains", "last")
"""The roles of the question's words."""

_LINES_A_NOTE = 1000
"""How often the reading of prompts is told of."""

_SEGMENT = re.compile(r"\b([Tt]he) (\w+) (is) (in) (Box) (\w+)")
_OBJECT, _LABEL = 2, 6
"""Words of a segment."""

_QUERY = re.compile(r"\b(Box) (\w+) (contains) (the)(?: (\w+))?\.?\s*$")
_QUERIED, _ANSWER = 2, 5
"""Words of the question."""

_WORD = re.compile(r"\w+")
_WORD_OR_SIGN = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class BoxPrompt:
    """One description of boxes and a question about one of them.

    Attributes:
        objects: what lies in the boxes, in the order of the text.
        labels: the label of each of these boxes.
        query_label: the box asked about; one that is not in `labels` leaves no right answer.
    """

    objects: tuple[str, ...]
    labels: tuple[str, ...]
    query_label: str

    @property
    def query_index(self) -> int | None:
        """Which segment the question is about, counted from 0."""
        return self.labels.index(self.query_label) if self.query_label in self.labels else None

    @property
    def answer(self) -> str | None:
        """The object in the queried box, or None when no box has that label."""
        return None if self.query_index is None else self.objects[self.query_index]

    @property
    def text(self) -> str:
        """`The apple is in Box E, the bell is in Box Q. Box Q contains the`."""
        segments = ", ".join(
            f"the {noun} is in Box {label}"
            for noun, label in zip(self.objects, self.labels, strict=True)
        )
        return f"T{segments[1:]}. Box {self.query_label} contains the"

    @property
    def sentence(self) -> str:
        """The text with its answer and full stop, as stored in a JSONL file.

        Raises:
            ValueError: if the prompt has no answer.
        """
        if self.answer is None:
            raise ValueError(f"No box is labelled {self.query_label!r}: the prompt has no answer.")
        return f"{self.text} {self.answer}."


@checked
def sample_prompts(
    n_prompts: int,
    *,
    n_boxes: int = 7,
    seed: int,
    objects: Sequence[str] = OBJECTS,
    labels: Sequence[str] = LABELS,
) -> list[BoxPrompt]:
    """Random prompts: objects, labels and the queried box are drawn afresh for each.

    Raises:
        InputError: if there are fewer labels or objects than boxes, or no box or prompt is asked
            for.
    """
    _check_counts(n_prompts, n_boxes, len(objects), len(labels))
    generator = random.Random(seed)
    prompts = []
    for _ in range(n_prompts):
        chosen_labels = tuple(generator.sample(list(labels), n_boxes))
        prompts.append(
            BoxPrompt(
                objects=tuple(generator.sample(list(objects), n_boxes)),
                labels=chosen_labels,
                query_label=generator.choice(chosen_labels),
            )
        )
    return prompts


@checked
def usable_words(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those of our objects, and those labels, that this tokenizer writes as one token."""
    return one_token_words(tokenizer, OBJECTS), one_token_words(tokenizer, LABELS)


@checked
def box_prompts(
    tokenizer: PreTrainedTokenizerBase, n_prompts: int, *, n_boxes: int = 7, seed: int
) -> PromptBatch:
    """Random prompts of one-token objects and labels, as tokens with named positions.

    Raises:
        InputError: as `sample_prompts`, counting only objects and labels that are one token.
    """
    objects, labels = usable_words(tokenizer)
    prompts = sample_prompts(n_prompts, n_boxes=n_boxes, seed=seed, objects=objects, labels=labels)
    return tokenize_marked([mark_sentence(prompt.text) for prompt in prompts], tokenizer)


def box_dataset(prompts: Iterable[BoxPrompt]) -> "Dataset":
    """Prompts as a `datasets.Dataset` with the column `sentence` (prompt, answer, full stop)."""
    from datasets import Dataset  # slow to import, and few runs need it

    return Dataset.from_dict({"sentence": [prompt.sentence for prompt in prompts]})


@checked
def save_prompts(prompts: Iterable[BoxPrompt], path: str | Path) -> None:
    """Write one `{"sentence": ...}` a line."""
    lines = [json.dumps({"sentence": prompt.sentence}) + "\n" for prompt in prompts]
    write_atomically(path, "".join(lines))


@checked
def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    progress: Callable[[int], object] = lambda lines: None,
) -> PromptBatch:
    """Read prompts from a JSONL file of `{"sentence": "... Box Q contains the bell."}` lines.

    Blank lines are passed over; `limit` takes the first so many prompts. `progress` is told how
    many more lines have been read, every thousand.

    Raises:
        InputError: naming file and line, if the file is missing, holds no prompt, a line is no
            JSON object with a box sentence and its right answer, or a label or object is not one
            token.
    """
    path = Path(path)
    lines = read_text(path, what="file of prompts").split("\n")
    with _no_collection():
        return _read_prompts(path, lines, tokenizer, limit, progress)


@contextmanager
def _no_collection() -> Generator[None, None, None]:
    """Among hundreds of thousands of small objects, all in use, looking for garbage again and again
    would take a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read_prompts(
    path: Path,
    lines: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    progress: Callable[[int], object],
) -> PromptBatch:
    numbers: list[int] = []
    texts: list[MarkedText] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(texts) >= limit:
            break
        if line.strip():
            texts.append(_read_line(line, f"{path}, line {number}"))
            numbers.append(number)
            if not len(texts) % _LINES_A_NOTE:
                progress(_LINES_A_NOTE)
    if not texts:
        raise InputError(f"{path} holds no prompts.")
    progress(len(texts) % _LINES_A_NOTE)
    try:
        return tokenize_marked(texts, tokenizer)
    except InputError:
        index, error = _first_refused(texts, tokenizer)
        raise InputError(f"{path}, line {numbers[index]}: {error}") from None


def _first_refused(
    texts: Sequence[MarkedText], tokenizer: PreTrainedTokenizerBase
) -> tuple[int, InputError]:
    """Index of the first text that the tokenizer can't take, and why; there is one."""
    start, end = 0, len(texts)
    refused: InputError | None = None
    while end - start > 1 or refused is None:
        middle = max(start + 1, (start + end) // 2)
        try:
            tokenize_marked(texts[start:middle], tokenizer)
            start = middle
        except InputError as error:
            end, refused = middle, error
    return start, refused


@checked
def mark_sentence(text: str, *, label_stands_in: int | None = None) -> MarkedText:
    """Find the named positions of a box sentence by reading it.

    Segments are `the X is in Box L`; the question is `Box L contains the`, at the end, with or
    without the answer. The names are `query_label`, `previous_query_label` (in the segment that
    has the queried label) and `correct_object` (that segment's object).

    Args:
        text: the sentence.
        label_stands_in: for a sentence that never mentioned the queried label, the segment whose
            label and object take those names.

    Raises:
        InputError: if the sentence has no question at its end, the queried label is in no segment
            (and nothing stands in) or in more than one, or the answer given is another object.
    """
    return _marked(text, label_stands_in)


def _marked(text: str, label_stands_in: int | None) -> MarkedText:
    # Apart from `mark_sentence`, whose check of types would take as long as all else.
    query = _QUERY.search(text)
    if query is None:
        raise InputError(f"{text!r:.120} does not end with a question 'Box Q contains the bell.'.")
    matches = list(_SEGMENT.finditer(text, 0, query.start()))
    segments = [(match.span(_OBJECT), match.span(_LABEL)) for match in matches]
    queried, given = query[_QUERIED], query[_ANSWER]
    asked = [i for i, (_, label) in enumerate(segments) if _at(text, label) == queried]
    if not asked and label_stands_in is not None:
        asked, answer = [label_stands_in], None
    elif len(asked) == 1:
        answer = _at(text, segments[asked[0]][0])
    else:
        raise InputError(
            f"Box {queried} is mentioned {len(asked)} times before the question in {text!r}; "
            "it must be once."
        )
    if given is not None and given != answer:
        raise InputError(f"Box {queried} contains the {answer}, not the {given}, in {text!r}.")
    correct_object, previous_label = segments[asked[0]]
    prompt = text[: query.end()] if given is None else text[: query.start(_ANSWER)].rstrip()
    return MarkedText(
        text=prompt,
        spans={
            "query_label": query.span(_QUERIED),
            "previous_query_label": previous_label,
            "correct_object": correct_object,
        },
        answer=answer,
        roles=_box_roles(prompt, matches, query),
        knowing=KNOWING,
    )


@checked
def box_roles(text: str) -> tuple[tuple[str, Span], ...]:
    """The role of each word of a box prompt, blind to which box is asked about.

    A segment's words have the roles `the`, `object`, `is`, `in`, `box` and `label`, whichever
    segment it is; a sign between two segments is `comma` and one behind them `stop`. Where a prompt
    has other words, they are `before` the segments, `between` them or `after` them. The question's
    words are `query_box`, `query_label`, `contains` and `last`.

    Raises:
        InputError: if the text does not end with a question.
    """
    query = _QUERY.search(text)
    if query is None:
        raise InputError(f"{text!r:.120} does not end with a question 'Box Q contains the'.")
    return _box_roles(text, _SEGMENT.finditer(text, 0, query.start()), query)


def _box_roles(
    text: str, segments: Iterable[re.Match[str]], query: re.Match[str]
) -> tuple[tuple[str, Span], ...]:
    roles: list[tuple[str, Span]] = []
    end, words, signs = 0, "before", "before"
    for segment in segments:
        roles += _roles_between(text, (end, segment.start()), words, signs)
        roles += _roles_of_words(segment, SEGMENT_ROLES)
        end, words, signs = segment.end(), "between", "comma"
    roles += _roles_between(text, (end, query.start()), "after", "stop")
    roles += _roles_of_words(query, QUERY_ROLES)
    return tuple(roles)


def _roles_of_words(match: re.Match[str], names: Sequence[str]) -> list[tuple[str, Span]]:
    return [(name, match.span(word)) for word, name in enumerate(names, start=1)]


def _roles_between(text: str, span: Span, words: str, signs: str) -> list[tuple[str, Span]]:
    pieces = _WORD_OR_SIGN.finditer(text, *span)
    return [(words if _WORD.match(piece[0]) else signs, piece.span()) for piece in pieces]


def _at(text: str, span: Span) -> str:
    return text[slice(*span)]


def _read_line(line: str, place: str) -> MarkedText:
    content = parse_json(line, f"{place}: this")
    try:
        return _read_prompt(content)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def _read_prompt(content: Any) -> MarkedText:
    if not isinstance(content, dict) or not isinstance(content.get("sentence"), str):
        raise InputError('each line must be {"sentence": "... Box Q contains the bell."}.')
    marked = _marked(content["sentence"], None)
    if marked.text.rstrip(". ") == content["sentence"].rstrip(". "):
        raise InputError(f"{content['sentence']!r} lacks the answer at its end.")
    return marked


def _check_counts(n_prompts: int, n_boxes: int, n_objects: int, n_labels: int) -> None:
    if n_prompts < 1 or n_boxes < 1:
        raise InputError(f"{n_prompts} prompts of {n_boxes} boxes: ask for at least one of each.")
    if n_boxes > n_labels:
        raise InputError(
            f"{n_boxes} boxes need as many labels, but only {n_labels} can be used here; "
            "ask for fewer boxes."
        )
    if n_boxes > n_objects:
        raise InputError(
            f"{n_boxes} boxes need as many objects, but only {n_objects} are one token of this "
            "tokenizer; ask for fewer boxes."
        )
