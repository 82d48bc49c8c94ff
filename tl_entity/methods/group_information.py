"""What groups of nodes attend to, and what their outputs carry from one prompt to another."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Head, Node
from tl_entity.hooks.edges import corrupt_senders
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.hooks.vocabulary import check_pairs, check_prompts
from tl_entity.methods.dcm import learn_mask
from tl_entity.methods.edges import check_nodes
from tl_entity.runs.runner import BATCH_SIZE
from tl_entity.stats import Interval, wilson_interval
from tl_entity.tasks.aligned import AlignedPairs
from tl_entity.tasks.batches import PairBatch, PromptBatch

Way = Literal["read", "found"]
"""Which token takes whose output, where a prompt has several tokens of a role. "read": the token
asked about takes that of the counterfactual's token asked about, as what it says is read there.
"found": the token that the counterfactual asks about takes that of the place which the base asks
about, as it is found by what it says."""

FIRST_TOKEN = "first token"
"""Names the prompt's first token among what is attended to."""


class Patched(NamedTuple):
    """How often nodes' outputs, taken from the counterfactual, bring the target.

    Attributes:
        desideratum: what kind of pairs.
        way: which token takes whose output.
        correct: pairs answered with the target.
        n_pairs: how many there are.
    """

    desideratum: str
    way: Way
    correct: int
    n_pairs: int

    @property
    def share(self) -> float:
        """Share of the pairs answered with the target."""
        return self.correct / self.n_pairs

    @property
    def interval(self) -> Interval:
        """Wilson's 95 % interval of that share."""
        return wilson_interval(self.correct, self.n_pairs)


@checked
@torch.no_grad()
def patch_nodes(
    model: Model,
    draws: Mapping[str, PairBatch],
    nodes: Sequence[Node],
    *,
    batch_size: int = BATCH_SIZE,
) -> tuple[Patched, ...]:
    """Answer base prompts with nodes' outputs taken from the counterfactuals, at all tokens of
    their roles, one kind of pairs after another; by plain runs.

    Args:
        model: the model.
        draws: pairs of each desideratum, by name. Where prompts have several tokens of a role, and
            say by a named position that knows it which of them is asked about, tokens are matched
            in both ways of `Way`; otherwise the first goes with the first.
        nodes: heads or MLPs at roles; none to see what is answered by itself.
        batch_size: pairs run together.

    Raises:
        InputError: if the model has no such node, there are no pairs, the prompts of a pair have
            unequally many tokens of a role, or a token is unknown to the model.
    """
    check_nodes(model, nodes)
    found: list[Patched] = []
    for name, pairs in draws.items():
        check_pairs(model, pairs)
        for way, aligned in _ways(pairs.to(model.cfg.device or "cpu"), nodes).items():
            correct = 0
            for start in range(0, len(pairs), batch_size):
                some = aligned[start : start + batch_size]
                hooks = corrupt_senders(model, some, nodes)
                chosen = answer_logits(model, some.clean, hooks).argmax(-1)
                correct += int((chosen == some.pairs.targets.to(chosen)).sum())
            found.append(Patched(name, way, correct, len(pairs)))
    return tuple(found)


def _ways(pairs: PairBatch, nodes: Sequence[Node]) -> dict[Way, AlignedPairs]:
    """The pairs with tokens matched in each way that makes a difference for these nodes."""
    several = {node.role for node in nodes if bool((pairs.clean.where(node.role).sum(1) > 1).any())}
    places = [_place_asked(prompts) for prompts in (pairs.clean, pairs.corrupt)]
    base, counterfactual = places
    if not several or base is None or counterfactual is None:
        return {"read": AlignedPairs(pairs)}
    if any(not torch.equal(pairs.clean.where(role).sum(1).cpu(), base[1]) for role in several):
        return {"read": AlignedPairs(pairs)}
    moved = counterfactual[0] - base[0]
    # `AlignedPairs` moves by one more than it is told, so that no token keeps its place.
    return {
        "read": AlignedPairs(pairs, (moved - 1) % base[1]),
        "found": AlignedPairs(pairs, (-moved - 1) % base[1]),
    }


def _place_asked(
    prompts: PromptBatch,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]] | None:
    """The number of the token asked about among those of its role, and how many these are."""
    role_of = prompts.roles
    for name in prompts.knowing:
        if role_of is None or name not in prompts.positions:
            continue
        at = prompts.position(name)[:, None]
        same = role_of == role_of.gather(1, at)
        number = same.cumsum(1).gather(1, at).squeeze(1) - 1
        return number.cpu(), same.sum(1).cpu()
    return None


@checked
@torch.no_grad()
def attention_by_role(
    model: Model, prompts: PromptBatch, nodes: Sequence[Node], *, batch_size: int = BATCH_SIZE
) -> dict[str, float]:
    """What some nodes attend to: the mean weight from their tokens on those of each role, the
    prompt's first token apart. MLPs attend to nothing.

    Raises:
        InputError: if the model has no such head, or the prompts no roles of these names.
    """
    heads = [node for node in nodes if node.head is not None]
    check_nodes(model, heads)
    check_prompts(model, prompts)
    if prompts.roles is None:
        raise InputError("What is attended to goes by role, and the prompts have no roles.")
    names = [*prompts.role_names, FIRST_TOKEN]
    total, n_tokens = torch.zeros(len(names), dtype=torch.float64), 0
    points: dict[str, str | None] = {hook_point("pattern", n.layer): None for n in heads}
    for chunk in prompts.to(model.cfg.device or "cpu").chunks(batch_size) if heads else ():
        cache = record(model, chunk, points)
        assert chunk.roles is not None  # as the prompts have them
        column = chunk.roles.cpu().clone()
        column[torch.arange(len(chunk)), chunk.mask.int().argmax(1).cpu()] = len(names) - 1
        is_of = torch.nn.functional.one_hot(column.clamp(min=0), len(names)).double()
        is_of[~chunk.mask.cpu()] = 0
        for node in heads:
            pattern = cache[hook_point("pattern", node.layer)][:, node.head].double().cpu()
            rows, at = chunk.where(node.role).cpu().nonzero().unbind(1)
            total += torch.einsum("tk,tkr->r", pattern[rows, at], is_of[rows])
            n_tokens += len(rows)
    shares = (total / max(n_tokens, 1)).tolist()
    return {name: share for name, share in zip(names, shares, strict=True) if share > 0}


@checked
def selected_nodes(
    model: Model, draws: Mapping[str, PairBatch], nodes: Sequence[Node]
) -> dict[str, tuple[Node, ...]]:
    """The heads among some nodes that a trained mask takes from the counterfactual, for each
    desideratum: `learn_mask` with all of a role's heads as candidates. A role of several tokens is
    looked at where the token asked about is named; where it is not, its nodes are left out.

    Raises:
        InputError: as `learn_mask`.
    """
    found: dict[str, tuple[Node, ...]] = {}
    for name, pairs in draws.items():
        selected: list[Node] = []
        for role in dict.fromkeys(node.role for node in nodes):
            heads = [
                Head(node.layer, node.head)
                for node in nodes
                if node.role == role and node.head is not None
            ]
            position = _position_of(pairs, role)
            if heads and position is not None:
                mask = learn_mask(model, pairs, heads, position=position)
                selected += [Node(head.layer, head.head, role) for head in mask.selected]
        found[name] = tuple(selected)
    return found


def _position_of(pairs: PairBatch, role: str) -> str | None:
    """A named position that is one token of this role in both prompts of every pair."""
    for name in (role, *pairs.clean.knowing):
        sides = (pairs.clean, pairs.corrupt)
        if all(_is_one_of(prompts, name, role) for prompts in sides):
            return name
    return None


def _is_one_of(prompts: PromptBatch, name: str, role: str) -> bool:
    if name not in (*prompts.positions, *prompts.role_names):
        return False
    at = prompts.where(name)
    return bool((at.sum(1) == 1).all()) and not bool((at & ~prompts.where(role)).any())
