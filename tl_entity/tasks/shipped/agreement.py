"""Subject-verb agreement over another noun (after Linzen et al. 2016, arXiv 1611.01368).

`The keys near the cabinet` is followed by ` are`, not by ` is`: the verb agrees with the subject,
whatever the number of the noun between them, which is drawn by itself. The corrupt text has the
subject in its other number. Much else than a verb may follow, so the answer beats the foil far more
often than it is the most likely word.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerBase

from tl_entity.tasks.shipped.task import Task, TextPair, Words

_FORMS = (
    "The {subject} near the {attractor}",
    "The {subject} behind the {attractor}",
    "The {subject} next to the {attractor}",
    "The {subject} in front of the {attractor}",
)

_VERBS = ("is", "are")

_NOUNS = (
    "key book car boy girl dog cat house table chair tree box doctor student teacher picture bird "
    "farmer guard letter bottle window door king lamp truck flower horse"
).split()

_WORDS = {
    "noun": [(noun, f"{noun}es" if noun.endswith("x") else f"{noun}s") for noun in _NOUNS],
    "verb": [_VERBS],
}


def _drawer(tokenizer: PreTrainedTokenizerBase, words: Words) -> Callable[[Random], TextPair]:
    nouns = list(words["noun"])

    def draw(random: Random) -> TextPair:
        subject, attractor = random.sample(nouns, 2)
        number, other = random.choice(((0, 1), (1, 0)))
        form = random.choice(_FORMS)
        marked = f"[[attractor|{random.choice(attractor)}]]"
        clean, corrupt = (
            form.format(subject=f"[[subject|{subject[n]}]]", attractor=marked)
            for n in (number, other)
        )
        return TextPair(clean, corrupt, answer=_VERBS[number], foil=_VERBS[other])

    return draw


TASK = Task(
    name="agreement",
    says="Does the verb agree with its subject, whatever noun stands between them?",
    source="after Linzen et al. 2016, arXiv 1611.01368",
    example="The keys near the cabinet → are, not is",
    drawer=_drawer,
    words=_WORDS,
    needs={"noun": 2, "verb": 1},
)
