"""The experiments of the main job: each a small step from a model to a result."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.methods.ablations import make_ablation
from tl_entity.methods.attention import AttentionSummary, summarize_attention
from tl_entity.methods.circuits import (
    BATCH_SIZE,
    Evaluation,
    Faithfulness,
    evaluate,
    evaluate_circuits,
    random_circuits,
)
from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES, Discovery, discover_circuit
from tl_entity.methods.path_patching import HeadScores, path_patch
from tl_entity.study.experiment_results import (
    AccuracyByBoxes,
    Alone,
    CircuitAttention,
    CircuitsAlone,
    KeptPairs,
)
from tl_entity.study.settings import FEWEST_PAIRS, Settings, stream_seed
from tl_entity.study.store import Found, Step, Store
from tl_entity.tasks.batches import PairBatch, PromptBatch
from tl_entity.tasks.boxes import box_prompts
from tl_entity.tasks.pairs import discovery_pairs

ACCURACY, PAIRS, SCORES = Step(AccuracyByBoxes), Step(KeptPairs), Step(HeadScores)
FAITHFULNESS, ATTENTION = Step(CircuitsAlone), Step(CircuitAttention)

PAIRS_KEPT, HEAD_PAIRS_KEPT = 8, 10_000
"""A stage of path patching is kept in parts of so many pairs at least, or so many heads times
pairs: minutes of work at most, which is what an interruption can cost."""

PAIRS_AGAIN = "pairs_again"
"""The purpose of the pairs that the base's circuit is found from a second time."""

SMALL_MODEL, SMALL_MODEL_BATCH = 10_000_000, 128
"""Models with fewer parameters are run on more prompts at a time: there, the time goes into calls,
not into arithmetic."""

TRIES = 4
"""At most so many times the wanted pairs are tried for ones whose prompt is answered right."""


class Count(Protocol):
    """Called with how many more runs are done and, where there is one, a note on how they went."""

    def __call__(self, runs: int, note: str = "", /) -> object: ...


Progress = Callable[[str, int], AbstractContextManager[Count]]
"""Called with what is done and how many runs it takes; gives what to call with those done."""


def silent(what: str, total: int) -> AbstractContextManager[Count]:
    """No progress shown."""
    return nullcontext(lambda runs, note="": None)


def own_tokenizer(model: HookedTransformer) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        InputError: if it has none.
    """
    if model.tokenizer is None:
        raise InputError("The model has no tokenizer, so no prompts can be written for it.")
    return model.tokenizer


@dataclass
class Bench:
    """One model with all that its experiments share.

    Attributes:
        role: "base" or "tuned".
        model: the model.
        settings: of the study.
        sizes: heads kept, by group.
        receiver_sizes: heads patched into, by group.
        inputs: what every outcome depends on: the model's fingerprint, versions, and so on.
        store: where outcomes are kept.
        progress: shows what goes on.
        seeds: every seed that was drawn from the study's, by purpose.
    """

    role: str
    model: HookedTransformer
    settings: Settings
    sizes: Mapping[str, int]
    receiver_sizes: Mapping[str, int]
    inputs: Mapping[str, Any]
    store: Store
    progress: Progress = silent
    seeds: dict[str, int] = field(default_factory=dict)
    _ablations: dict[AblationKind, Ablation] = field(default_factory=dict[AblationKind, Ablation])

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own."""
        return own_tokenizer(self.model)

    def seed(self, *purpose: str | int) -> int:
        """The seed for a purpose, which is noted; the same for every model."""
        drawn = stream_seed(self.settings.seed, *purpose)
        self.seeds[" ".join(map(str, purpose))] = drawn
        return drawn

    def step(
        self, name: str, step: Step[Found], inputs: Mapping[str, Any], compute: Callable[[], Found]
    ) -> Found:
        """One step of this model, kept in the store."""
        return self.store.result(f"{self.role}_{name}", step, {**self.inputs, **inputs}, compute)

    def test_prompts(self) -> PromptBatch:
        """Prompts that neither discovery nor the ablation has seen."""
        s = self.settings
        return box_prompts(
            self.tokenizer, s.prompts, n_boxes=s.boxes, seed=self.seed("faithfulness")
        )

    def ablation(self, kind: AblationKind) -> Ablation:
        """An ablation from prompts with other objects, labels and query labels."""
        if kind not in self._ablations:
            s, seed = self.settings, self.seed("ablation")
            others = discovery_pairs(self.tokenizer, s.prompts, n_boxes=s.boxes, seed=seed).corrupt
            self._ablations[kind] = make_ablation(
                self.model, others, kind, seed=seed, batch_size=self.batch_size
            )
        return self._ablations[kind]

    @property
    def batch_size(self) -> int:
        """Prompts run together outside path patching."""
        few = (self.model.cfg.n_params or SMALL_MODEL) < SMALL_MODEL
        return self.settings.batch_size or (SMALL_MODEL_BATCH if few else BATCH_SIZE)

    @property
    def how(self) -> dict[str, Any]:
        """How methods other than path patching are run."""
        s = self.settings
        return {"engine": s.engine, "batch_size": self.batch_size, "memory": s.memory_bytes}

    @property
    def tested_on(self) -> dict[str, Any]:
        """What decides the prompts of `test_prompts`, for the inputs of a step."""
        s = self.settings
        return {"prompts": s.prompts, "boxes": s.boxes, "test": self.seed("faithfulness")}

    def evaluate(self, prompts: PromptBatch) -> Evaluation:
        """The model's answers."""
        return evaluate(self.model, prompts, **self.how)


def measure_accuracy(bench: Bench) -> AccuracyByBoxes:
    """Accuracy on random prompts of two boxes and more."""
    s = bench.settings
    counts = range(2, s.boxes + 1)
    seeds = {n: bench.seed("accuracy", n) for n in counts}

    def compute() -> AccuracyByBoxes:
        found: dict[int, Evaluation] = {}
        with bench.progress(f"{bench.role}: accuracy", len(counts) * s.prompts) as done:
            for n in counts:
                prompts = box_prompts(bench.tokenizer, s.prompts, n_boxes=n, seed=seeds[n])
                found[n] = bench.evaluate(prompts)
                done(s.prompts)
        return AccuracyByBoxes(found)

    return bench.step("accuracy", ACCURACY, {"prompts": s.prompts, "seeds": seeds}, compute)


def why_no_circuit(bench: Bench, accuracy: AccuracyByBoxes) -> str | None:
    """Why no circuit is looked for in a model that does no better than guessing; None if it does.

    Prompts answered right by luck would give scores, and the heads with the highest of them a
    circuit; it would be one of nothing.
    """
    s = bench.settings
    found, guessing = accuracy.evaluations[s.boxes], 1 / s.boxes
    low, high = found.interval
    if low > guessing or s.all_pairs:
        return None
    return (
        f"it answers {found.accuracy:.3f} [{low:.3f}, {high:.3f}] of {len(found)} prompts "
        f"of {s.boxes} boxes right, and naming one of the {s.boxes} objects at random would be "
        f"{guessing:.3f}. There is no ability to be seen whose circuit could be looked for; fewer "
        "boxes or more prompts may show one, and --all-pairs looks for a circuit all the same"
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
    pairs = discovery_pairs(bench.tokenizer, tries, n_boxes=s.boxes, seed=seed)

    def compute() -> KeptPairs:
        kept: list[int] = []
        tried = 0
        with bench.progress(f"{bench.role}: prompts answered right", n_pairs) as done:
            for chunk in pairs.chunks(bench.batch_size):
                right = bench.evaluate(chunk.clean).correct | s.all_pairs
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

    inputs = {"pairs": n_pairs, "boxes": s.boxes, "seed": seed, "all": s.all_pairs}
    drawn = bench.step(which, PAIRS, inputs, compute)
    if len(drawn.kept) < min(FEWEST_PAIRS, n_pairs):
        raise InputError(
            f"{s.models[bench.role]} answers only {len(drawn.kept)} of {drawn.tried} prompts of "
            f"{s.boxes} boxes right, too few to find its circuit from; ask for fewer boxes, "
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
    s = bench.settings
    stages = iter(ENTITY_TRACKING_STAGES)

    def score_stage(model: HookedTransformer, pairs: PairBatch, **how: Any) -> HeadScores:
        group = next(stages).group
        name = f"scores_{group}" if which == "pairs" else f"scores_{group}_{which}"
        asked = {"pairs": s.discovery_pairs, "boxes": s.boxes, "seed": bench.seeds[which]}
        asked |= {name: value for name, value in how.items() if name != "progress"}
        return _score_in_parts(bench, group, name, pairs, how, {**asked, "drawn": drawn})

    return discover_circuit(
        bench.model,
        pairs,
        sizes=bench.sizes,
        receiver_sizes=bench.receiver_sizes,
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
    # The paper's ablation beside the one that is asked for.
    kinds = dict.fromkeys((s.ablation, "index"))
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
