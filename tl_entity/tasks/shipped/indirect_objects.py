"""Indirect objects: which of two names is given something (Wang et al. 2022, arXiv 2211.00593).

`When Mary and John went to the store, John gave a drink to` is followed by ` Mary`. Either name may
be the repeated one, so `first` and `second` are blind to the answer; `indirect_object` and
`subject` stand at the same two names and know it. The corrupt text has three other names, of which
the third is none of the first two, so that it has no answer.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerBase

from tl_entity.tasks.shipped.task import Task, TextPair, Words

_FORMS = (
    "When {a} and {b} went to the {place}, {c} gave a {thing} to",
    "After {a} and {b} had arrived at the {place}, {c} handed a {thing} to",
    "While {a} and {b} were waiting at the {place}, {c} passed a {thing} to",
    "Yesterday {a} and {b} met at the {place}, and {c} brought a {thing} to",
)

_WORDS = {
    "name": [
        (name,)
        for name in (
            "Mary John Tom James Dan Martin Amy Scott Lisa Jack Kate Paul Anna Mark Laura Peter "
            "Sarah David Emma Michael Alice Robert Susan Henry Jane Adam Ruth Simon Helen Frank "
            "Julia Daniel Rachel Thomas Maria George Claire Kevin Linda Brian"
        ).split()
    ],
    "place": [
        (place,)
        for place in (
            "store park school garden station market library office beach hospital restaurant "
            "museum church kitchen bank hotel"
        ).split()
    ],
    "thing": [
        (thing,)
        for thing in (
            "drink book ring ball letter key present box bottle basket card ticket hat lamp map "
            "flower"
        ).split()
    ],
}


def _drawer(tokenizer: PreTrainedTokenizerBase, words: Words) -> Callable[[Random], TextPair]:
    names = [name for (name,) in words["name"]]

    def text(form: str, a: str, b: str, c: str, roles: tuple[str, str], **other: str) -> str:
        return form.format(
            a=f"[[first|[[{roles[0]}|{a}]]]]",
            b=f"[[second|[[{roles[1]}|{b}]]]]",
            c=f"[[repeated|{c}]]",
            **{name: f"[[{name}|{word}]]" for name, word in other.items()},
        )

    def draw(random: Random) -> TextPair:
        a, b, x, y, z = random.sample(names, 5)
        form = random.choice(_FORMS)
        (place,), (thing,) = (random.choice(list(words[some])) for some in ("place", "thing"))
        second_answers = random.random() < 0.5
        answer, foil = (b, a) if second_answers else (a, b)
        roles = ("subject", "indirect_object")
        roles = roles if second_answers else (roles[1], roles[0])
        return TextPair(
            clean=text(form, a, b, foil, roles, place=place, thing=thing),
            corrupt=text(form, x, y, z, roles, place=place, thing=thing),
            answer=answer,
            foil=foil,
        )

    return draw


TASK = Task(
    name="indirect_objects",
    says="Of two people one gives something to the other; who is it?",
    source="Wang et al. 2022, Interpretability in the Wild, arXiv 2211.00593",
    example="When Mary and John went to the store, John gave a drink to → Mary, not John",
    drawer=_drawer,
    words=_WORDS,
    needs={"name": 5, "place": 1, "thing": 1},
    knowing=("indirect_object", "subject"),
)
