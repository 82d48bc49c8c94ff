"""Capitals of countries: a fact that the model must know.

`The capital of France is the city of` is followed by ` Paris`. The corrupt text asks about another
country, whose capital is the foil.
"""

from collections.abc import Callable
from random import Random

from transformers import PreTrainedTokenizerBase

from tl_entity.tasks.shipped.task import Task, TextPair, Words

_FORMS = (
    "The capital of {country} is the city of",
    "Last year we visited {country} and its capital, the city of",
    "The government of {country} sits in its capital, the city of",
)

_WORDS = {
    "country": [
        ("France", "Paris"),
        ("Germany", "Berlin"),
        ("England", "London"),
        ("Italy", "Rome"),
        ("Spain", "Madrid"),
        ("Portugal", "Lisbon"),
        ("Greece", "Athens"),
        ("Russia", "Moscow"),
        ("Japan", "Tokyo"),
        ("China", "Beijing"),
        ("Egypt", "Cairo"),
        ("Ireland", "Dublin"),
        ("Scotland", "Edinburgh"),
        ("Austria", "Vienna"),
        ("Hungary", "Budapest"),
        ("Poland", "Warsaw"),
        ("Sweden", "Stockholm"),
        ("Norway", "Oslo"),
        ("Denmark", "Copenhagen"),
        ("Finland", "Helsinki"),
        ("Belgium", "Brussels"),
        ("Canada", "Ottawa"),
        ("Cuba", "Havana"),
        ("Peru", "Lima"),
        ("Chile", "Santiago"),
        ("Turkey", "Ankara"),
        ("Iran", "Tehran"),
        ("Iraq", "Baghdad"),
        ("Syria", "Damascus"),
        ("Lebanon", "Beirut"),
        ("Kenya", "Nairobi"),
        ("Thailand", "Bangkok"),
        ("Taiwan", "Taipei"),
        ("Ukraine", "Kiev"),
        ("Afghanistan", "Kabul"),
        ("Indonesia", "Jakarta"),
        ("Serbia", "Belgrade"),
        ("Bulgaria", "Sofia"),
        ("Romania", "Bucharest"),
        ("Libya", "Tripoli"),
    ],
}


def _drawer(tokenizer: PreTrainedTokenizerBase, words: Words) -> Callable[[Random], TextPair]:
    countries = list(words["country"])

    def draw(random: Random) -> TextPair:
        (country, capital), (other, foil) = random.sample(countries, 2)
        form = random.choice(_FORMS)
        clean, corrupt = (form.format(country=f"[[country|{name}]]") for name in (country, other))
        return TextPair(clean, corrupt, answer=capital, foil=foil)

    return draw


TASK = Task(
    name="capitals",
    says="What is the capital of a country?",
    source="facts of common knowledge, as in Meng et al. 2022, arXiv 2202.05262",
    example="The capital of France is the city of → Paris, not the capital of another country",
    drawer=_drawer,
    words=_WORDS,
    needs={"country": 2},
)
