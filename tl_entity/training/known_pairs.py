"""Pairs of models whose difference is known, made from the pair that ships by exact surgery, or by
hand.

What changed between the two is written into their weights, so that whoever claims to say what a
fine-tune changed can be held against it. Nothing is trained. Every pair has its two models in the
same shape, with the tokenizer of the pair that ships, and answers box prompts.

One kind can't be made of these weights by exact surgery: the same heads, come to carry other
information. Its two models are written by hand (`tl_entity.training.handmade`).
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.hooks.run import answer_logits
from tl_entity.models.load import load_model
from tl_entity.tasks.boxes import box_prompts
from tl_entity.training.guidance import PLANTED
from tl_entity.training.handmade import (
    N_HEADS,
    N_LAYERS,
    Code,
    handmade_circuit,
    handmade_model,
)
from tl_entity.training.surgery import (
    double_heads,
    insert_idle_layer,
    queries_of_a_key,
    reorder_heads,
    rewire_queries,
    rotate_heads,
    scale_queries,
)

Holds = Literal["yes", "partly", "no"]


@dataclass(frozen=True)
class Truth:
    """What is so of a pair, whatever a method says of it.

    Attributes:
        better: whether the fine-tune answers more box prompts; "no" also where it answers fewer,
            None where the change may do either.
        same_nodes: whether the heads that do the task in the base do it in the fine-tune.
        same_edges: whether they pass it to each other as before.
        changed: the weights that differ, in a word: "nothing", "queries", "heads", "edges", "MLPs",
            "unembedding".
        base_heads: the planted heads of the base.
        tuned_heads: those of the fine-tune.
        same_information: whether what does the task carries the same information, by whichever
            heads.
    """

    better: Holds | None
    same_nodes: Holds
    same_edges: Holds
    changed: str
    base_heads: Circuit
    tuned_heads: Circuit
    same_information: Holds = "yes"


@dataclass(frozen=True)
class KnownPair:
    """Two models and the truth about them.

    Attributes:
        kind: one of `KINDS`.
        seed: what was drawn: the model that it starts from, and sizes and places of the change.
        base: the model before.
        tuned: the model after.
        truth: what is so.
    """

    kind: str
    seed: int
    base: HookedTransformer
    tuned: HookedTransformer
    truth: Truth


@checked
def known_pair(kind: str, seed: int = 0) -> KnownPair:
    """A pair of a kind.

    Args:
        kind: one of `KINDS`.
        seed: another seed is another pair of this kind.

    Raises:
        InputError: if there is no such kind.
    """
    if kind not in KINDS:
        raise InputError(f"There is no kind of pair {kind!r}; there are {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(seed)
    base, tuned, truth = _MAKERS[kind](generator)
    return KnownPair(kind, seed, base, tuned, truth)


KINDS: Mapping[str, str] = {
    "rewritten": "the same function in other weights: another basis inside every head",
    "noise": "noise on every weight, far below any effect",
    "stronger": "the same heads and edges: planted heads look more sharply",
    "moved": "the same function by other heads: planted heads change places with idle ones",
    "lower": "the same function by heads one layer lower: the idle layer stands above, not below",
    "rewired": "the same heads by other edges: value fetchers read the other position transmitter",
    "mlps": "only MLPs changed: noise on them is gone",
    "worse": "the same heads and edges, but planted heads look less sharply",
    "redundant": "a second mechanism beside the old: copies of all heads take over half",
    "form": "the same ability, but another token no longer comes ahead of the answer",
    "information": "the same heads and edges carry the label of the box, not its position, or the "
    "other way round; and look more sharply",
}
"""The kinds of pairs, and what differs in each."""


def _start(generator: torch.Generator) -> HookedTransformer:
    """The model that a pair of like ability starts from: either of the pair that ships."""
    return load_model(("default-base", "default-tuned")[_draw(generator, 2)])


def _rewritten(generator: torch.Generator) -> "_Made":
    base = _start(generator)
    return base, rotate_heads(base, generator), _truth("no", "yes", "yes", "nothing")


def _noise(generator: torch.Generator) -> "_Made":
    base = _start(generator)
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        size = 1e-5 * parameter.data.std(correction=0)
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return base, tuned, _truth("no", "yes", "yes", "nothing")


def _stronger(generator: torch.Generator) -> "_Made":
    tuned = load_model("default-tuned")
    factor = 0.3 + 0.2 * float(torch.rand((), generator=generator))
    base = scale_queries(tuned, _planted(), factor)
    return base, tuned, _truth("yes", "yes", "yes", "queries")


def _worse(generator: torch.Generator) -> "_Made":
    tuned, base, _ = _stronger(generator)
    return base, tuned, _truth("no", "yes", "yes", "queries")


def _moved(generator: torch.Generator) -> "_Made":
    base, tuned, _ = _stronger(generator)
    each = queries_of_a_key(tuned)
    orders: list[list[int]] = []
    for layer in range(tuned.cfg.n_layers):
        planted = {head.head for head in _planted() if head.layer == layer}
        order = list(range(tuned.cfg.n_heads))
        while planted & {place for place, head in enumerate(order) if head in planted}:
            keys = torch.randperm(tuned.cfg.n_heads // each, generator=generator).tolist()
            order = [
                key * each + within
                for key in keys
                for within in torch.randperm(each, generator=generator).tolist()
            ]
        orders.append(order)
    truth = _truth("yes", "no", "no", "heads")
    moved = Circuit.entity_tracking(
        **{
            group.name: [
                Head(head.layer, orders[head.layer].index(head.head)) for head in group.heads
            ]
            for group in PLANTED.groups
        }
    )
    return base, reorder_heads(tuned, orders), dataclasses.replace(truth, tuned_heads=moved)


def _lower(generator: torch.Generator) -> "_Made":
    start = _start(generator)
    like = _draw(generator, start.cfg.n_layers)
    base = insert_idle_layer(start, 0, like)
    tuned = insert_idle_layer(start, start.cfg.n_layers, like)
    above = Circuit.entity_tracking(
        **{group.name: [Head(n + 1, h) for n, h in group.heads] for group in PLANTED.groups}
    )
    truth = _truth("no", "no", "no", "heads")
    return base, tuned, dataclasses.replace(truth, base_heads=above)


def _rewired(generator: torch.Generator) -> "_Made":
    start = _start(generator)
    readers, writers = PLANTED["value_fetcher"], PLANTED["pos_transmitter"]
    straight = bool(_draw(generator, 2))
    times = 1.7 + 0.3 * float(torch.rand((), generator=generator))
    pair = [
        rewire_queries(
            start,
            {
                reader: {
                    writer: times if (i == j) == (straight != turned) else 2 - times
                    for j, writer in enumerate(writers)
                }
                for i, reader in enumerate(readers)
            },
        )
        for turned in (False, True)
    ]
    return pair[0], pair[1], _truth(None, "yes", "no", "edges")


def _mlps(generator: torch.Generator) -> "_Made":
    tuned = load_model("default-tuned")
    base = copy.deepcopy(tuned)
    size = 0.5 + 0.1 * float(torch.rand((), generator=generator))
    for block in base.blocks:
        for name in ("W_in", "W_gate", "W_out"):
            weight = getattr(block.mlp, name).data
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return base, tuned, _truth("yes", "yes", "yes", "MLPs")


def _redundant(generator: torch.Generator) -> "_Made":
    start = _start(generator)
    shares = 0.4 + 0.2 * torch.rand(start.cfg.n_layers, generator=generator)
    base = double_heads(start, torch.zeros(start.cfg.n_layers))
    n_heads = start.cfg.n_heads
    both = Circuit.entity_tracking(
        **{
            group.name: [*group.heads, *(Head(n, h + n_heads) for n, h in group.heads)]
            for group in PLANTED.groups
        }
    )
    truth = _truth("no", "partly", "partly", "heads")
    return base, double_heads(start, shares), dataclasses.replace(truth, tuned_heads=both)


def _form(generator: torch.Generator) -> "_Made":
    tuned = load_model("default-tuned")
    tokenizer = tuned.tokenizer
    assert tokenizer is not None
    prompts = box_prompts(tokenizer, 200, n_boxes=7, seed=_draw(generator, 2**31))
    logits = answer_logits(tuned, prompts)
    answers = logits.gather(1, prompts.answers[:, None])[:, 0]
    token = int(prompts.tokens[0, prompts.positions["last"][0]])
    base = copy.deepcopy(tuned)
    share = 0.3 + 0.3 * float(torch.rand((), generator=generator))
    base.unembed.b_U.data[token] += float(torch.quantile(answers - logits[:, token], share))
    return base, tuned, _truth("yes", "yes", "yes", "unembedding")


def _information(generator: torch.Generator) -> "_Made":
    tokenizer = load_model("default-base").tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    places = [torch.randperm(N_HEADS, generator=generator).tolist() for _ in range(N_LAYERS)]
    codes: list[Code] = ["position", "label"]
    first, seed = _draw(generator, 2), _draw(generator, 2**31)
    sharpness = 1 + 0.4 * float(torch.rand((), generator=generator))
    base = handmade_model(tokenizer, codes[first], sharpness, places, seed)
    tuned = handmade_model(tokenizer, codes[1 - first], 6 * sharpness, places, seed)
    heads = handmade_circuit(places)
    return base, tuned, Truth("yes", "yes", "yes", "heads", heads, heads, "no")


_Made = tuple[HookedTransformer, HookedTransformer, Truth]

_MAKERS: Mapping[str, Callable[[torch.Generator], _Made]] = {
    "rewritten": _rewritten,
    "noise": _noise,
    "stronger": _stronger,
    "moved": _moved,
    "lower": _lower,
    "rewired": _rewired,
    "mlps": _mlps,
    "worse": _worse,
    "redundant": _redundant,
    "form": _form,
    "information": _information,
}


def _truth(better: Holds | None, same_nodes: Holds, same_edges: Holds, changed: str) -> Truth:
    return Truth(better, same_nodes, same_edges, changed, PLANTED, PLANTED)


def _planted() -> list[Head]:
    return [head for group in PLANTED.groups for head in group.heads]


def _draw(generator: torch.Generator, n: int) -> int:
    drawn: Int[Tensor, ""] = torch.randint(n, (), generator=generator)
    return int(drawn)
