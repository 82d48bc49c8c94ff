"""The experiments of the main job: each a small step from a model to a result."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.hooks.ablations import AblationKind
from tl_entity.methods.attention import AttentionSummary, summarize_attention
from tl_entity.methods.circuits import (
    Evaluation,
    Faithfulness,
    evaluate_circuits,
    random_circuits,
)
from tl_entity.methods.discovery import Discovery, discover_circuit
from tl_entity.methods.path_patching import HeadScores, path_patch
from tl_entity.metrics import METRICS
from tl_entity.study.bench import Bench as Bench
from tl_entity.study.bench import Count as Count
from tl_entity.study.bench import Progress as Progress
from tl_entity.study.bench import own_tokenizer as own_tokenizer
from tl_entity.study.bench import silent as silent
from tl_entity.study.experiment_results import (
    AccuracyByBoxes,
    AccuracyOnTask,
    Alone,
    CircuitAttention,
    CircuitsAlone,
    KeptPairs,
)
from tl_entity.study.settings import FEWEST_PAIRS
from tl_entity.study.store import Step
from tl_entity.tasks.batches import PairBatch

ACCURACY, ON_TASK = Step(AccuracyByBoxes), Step(AccuracyOnTask)
PAIRS, SCORES = Step(KeptPairs), Step(HeadScores)
FAITHFULNESS, ATTENTION = Step(CircuitsAlone), Step(CircuitAttention)

PAIRS_KEPT, HEAD_PAIRS_KEPT = 8, 10_000
"""A stage of path patching is kept in parts of so many pairs at least, or so many heads times
pairs: minutes of work at most, which is what an interruption can cost."""

PAIRS_AGAIN = "pairs_again"
"""The purpose of the pairs that the base's circuit is found from a second time."""

TRIES = 4
"""At most so many times the wanted pairs are tried for ones whose prompt is answered right."""


def measure_accuracy(bench: Bench) -> AccuracyByBoxes | AccuracyOnTask:
    """Accuracy on prompts of the task; of one that comes in sizes, such as two boxes and more, on
    prompts of each."""
    if not bench.design.task.by_size:
        return _measure_accuracy_on_task(bench)
    s, sizes = bench.settings, bench.design.task.by_size
    seeds = {n: bench.seed("accuracy", n) for n in sizes}

    def compute() -> AccuracyByBoxes:
        found: dict[int, Evaluation] = {}
        with bench.progress(f"{bench.role}: accuracy", len(sizes) * s.prompts) as done:
            for n, draw in sizes.items():
                prompts = draw(bench.tokenizer, s.prompts, seeds[n], "testing")
                found[n] = bench.evaluate(prompts)
                done(s.prompts)
        return AccuracyByBoxes(found)

    return bench.step("accuracy", ACCURACY, {"prompts": s.prompts, "seeds": seeds}, compute)


def _measure_accuracy_on_task(bench: Bench) -> AccuracyOnTask:
    pairs = bench.pairs(bench.settings.prompts, bench.seed("accuracy"), "testing")

    def compute() -> AccuracyOnTask:
        with bench.progress(f"{bench.role}: accuracy", len(pairs)) as done:
            by_foil = bench.beats_foil(pairs) if bench.design.task.has_foils else None
            found = AccuracyOnTask(bench.evaluate(pairs.clean), by_foil)
            done(len(pairs))
        return found

    inputs = {"prompts": bench.settings.prompts, "seed": bench.seeds["accuracy"]}
    return bench.step("accuracy", ON_TASK, {**inputs, **bench.design.task.inputs}, compute)


def why_no_circuit(bench: Bench, accuracy: AccuracyByBoxes | AccuracyOnTask) -> str | None:
    """Why no circuit is looked for in a model that does no better than guessing; None if it does.

    Prompts answered right by luck would give scores, and the heads with the highest of them a
    circuit; it would be one of nothing.
    """
    s, task = bench.settings, bench.design.task
    if isinstance(accuracy, AccuracyOnTask):
        by_foil = bench.judged_by_foil and accuracy.beats_foil is not None
        found = accuracy.beats_foil if by_foil else accuracy.answered
        assert found is not None
        guessing = 0.5 if by_foil else task.guessing
        of, said = "", "guessing"
        advice = "more prompts or another model"
    else:
        found, guessing = accuracy.evaluations[s.boxes], task.guessing
        of, said = f"of {s.boxes} boxes ", f"naming one of the {s.boxes} objects at random"
        advice = "fewer boxes or more prompts"
    low, high = found.interval
    if low > guessing or s.all_pairs:
        return None
    return (
        f"it answers {found.accuracy:.3f} [{low:.3f}, {high:.3f}] of {len(found)} prompts "
        f"{of}right, and {said} would be {guessing:.3f}. There is no ability to be seen whose "
        f"circuit could be looked for; {advice} may show one, and --all-pairs looks for a circuit "
        "all the same"
    )


def draw_pairs(bench: Bench, *, which: str = "pairs") -> tuple[PairBatch, KeptPairs]:
    """Clean and corrupt prompts whose clean one the model answers right.

    A score is a relative change of the answer's probability. Where the model is sure of a wrong
    answer that probability is tiny and any change is many times its size, so a few such prompts
    would outweigh all others.

    Args:
        bench: the model.
        which: the purpose of the pairs; those of another purpose are others.

    Raises:
        InputError: if too few prompts are answered right.
    """
    s = bench.settings
    n_pairs = s.discovery_pairs
    tries = n_pairs if s.all_pairs else TRIES * n_pairs
    seed = bench.seed(which)
    pairs = bench.pairs(tries, seed, "finding")

    def compute() -> KeptPairs:
        kept: list[int] = []
        tried = 0
        with bench.progress(f"{bench.role}: prompts answered right", n_pairs) as done:
            for chunk in pairs.chunks(bench.batch_size):
                right = bench.answered(chunk) | s.all_pairs
                wanted = n_pairs - len(kept)
                found = [tried + index for index in right.nonzero().squeeze(1).tolist()][:wanted]
                kept += found
                done(len(found))
                if len(kept) == n_pairs:
                    # Those after the last one that was needed were not looked at.
                    tried = kept[-1] + 1
                    break
                tried += len(chunk)
        return KeptPairs(tried, torch.tensor(kept, dtype=torch.long), not s.all_pairs)

    inputs: dict[str, Any] = {"pairs": n_pairs, "seed": seed, "all": s.all_pairs}
    inputs |= bench.design.task.inputs
    if bench.judged_by_foil:
        inputs["right"] = "beats foil"
    drawn = bench.step(which, PAIRS, inputs, compute)
    if len(drawn.kept) < min(FEWEST_PAIRS, n_pairs):
        by_size = bench.design.task.by_size
        what, instead = ("", "give more pairs")
        if by_size:
            what, instead = f" of {s.boxes} boxes", "ask for fewer boxes"
        raise InputError(
            f"{s.models[bench.role]} answers only {len(drawn.kept)} of {drawn.tried} prompts"
            f"{what} right, too few to find its circuit from; {instead}, "
            "or take prompts it answers wrong as well (--all-pairs)."
        )
    return pairs[drawn.kept], drawn


def find_circuit(
    bench: Bench, pairs: PairBatch, drawn: KeptPairs, *, which: str = "pairs"
) -> Discovery:
    """Four-stage discovery, each stage kept as soon as it is done.

    Args:
        bench: the model.
        pairs: of `draw_pairs`.
        drawn: which pairs they are.
        which: their purpose.
    """
    s, recipe = bench.settings, bench.design.recipe
    assert recipe is not None
    stages = iter(recipe.stages)

    def score_stage(model: HookedTransformer, pairs: PairBatch, **how: Any) -> HeadScores:
        group = next(stages).group
        name = f"scores_{group}" if which == "pairs" else f"scores_{group}_{which}"
        asked: dict[str, Any] = {"pairs": s.discovery_pairs, "seed": bench.seeds[which]}
        asked |= bench.design.task.inputs
        asked |= {name: value for name, value in how.items() if name not in ("progress", "metric")}
        if "metric" in how:
            asked["metric"] = recipe.metric
        return _score_in_parts(bench, group, name, pairs, how, {**asked, "drawn": drawn})

    return discover_circuit(
        bench.model,
        pairs,
        sizes=recipe.sizes,
        receiver_sizes=recipe.receiver_sizes,
        stages=recipe.stages,
        overlaps=recipe.overlaps,
        metric=METRICS[recipe.metric],
        engine=s.engine,
        batch_size=s.batch_size,
        memory=s.memory_bytes,
        score_stage=score_stage,
    )


def _score_in_parts(
    bench: Bench,
    group: str,
    name: str,
    pairs: PairBatch,
    how: dict[str, Any],
    inputs: Mapping[str, Any],
) -> HeadScores:
    """One stage of path patching, kept in parts: no finished part of a long stage is done twice."""
    heads = bench.model.cfg.n_layers * bench.model.cfg.n_heads
    chunks = list(pairs.chunks(max(PAIRS_KEPT, HEAD_PAIRS_KEPT // heads)))
    parts: list[HeadScores] = []
    with ExitStack() as stack:
        bars: list[Callable[[int], object]] = []

        def count(runs: int) -> None:
            # Nothing is shown of a stage whose parts are all finished.
            if not bars:
                shown = bench.progress(f"{bench.role}: {group}", heads * len(pairs))
                bars.append(stack.enter_context(shown))
                bars[0](sum(part.per_example.numel() for part in parts))
            bars[0](runs)

        for number, chunk in enumerate(chunks):

            def compute(chunk: PairBatch = chunk) -> HeadScores:
                count(0)
                watched: dict[str, Any] = {**how, "progress": count}
                return path_patch(bench.model, chunk, **watched)

            of_part = f"{name}_part{number + 1}" if len(chunks) > 1 else name
            part_of = {"part": [number, len(chunk), len(chunks)]}
            parts.append(bench.step(of_part, SCORES, {**inputs, **part_of}, compute))
    return replace(
        parts[0],
        per_example=torch.cat([part.per_example for part in parts], -1),
        clean_values=torch.cat([part.clean_values for part in parts], -1),
    )


def find_circuit_again(bench: Bench) -> Discovery:
    """The model's circuit from other pairs: how much of a circuit is found twice."""
    pairs, drawn = draw_pairs(bench, which=PAIRS_AGAIN)
    return find_circuit(bench, pairs, drawn, which=PAIRS_AGAIN)


def measure_faithfulness(
    bench: Bench, circuit: Circuit, others: Mapping[str, Circuit]
) -> CircuitsAlone:
    """How much of the model's accuracy its circuit has alone, beside other circuits run in it.

    Args:
        bench: the model.
        circuit: found in it.
        others: circuits found elsewhere, such as the base's in the tuned model, by role.
    """
    s = bench.settings
    seeds = {what: bench.seed(what) for what in ("faithfulness", "ablation", "bootstrap", "random")}
    cfg = bench.model.cfg
    drawn = random_circuits(bench.model, circuit, s.random_circuits, seed=seeds["random"])
    every = [Head(n, h) for n in range(cfg.n_layers) for h in range(cfg.n_heads)]
    # Every head at the circuit's positions is a reference, not a bound: heads can hinder.
    alone = [circuit, dict.fromkeys(circuit.heads_at(), every), *others.values(), *drawn]
    kinds = bench.ablation_kinds
    prompts = bench.test_prompts()

    def under(kind: AblationKind, whole: Evaluation, done: Count) -> Alone:
        found = evaluate_circuits(
            bench.model,
            prompts,
            alone,
            ablation=bench.ablation(kind),
            progress=done,
            **bench.how,
        )
        n_others = 2 + len(others)
        own, every_head, *theirs = (Faithfulness.of(one, whole) for one in found[:n_others])
        of_others = dict(zip(others, theirs, strict=True))
        return Alone(own, every_head, of_others, tuple(found[n_others:]))

    def compute() -> CircuitsAlone:
        runs = (1 + len(kinds) * len(alone)) * len(prompts)
        with bench.progress(f"{bench.role}: faithfulness", runs) as done:
            whole = bench.evaluate(prompts)
            done(len(prompts))
            found: dict[AblationKind, Alone] = {kind: under(kind, whole, done) for kind in kinds}
        return CircuitsAlone(found, tuple(drawn))

    asked = {**bench.tested_on, "seeds": seeds, "ablation": s.ablation}
    of_circuits = {"circuit": circuit, "others": others, "random": s.random_circuits}
    return bench.step("faithfulness", FAITHFULNESS, {**asked, **of_circuits}, compute)


def look_at_attention(bench: Bench, circuit: Circuit) -> CircuitAttention:
    """What each head of each group attends to, on prompts that discovery has not seen."""
    prompts = bench.test_prompts()

    def compute() -> CircuitAttention:
        found: dict[str, AttentionSummary] = {}
        with bench.progress(f"{bench.role}: attention", len(circuit.groups) * len(prompts)) as done:
            for group in circuit:
                found[group.name] = summarize_attention(
                    bench.model,
                    prompts,
                    group.heads,
                    from_position=group.position,
                    batch_size=bench.batch_size,
                )
                done(len(prompts))
        return CircuitAttention(found)

    return bench.step("attention", ATTENTION, {**bench.tested_on, "circuit": circuit}, compute)
