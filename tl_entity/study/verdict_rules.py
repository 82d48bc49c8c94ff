"""The rules that the verdict's answers follow from, and how it writes numbers."""

import math

from tl_entity.methods.activation_patching import Carried
from tl_entity.methods.circuits import Evaluation, Faithfulness
from tl_entity.stats import Interval

SIGNIFICANT = 0.01
"""Circuits are said to share more than chance below this p-value."""

MOSTLY = 0.5
"""From this Jaccard index up, circuits are said to be mostly the same."""

AS_GOOD = 0.9
"""A circuit with this share of another's faithfulness is said to do as well."""

FAITHFUL = 0.8
"""From this faithfulness up, a circuit is said to be the mechanism. The base's published circuit
has 0.88 to 1.00 in the four published models (paper, accuracies of its circuit evaluation)."""

HALF_FAITHFUL = 0.5
"""Below this faithfulness more of the mechanism lies outside the circuit than in it."""

INCOMPLETE = 0.1
"""A circuit lacks something if it loses more than this accuracy more, or less, than the model by
the same heads; less than a tenth may be the ablation's doing."""

MOST_OF_GAIN = 0.5
"""A gain can be put down to one group only if this group brings at least this share of it: with
less, as much comes from elsewhere."""

RULES = (
    "The answers follow from the numbers by fixed rules, and what has to be beyond something is so "
    "with its whole interval. Heads are the same if the overlap is beyond that of circuits drawn "
    f"at random within their layers (p below {SIGNIFICANT:g}) and the Jaccard index, which has no "
    f"interval, is at least {MOSTLY:g}. They are not if neither is so and the base's circuit "
    f"found twice has an index of at least {MOSTLY:g}; where that has no higher an index than the "
    "two circuits, the data can't tell. A circuit is the "
    f"mechanism if its faithfulness is at least {FAITHFUL:g} and beyond every random circuit, and "
    f"it nowhere loses {INCOMPLETE:g} more or less than the model by the same heads; it is not if "
    f"its faithfulness is below {HALF_FAITHFUL:g}; of two models the weaker answer counts. A "
    "circuit does as well as another if it is beyond every random circuit and the difference can't "
    f"be more than {1 - AS_GOOD:.0%} of the other's faithfulness. A group carries the kind of "
    "information that brings its target more often than every other kind and than the run with "
    "nothing patched. The gain is put down to a group if it brings more than every other group and "
    f"at least {MOST_OF_GAIN:g} of the gain, costs as much when the base model's heads are put "
    "into the fine-tuned model, and brings more than the control model's heads do, if there is "
    "one. Otherwise the answer is partly, or the data can't tell."
)
"""How the answers are come by, for the page that shows them."""

BETTER = "Is the fine-tuned model better?"
SAME_HEADS = "Are the same heads at work?"
MECHANISM = "Is the circuit the mechanism?"
CIRCUIT_WORKS = "Does the base model's circuit do as well in the fine-tuned model as its own?"
SAME_FUNCTION = "Do the groups carry the same information?"
GAIN = "Can the gain be put down to one group?"


def share(found: Evaluation | Carried) -> str:
    """An accuracy with its interval."""
    return f"{found.accuracy:.3f} {interval_text(found.interval)}"


def ratio(found: Faithfulness) -> str:
    """A faithfulness with its interval."""
    return f"{number(found.value)} {interval_text(found.interval)}"


def number(value: float) -> str:
    """A share to two places."""
    return "an undefined share" if math.isnan(value) else f"{value:.2f}"


def ends(interval: Interval) -> Interval:
    """Both ends; NaN, which is neither above nor below anything, for an interval that is not
    defined."""
    undefined = math.isnan(interval.low) or math.isnan(interval.high)
    return Interval(math.nan, math.nan) if undefined else interval


def interval_text(interval: Interval) -> str:
    """An interval to three places."""
    low, high = ends(interval)
    return "[not defined]" if math.isnan(low) else f"[{low:.3f}, {high:.3f}]"
