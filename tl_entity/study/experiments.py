"""The experiments of the main job: each a small step from a model to a record and its tensors."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Head
from tl_entity.hooks.ablations import Ablation, AblationKind
from tl_entity.methods.ablations import make_ablation
from tl_entity.methods.attention import summarize_attention
from tl_entity.methods.circuits import (
    BATCH_SIZE,
    Evaluation,
    Faithfulness,
    evaluate,
    evaluate_circuits,
    random_circuits,
    recall_by_group,
)
from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES, Discovery, discover_circuit
from tl_entity.methods.path_patching import HeadScores, path_patch
from tl_entity.study.settings import FEWEST_PAIRS, Settings, stream_seed
from tl_entity.study.store import Outcome, Record, Store, number_record
from tl_entity.tasks.batches import PairBatch, PromptBatch
from tl_entity.tasks.boxes import box_prompts
from tl_entity.tasks.pairs import discovery_pairs

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

    def step(self, name: str, inputs: Mapping[str, Any], compute: Callable[[], Outcome]) -> Outcome:
        """One step of this model, kept in the store."""
        return self.store.step(f"{self.role}_{name}", {**self.inputs, **inputs}, compute)

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

    def evaluate(self, prompts: PromptBatch) -> Evaluation:
        """The model's answers."""
        return evaluate(
            self.model,
            prompts,
            engine=self.settings.engine,
            batch_size=self.batch_size,
            memory=self.settings.memory_bytes,
        )


def measure_accuracy(bench: Bench) -> Record:
    """Accuracy on random prompts of two boxes and more."""
    s = bench.settings
    counts = range(2, s.boxes + 1)
    seeds = {n: bench.seed("accuracy", n) for n in counts}

    def compute() -> Outcome:
        found: Record = {}
        with bench.progress(f"{bench.role}: accuracy", len(counts) * s.prompts) as done:
            for n in counts:
                prompts = box_prompts(bench.tokenizer, s.prompts, n_boxes=n, seed=seeds[n])
                found[str(n)] = accuracy_record(bench.evaluate(prompts))
                done(s.prompts)
        return found, {}

    return bench.step("accuracy", {"prompts": s.prompts, "seeds": seeds}, compute)[0]


def why_no_circuit(bench: Bench, accuracy: Record) -> str | None:
    """Why no circuit is looked for in a model that does no better than guessing; None if it does.

    Prompts answered right by luck would give scores, and the heads with the highest of them a
    circuit; it would be one of nothing.
    """
    s = bench.settings
    found, guessing = accuracy[str(s.boxes)], 1 / s.boxes
    low, high = found["interval"]
    if low > guessing or s.all_pairs:
        return None
    return (
        f"it answers {found['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {found['prompts']} prompts "
        f"of {s.boxes} boxes right, and naming one of the {s.boxes} objects at random would be "
        f"{guessing:.3f}. There is no ability to be seen whose circuit could be looked for; fewer "
        "boxes or more prompts may show one, and --all-pairs looks for a circuit all the same"
    )


def draw_pairs(bench: Bench, *, which: str = "pairs") -> tuple[PairBatch, Record]:
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

    def compute() -> Outcome:
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
        return {"tried": tried, "kept": len(kept), "answered_right_only": not s.all_pairs}, {
            "kept": torch.tensor(kept, dtype=torch.long)
        }

    inputs = {"pairs": n_pairs, "boxes": s.boxes, "seed": seed, "all": s.all_pairs}
    record, tensors = bench.step(which, inputs, compute)
    if record["kept"] < min(FEWEST_PAIRS, n_pairs):
        raise InputError(
            f"{s.models[bench.role]} answers only {record['kept']} of {record['tried']} prompts of "
            f"{s.boxes} boxes right, too few to find its circuit from; ask for fewer boxes, "
            "or take prompts it answers wrong as well (--all-pairs)."
        )
    return pairs[tensors["kept"]], record


def find_circuit(
    bench: Bench, pairs: PairBatch, drawn: Record, *, which: str = "pairs"
) -> tuple[Discovery, Record]:
    """Four-stage discovery, each stage kept as soon as it is done.

    Args:
        bench: the model.
        pairs: of `draw_pairs`.
        drawn: its record.
        which: their purpose.
    """
    s = bench.settings
    stages = iter(ENTITY_TRACKING_STAGES)
    heads = bench.model.cfg.n_layers * bench.model.cfg.n_heads
    chunks = list(pairs.chunks(max(PAIRS_KEPT, HEAD_PAIRS_KEPT // heads)))

    def score_stage(model: HookedTransformer, pairs: PairBatch, **how: Any) -> HeadScores:
        group = next(stages).group

        inputs = {name: value for name, value in how.items() if name != "progress"}
        asked = {"pairs": s.discovery_pairs, "boxes": s.boxes, "seed": bench.seeds[which]}
        parts: list[dict[str, Tensor]] = []
        with ExitStack() as stack:
            bars: list[Callable[[int], object]] = []

            def count(runs: int) -> None:
                # Nothing is shown of a stage whose parts are all finished.
                if not bars:
                    shown = bench.progress(f"{bench.role}: {group}", heads * len(pairs))
                    bars.append(stack.enter_context(shown))
                    bars[0](sum(part["per_example"].numel() for part in parts))
                bars[0](runs)

            for number, chunk in enumerate(chunks):

                def compute(chunk: PairBatch = chunk) -> Outcome:
                    count(0)
                    watched: dict[str, Any] = {**how, "progress": count}
                    found = path_patch(model, chunk, **watched)
                    return {}, {
                        "per_example": found.per_example,
                        "clean_values": found.clean_values,
                    }

                # One finished part of a long stage is never done twice.
                name = f"scores_{group}" if which == "pairs" else f"scores_{group}_{which}"
                name += f"_part{number + 1}" if len(chunks) > 1 else ""
                part_of = {"drawn": drawn, "part": [number, len(chunk), len(chunks)]}
                parts.append(bench.step(name, {**inputs, **asked, **part_of}, compute)[1])
        tensors = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
        receivers = how["receivers"]
        return HeadScores(
            per_example=tensors["per_example"],
            clean_values=tensors["clean_values"],
            position=how["position"],
            receivers=None if receivers is None else tuple(receivers),
            receiver_input=how["receiver_input"],
            engine=how["engine"],
        )

    discovery = discover_circuit(
        bench.model,
        pairs,
        sizes=bench.sizes,
        receiver_sizes=bench.receiver_sizes,
        engine=s.engine,
        batch_size=s.batch_size,
        memory=s.memory_bytes,
        score_stage=score_stage,
    )
    record: Record = {}
    for stage in ENTITY_TRACKING_STAGES:
        scores = discovery.scores[stage.group]
        record[stage.group] = {
            "position": stage.position,
            "into": stage.into,
            "receiver_input": stage.receiver_input,
            "receivers": None if scores.receivers is None else heads_record(scores.receivers),
            "top_layer": scores.top_layer,
            "scores": scores.scores.tolist(),
            "intervals": scores.intervals.tolist(),
        }
    return discovery, record


def find_circuit_again(bench: Bench) -> Discovery:
    """The model's circuit from other pairs: how much of a circuit is found twice."""
    pairs, drawn = draw_pairs(bench, which=PAIRS_AGAIN)
    return find_circuit(bench, pairs, drawn, which=PAIRS_AGAIN)[0]


def measure_faithfulness(bench: Bench, circuit: Circuit, others: Mapping[str, Circuit]) -> Record:
    """How much of the model's accuracy its circuit has alone, beside other circuits run in it.

    Args:
        bench: the model.
        circuit: found in it.
        others: circuits found elsewhere, such as the base's in the tuned model, by role.
    """
    s = bench.settings
    seeds = {what: bench.seed(what) for what in ("faithfulness", "ablation", "bootstrap", "random")}
    asked = {"prompts": s.prompts, "boxes": s.boxes, "seeds": seeds, "ablation": s.ablation}
    cfg = bench.model.cfg
    drawn = random_circuits(bench.model, circuit, s.random_circuits, seed=seeds["random"])
    every = [Head(n, h) for n in range(cfg.n_layers) for h in range(cfg.n_heads)]
    # Every head at the circuit's positions is a reference, not a bound: heads can hinder.
    alone = [circuit, dict.fromkeys(circuit.heads_at(), every), *others.values(), *drawn]
    kinds = dict.fromkeys((s.ablation, "index"))

    def scored(of_circuit: Evaluation, whole: Evaluation) -> Record:
        found = Faithfulness.of(of_circuit, whole, seed=seeds["bootstrap"])
        return {
            "circuit": accuracy_record(found.of_circuit),
            "model": accuracy_record(found.of_model),
            "faithfulness": found.value,
            "interval": [number_record(end) for end in found.interval],
        }

    def under(kind: AblationKind, whole: Evaluation, done: Count) -> Record:
        found = evaluate_circuits(
            bench.model,
            prompts,
            alone,
            ablation=bench.ablation(kind),
            engine=s.engine,
            batch_size=bench.batch_size,
            memory=s.memory_bytes,
            progress=done,
        )
        n_others = 2 + len(others)
        accuracies = [evaluation.accuracy for evaluation in found[n_others:]]
        return {
            **scored(found[0], whole),
            "every_head": scored(found[1], whole),
            "other_circuits": {
                role: scored(one, whole) for role, one in zip(others, found[2:], strict=False)
            },
            "random": {
                "accuracies": accuracies,
                "mean": sum(accuracies) / len(accuracies) if accuracies else None,
                "lowest": min(accuracies, default=None),
                "highest": max(accuracies, default=None),
                "circuits": [groups_record(control) for control in drawn],
            },
        }

    def compute() -> Outcome:
        runs = (1 + len(kinds) * len(alone)) * len(prompts)
        with bench.progress(f"{bench.role}: faithfulness", runs) as done:
            whole = bench.evaluate(prompts)
            done(len(prompts))
            found = {kind: under(kind, whole, done) for kind in kinds}
        # The paper's ablation beside the one that is asked for.
        return {**found[s.ablation], "ablation": s.ablation, "by_index": found["index"]}, {}

    prompts = bench.test_prompts()
    inputs = {
        **asked,
        "circuit": groups_record(circuit),
        "others": {role: groups_record(other) for role, other in others.items()},
        "random": s.random_circuits,
    }
    return bench.step("faithfulness", inputs, compute)[0]


def look_at_attention(bench: Bench, circuit: Circuit) -> Record:
    """What each head of each group attends to, on prompts that discovery has not seen."""
    s = bench.settings
    prompts = bench.test_prompts()

    def compute() -> Outcome:
        record: Record = {}
        with bench.progress(f"{bench.role}: attention", len(circuit.groups) * len(prompts)) as done:
            for group in circuit:
                seen = summarize_attention(
                    bench.model,
                    prompts,
                    group.heads,
                    from_position=group.position,
                    batch_size=bench.batch_size,
                )
                record[group.name] = {
                    "from": seen.from_position,
                    "heads": heads_record(seen.heads),
                    "to": list(seen.names),
                    "weights": seen.weights.tolist(),
                    "common_offset": seen.common_offset.tolist(),
                    "offset_share": seen.offset_share.tolist(),
                }
                done(len(prompts))
        return record, {}

    inputs = {
        "prompts": s.prompts,
        "boxes": s.boxes,
        "seed": bench.seeds["faithfulness"],
        "circuit": groups_record(circuit),
    }
    return bench.step("attention", inputs, compute)[0]


def compare_with_planted(circuit: Circuit, known: Circuit) -> Record:
    """Planted heads found and missed, by group."""
    recall = recall_by_group(circuit, known)
    groups = {
        group.name: {
            "planted": heads_record(group.heads),
            "found": heads_record(recall[group.name][0]),
            "missed": heads_record(recall[group.name][1]),
            "not_planted": heads_record(
                tuple(head for head in circuit[group.name] if head not in group.heads)
            ),
        }
        for group in known
    }
    found = sum(len(group["found"]) for group in groups.values())
    return {
        "groups": groups,
        "found": found,
        "planted": len(known),
        "chosen": len(circuit),
        "recall": found / len(known) if len(known) else None,
        "precision": found / len(circuit) if len(circuit) else None,
    }


def accuracy_record(evaluation: Evaluation) -> Record:
    """An accuracy with its count and interval."""
    return {
        "correct": int(evaluation.correct.sum()),
        "prompts": len(evaluation),
        "accuracy": evaluation.accuracy,
        "interval": list(evaluation.interval),
    }


def heads_record(heads: Iterable[Head]) -> list[list[int]]:
    """Heads as `[layer, head]` pairs."""
    return [list(head) for head in heads]


def groups_record(circuit: Circuit) -> dict[str, list[list[int]]]:
    """A circuit's heads by group."""
    return {group.name: heads_record(group.heads) for group in circuit}
