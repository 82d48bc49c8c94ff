"""Activation patching at every layer and token (Meng et al. 2022; Wang et al. 2023): where does the
answer depend on what one prompt of a pair has and the other has not?"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Unpack

from tl_entity._model import Model
from tl_entity._typing import checked
from tl_entity.errors import InputError
from tl_entity.exact.blocks import unembed
from tl_entity.exact.grid import Over as Over
from tl_entity.exact.grid import patched_resid
from tl_entity.exact.memory import prompts_within
from tl_entity.hooks.edits import ReplaceHeads, ReplaceToken
from tl_entity.hooks.points import hook_point
from tl_entity.hooks.run import answer_logits, record
from tl_entity.hooks.vocabulary import check_metric
from tl_entity.methods.gains import scored_pairs
from tl_entity.metrics import LOG_PROBABILITY, LOGIT_DIFFERENCE, Metric, check_values
from tl_entity.runs.runner import BATCH_SIZE, Runner, RunSettings
from tl_entity.scores import Scores
from tl_entity.tasks.batches import PairBatch, PromptBatch

Into = Literal["clean", "corrupt"]
"""The prompts that are run; the other one's activations are put in."""


@checked
@torch.no_grad()
def patch_grid(
    model: Model,
    pairs: PairBatch,
    over: Over = "resid_pre",
    *,
    into: Into = "clean",
    tokens: Sequence[str] | None = None,
    metric: Metric | None = None,
    **how: Unpack[RunSettings],
) -> Scores:
    """Patch one activation at one token after another, and score the answer.

    One prompt of each pair is run, with the activation at one layer and token taken from the other
    prompt at the same token; all else is recomputed. A score is what the metric changes by: into
    the clean prompt, far below zero where the answer needs what the corrupt prompt has not; into
    the corrupt prompt, far above zero where that alone brings the answer back.

    The scores' axes are layer and token, or layer, head and token for `z`; `Scores.at` takes a part
    to be drawn, such as `scores.at(head=3)`.

    Args:
        model: the model.
        pairs: clean and corrupt prompts; targets, and foils if there are any, are scored in both.
        over: "resid_pre", the residual stream ahead of a layer; "attn_out" or "mlp_out", what a
            layer's attention or MLP writes; "z", the output of each head by itself.
        into: which prompt of a pair is run.
        tokens: named positions of one token each; every token if left out, for pairs whose prompts
            all have equally many.
        metric: how runs are scored; the logit difference if the pairs have foils, the log
            probability of the target if not.
        how: engine, batch_size, memory, progress, ranks or runner: see `Runner`. "exact" recomputes
            only the layers from the patch up and the tokens from it on; "hooks" is a plain run of
            the whole model for every patch. One patch in one prompt is a run.

    Raises:
        InputError: if prompts have unequally many tokens and none are named, a named position is
            not there or no single token, the metric lacks what it needs, the model does not know
            a token or has hooks attached to it, or the exact engine does not fit the model.
        NotFiniteError: if weights, activations or scores are NaN or infinite, naming where.
    """
    pairs = scored_pairs(model, pairs)
    if metric is None:
        metric = LOG_PROBABILITY if pairs.foils is None else LOGIT_DIFFERENCE
    check_metric(model, metric, pairs)
    runner, chosen = Runner.of(**how), metric
    places = _Places.of(pairs, tokens)
    run_patches = runner.choose(exact=_exact, hooks=_with_hooks)

    def compute(chunk: _Placed) -> tuple[Tensor, ...]:
        run, source = chunk.pairs.clean, chunk.pairs.corrupt
        at = (chunk.places.clean, chunk.places.corrupt)
        if into == "corrupt":
            (run, source), at = (source, run), (at[1], at[0])
        asked = _Asked(chunk.pairs, run, source, over, at, chosen)
        values, patched = run_patches(model, asked, runner)
        return values, patched

    n_pos = max(some.tokens.shape[1] for some in (pairs.clean, pairs.corrupt))
    fits = prompts_within(model.cfg, n_pos, runner.budget(model))
    size = min(runner.batch_size or BATCH_SIZE, fits)
    clean, patched = runner.over(_Placed(pairs, places), size, compute, model)
    check_values(metric, clean, " of the runs without a patch")
    check_values(metric, patched, " by layer, token and pair")
    change = metric.change(patched, clean)
    layers = tuple(map(str, range(model.cfg.n_layers)))
    axes = {"layer": layers, "token": _names(model, getattr(pairs, into), tokens)}
    if over == "z":
        heads = tuple(map(str, range(model.cfg.n_heads)))
        axes = {"layer": layers, "head": heads, "token": axes["token"]}
    else:
        change = change[:, 0]
    other = "corrupt" if into == "clean" else "clean"
    return Scores(
        change,
        axes,
        metric=metric.name,
        sign=-1 if into == "clean" else 1,
        about=f"{over} of the {other} prompts patched into the {into} ones",
    )


class _Places(NamedTuple):
    """The tokens of a grid, in both prompts of each pair."""

    clean: Int[Tensor, "token batch"]
    corrupt: Int[Tensor, "token batch"]

    @classmethod
    def of(cls, pairs: PairBatch, names: Sequence[str] | None) -> "_Places":
        both = (pairs.clean, pairs.corrupt)
        if names is not None:
            if not names or len(set(names)) < len(names):
                raise InputError("Name each token of the grid once, and at least one.")
            return cls(*(torch.stack([some.position(name) for name in names]) for some in both))
        lengths = torch.stack([some.mask.sum(1) for some in both])
        if bool((lengths != lengths[0, 0]).any()):
            raise InputError(
                f"The prompts have {int(lengths.min())} to {int(lengths.max())} tokens, so their "
                "tokens can't be put side by side; name some positions (tokens=[...])."
            )
        order = torch.arange(int(lengths[0, 0]), device=lengths.device)
        first = [some.mask.long().argmax(1) for some in both]
        return cls(*(order[:, None] + begin for begin in first))


class _Placed(NamedTuple):
    """Pairs with the tokens of a grid; cut as the pairs are."""

    pairs: PairBatch
    places: _Places

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, int):
            return tuple(self)[rows]
        return _Placed(self.pairs[rows], _Places(*(some[:, rows] for some in self.places)))


class _Asked(NamedTuple):
    """What is patched into some prompts.

    Attributes:
        pairs: the pairs, by which runs are scored.
        run: the prompts that are run.
        source: those whose activations are put in.
        over: which activations.
        at: the tokens, in the prompts run and in the source.
        metric: how runs are scored.
    """

    pairs: PairBatch
    run: PromptBatch
    source: PromptBatch
    over: Over
    at: tuple[Int[Tensor, "token batch"], Int[Tensor, "token batch"]]
    metric: Metric

    def recorded(self, model: Model) -> dict[str, Tensor]:
        """The source's activations."""
        layers = range(model.cfg.n_layers)
        return record(model, self.source, {hook_point(self.over, n): None for n in layers})


Values = tuple[Float[Tensor, " batch"], Float[Tensor, "layer part token batch"]]
"""The metric in the run as it is, and with each patch."""


def _exact(model: Model, asked: _Asked, runner: Runner) -> Values:
    source = asked.recorded(model)
    memory = runner.budget(model)
    final, patched = patched_resid(model, asked.run, asked.over, source, asked.at, memory=memory)

    def scored(resid: Tensor) -> Tensor:
        return asked.metric.of_logits(unembed(model, resid), asked.pairs)

    values = torch.stack([scored(resid) for resid in patched.flatten(0, 2)])
    runner.progress(values.numel())
    return scored(final), values.unflatten(0, patched.shape[:3])


def _with_hooks(model: Model, asked: _Asked, runner: Runner) -> Values:
    source = asked.recorded(model)
    here, there = asked.at
    parts = range(model.cfg.n_heads) if asked.over == "z" else range(1)
    every = torch.arange(len(asked.run))

    def scored(hooks: Sequence[tuple[str, Any]]) -> Tensor:
        return asked.metric.of_logits(answer_logits(model, asked.run, hooks), asked.pairs)

    found = []
    for layer in range(model.cfg.n_layers):
        name = hook_point(asked.over, layer)
        for part in parts:
            for to, of in zip(here, there, strict=True):
                rows = every.to(source[name].device)
                values = source[name][rows, of.to(rows.device)]
                edit: Any = ReplaceToken(to, values) if asked.over != "z" else None
                if edit is None:
                    edit = ReplaceHeads(to, torch.tensor([part]), values[:, [part]])
                found.append(scored([(name, edit)]))
                runner.progress(len(asked.run))
    shape = (model.cfg.n_layers, len(parts), len(here))
    return scored([]), torch.stack(found).unflatten(0, shape)


def _names(model: Model, prompts: PromptBatch, names: Sequence[str] | None) -> tuple[str, ...]:
    """What tokens are called: by position, or by place and word, or by place and role where prompts
    have different words there."""
    if names is not None:
        return tuple(names)
    tokens = torch.stack(
        [row[mask] for row, mask in zip(prompts.tokens, prompts.mask, strict=True)]
    )
    found: list[str] = []
    for index, column in enumerate(tokens.T):
        called = ""
        if bool((column == column[0]).all()):
            called = _word(model, int(column[0]))
        elif prompts.roles is not None:
            roles = prompts.roles[prompts.mask].view(tokens.shape)[:, index]
            if bool((roles == roles[0]).all()):
                called = f"({prompts.role_names[int(roles[0])]})"
        found.append(f"{index} {called}".rstrip())
    return tuple(found)


def _word(model: Model, token: int) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    return "" if tokenizer is None else str(tokenizer.decode([token])).strip()
