"""What the circuits of a study do alone, and whether the models need them, on more prompts than the
study had and under three ablations.

Takes the circuits that `tl-entity reproduce` found, and measures on new prompts: the accuracy of
each model, of both circuits, of larger ones, of every head at their tokens and of random circuits
of the same layers, alone; accuracy without each group, without the circuit and without random heads
of its layers; completeness and minimality. The answer to every prompt is kept (right or wrong).
Steps are kept in the folder, so that the same command goes on where it was stopped.

Parts and ablations that are not asked for stay as they are in its circuits.json.

python docs/studies/circuits.py RESULTS MODEL ADAPTER --out circuits [--only alone removals]
"""

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

from tl_entity import (
    Ablation,
    Circuit,
    Evaluation,
    Faithfulness,
    Group,
    Head,
    PromptBatch,
    box_prompts,
    completeness,
    discovery_pairs,
    load_model,
    minimality,
    random_circuits,
)
from tl_entity.hooks.ablations import AblationKind
from tl_entity.methods.ablations import make_ablation
from tl_entity.methods.circuits import evaluate, evaluate_circuits, evaluate_removals
from tl_entity.methods.compare import compare
from tl_entity.methods.completeness import Removal
from tl_entity.methods.discovery import ENTITY_TRACKING_STAGES, Discovery, choose_heads
from tl_entity.methods.path_patching import HeadScores
from tl_entity.results import plain
from tl_entity.stats import Z_95
from tl_entity.study.store import Outcome, Record, Store, fingerprint, to_json

BATCH = 16

KINDS: tuple[AblationKind, ...] = ("pooled", "index", "resample")
"""The first one has more prompts."""

TIMES = (2, 4, 8, 16)
"""How many times larger the groups of a circuit are made."""


@dataclass
class Bench:
    """A model with what is measured of it.

    Attributes:
        role: "base" or "tuned".
        model: the model.
        found: its part of the study's results.
        sizes: how many heads the study kept, by group.
        circuits: both models' circuits, by role.
        options: of the command.
        store: where steps are kept.
    """

    role: str
    model: HookedTransformer
    found: Record
    sizes: Mapping[str, int]
    circuits: Mapping[str, Circuit]
    options: argparse.Namespace
    store: Store
    _ablations: dict[AblationKind, Ablation] = field(default_factory=dict[AblationKind, Ablation])

    @property
    def circuit(self) -> Circuit:
        """The model's own."""
        return self.circuits[self.role]

    def prompts(self, n: int) -> PromptBatch:
        """The first `n` prompts."""
        o = self.options
        return box_prompts(self.model.tokenizer, o.prompts, n_boxes=o.boxes, seed=o.seed)[:n]

    def ablation(self, kind: AblationKind) -> Ablation:
        """An ablation from other prompts."""
        if kind not in self._ablations:
            o, seed = self.options, self.options.seed + 1
            pairs = discovery_pairs(self.model.tokenizer, o.others, n_boxes=o.boxes, seed=seed)
            self._ablations[kind] = make_ablation(
                self.model, pairs.corrupt, kind, seed=seed, batch_size=BATCH
            )
        return self._ablations[kind]

    def step(self, name: str, **inputs: Any) -> functools.partial[Outcome]:
        """Keeps a step of this name, found from what all steps share and these inputs."""
        o = self.options
        shared = {
            "model": self.found["fingerprint"],
            "circuits": fingerprint({r: c.to_json() for r, c in self.circuits.items()}),
            **{key: getattr(o, key) for key in ("prompts", "others", "boxes", "seed")},
        }
        return functools.partial(self.store.step, f"{name}_{self.role}", {**shared, **inputs})


def main() -> None:
    """Measure, and write circuits.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder with results.json")
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--ablations", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--prompts", type=int, default=200, help="pooled, of circuits alone")
    parser.add_argument("--few", type=int, default=100, help="for everything else")
    parser.add_argument("--others", type=int, default=100, help="that ablations are from")
    parser.add_argument("--random", type=int, default=5, help="random circuits")
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--seed", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    store = Store(options.out, functools.partial(print, flush=True))
    found = json.loads((options.results / "results.json").read_text(encoding="utf-8"))
    circuits = {
        role: Circuit.entity_tracking(**model["circuit"]) for role, model in found["models"].items()
    }
    models = {
        "base": load_model(options.model),
        "tuned": load_model(options.model, adapter=options.adapter),
    }
    benches = [
        Bench(role, model, part, found["settings"]["sizes"], circuits, options, store)
        for (role, model), part in zip(models.items(), found["models"].values(), strict=True)
    ]
    written = options.out / "circuits.json"
    content: Record = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    for part in options.only:
        for bench in benches:
            of_model = content.setdefault(part, {}).setdefault(bench.role, {})
            of_model |= PARTS[part](bench)
    content["whole"] = {bench.role: answers(whole(bench)) for bench in benches}
    chosen = [by_rule(bench.found, bench.sizes) for bench in benches]
    content["by_rule"] = {
        "circuits": {role: groups_of(of.circuit) for role, of in zip(models, chosen, strict=True)},
        "same_circuit": plain(compare(*chosen, paired=True)),
    }
    names = ("prompts", "few", "others", "random", "boxes", "seed")
    content["settings"] = {name: getattr(options, name) for name in names}
    store.write("circuits.json", to_json(content))


def whole(bench: Bench, n: int | None = None) -> Evaluation:
    """The unedited model's answers to the first `n` prompts."""

    def compute() -> Outcome:
        found = evaluate(bench.model, bench.prompts(bench.options.prompts), batch_size=BATCH)
        return {}, vars(found)

    found = bench.step("whole")(compute)[1]
    return Evaluation(**{name: values[:n] for name, values in found.items()})


def measure_alone(bench: Bench) -> Record:
    """Circuits by themselves, under each ablation."""
    return {kind: alone(bench, kind) for kind in bench.options.ablations}


def alone(bench: Bench, kind: AblationKind) -> Record:
    """Circuits by themselves, larger ones too under the first ablation."""
    cfg, o = bench.model.cfg, bench.options
    every = [Head(n, h) for n in range(cfg.n_layers) for h in range(cfg.n_heads)]
    drawn = random_circuits(bench.model, bench.circuit, o.random, seed=o.seed + 2, match="layer")
    kept: dict[str, Any] = {
        **bench.circuits,
        "by_rule": by_rule(bench.found, bench.sizes).circuit,
        "every_head": dict.fromkeys(bench.circuit.heads_at(), every),
        **{f"random_{n}": circuit for n, circuit in enumerate(drawn)},
    }
    n = o.few
    if kind == KINDS[0]:
        n = o.prompts
        kept |= {f"times_{n}": larger(bench, n) for n in TIMES}

    def compute() -> Outcome:
        found = evaluate_circuits(
            bench.model,
            bench.prompts(n),
            list(kept.values()),
            ablation=bench.ablation(kind),
            batch_size=BATCH,
        )
        of_model = whole(bench, n)
        return {
            name: {"heads": n_heads(kept[name]), **faithfulness(evaluation, of_model)}
            for name, evaluation in zip(kept, found, strict=True)
        }, {}

    return bench.step(f"alone_{kind}", n=n, kept=sorted(kept))(compute)[0]


def has_nothing_to_lose(bench: Bench) -> bool:
    """Whether the circuit alone answers nothing right, so that no removal can cost it anything."""
    return not alone(bench, KINDS[0])[bench.role]["accuracy"]


def measure_removals(bench: Bench) -> Record:
    """The model without the circuit, each of its groups, and random heads of the same layers."""
    o = bench.options

    drawn = random_circuits(bench.model, bench.circuit, o.random, seed=o.seed + 3, match="layer")

    def under(kind: AblationKind) -> Outcome:
        removed: dict[str, Circuit] = {"circuit": bench.circuit}
        removed |= {group.name: Circuit((group,)) for group in bench.circuit}
        removed |= {f"random_{n}": circuit for n, circuit in enumerate(drawn)}
        found = evaluate_removals(
            bench.model,
            bench.prompts(o.few),
            list(removed.values()),
            ablation=bench.ablation(kind),
            batch_size=BATCH,
        )
        return dict(zip(removed, map(answers, found), strict=True)), {}

    record: Record = {}
    for kind in o.ablations:
        step = bench.step(f"removals_{kind}", n=o.few, random=o.random)
        record[kind] = step(functools.partial(under, kind))[0]
    return record


def measure_completeness(bench: Bench) -> Record:
    """What circuit and model lose by the same heads."""
    o, seed = bench.options, bench.options.seed + 4

    def compute() -> Outcome:
        found = completeness(
            bench.model,
            bench.prompts(o.few),
            bench.circuit,
            ablation=bench.ablation(KINDS[0]),
            seed=seed,
            n_random=2 * o.random,
            batch_size=BATCH,
        )
        kinds = {"whole": [found.whole], "group": found.groups, "random": found.random}
        entries = [{"kind": kind, **lost(some)} for kind, those in kinds.items() for some in those]
        return {"ablation": found.ablation, "entries": entries}, {}

    if has_nothing_to_lose(bench):
        return {"ablation": KINDS[0], "entries": []}
    return bench.step("completeness", n=o.few, random=2 * o.random)(compute)[0]


def measure_minimality(bench: Bench) -> Record:
    """What the circuit loses by each of its heads, once those that stand in for it are gone."""
    o = bench.options

    def compute() -> Outcome:
        found = minimality(
            bench.model,
            bench.prompts(o.few),
            bench.circuit,
            ablation=bench.ablation(KINDS[0]),
            seed=o.seed + 5,
            batch_size=BATCH,
        )
        entries = [
            {
                "group": each.group,
                "head": list(each.head),
                "removed": [list(head) for head in each.removed],
                "without_removed": answers(each.without_removed),
                "without_head": answers(each.without_head),
                "score": plain(each.score),
                "interval": [plain(end) for end in each.interval],
                "kept": each.kept,
            }
            for each in found.heads
        ]
        return {
            "ablation": found.ablation,
            "circuit": answers(found.of_circuit),
            "minimal": answers(found.of_minimal),
            "minimal_circuit": groups_of(found.minimal),
            "entries": entries,
        }, {}

    if has_nothing_to_lose(bench):
        return {"ablation": KINDS[0], "entries": []}
    return bench.step("minimality", n=o.few)(compute)[0]


def by_rule(found: Record, sizes: Mapping[str, int]) -> Discovery:
    """What the kept scores of a model give by the rule that a head's interval lies below zero.

    Two numbers with the mean and the interval of a score stand for its examples, which are not
    kept. The heads that stages patched into stay as they were.
    """
    scores: dict[str, HeadScores] = {}
    for stage in ENTITY_TRACKING_STAGES:
        kept = found["discovery"][stage.group]
        mean = torch.tensor(kept["scores"], dtype=torch.float64)
        low, high = torch.tensor(kept["intervals"], dtype=torch.float64).unbind(-1)
        error = (high - low) / (2 * Z_95)
        receivers = kept["receivers"] and tuple(Head(*head) for head in kept["receivers"])
        scores[stage.group] = HeadScores(
            torch.stack([mean - error, mean + error], -1),
            torch.zeros(2),
            stage.position,
            receivers,
            kept["receiver_input"],
            "exact",
        )
    return Discovery(choose_heads(scores, sizes, ENTITY_TRACKING_STAGES), scores, {})


def larger(bench: Bench, times: int) -> Circuit:
    """The circuit with so many times the heads: each group with the next ones of its score map."""
    groups: list[Group] = []
    taken: set[tuple[str, Head]] = set()
    # A head of both A and B counts as B's, as in the paper.
    for group in reversed(bench.circuit.groups):
        scores = bench.found["discovery"][group.name]["scores"]
        ranked = sorted(
            (score, Head(layer, head))
            for layer, row in enumerate(scores)
            for head, score in enumerate(row)
            if score is not None and (group.position, Head(layer, head)) not in taken
        )
        kept = tuple(head for _, head in ranked[: times * len(group.heads)])
        taken |= {(group.position, head) for head in kept}
        groups.insert(0, Group(group.name, group.position, kept))
    return Circuit(tuple(groups))


def answers(evaluation: Evaluation) -> Record:
    """An accuracy with its interval, and for each prompt whether it was answered right."""
    right = "".join("01"[right] for right in evaluation.correct.tolist())
    interval = list(evaluation.interval)
    return {"accuracy": evaluation.accuracy, "interval": interval, "right": right}


def faithfulness(of_circuit: Evaluation, of_model: Evaluation) -> Record:
    """The circuit's answers, and their share of the model's."""
    share = Faithfulness.of(of_circuit, of_model)
    return {
        **answers(of_circuit),
        "faithfulness": share.value,
        "faithfulness_interval": [plain(end) for end in share.interval],
    }


def lost(removal: Removal) -> Record:
    """What circuit and model lose by the same heads."""
    return {
        "removed": removal.name or "nothing",
        "heads": {position: [list(h) for h in heads] for position, heads in removal.heads.items()},
        "circuit": answers(removal.of_circuit),
        "model": answers(removal.of_model),
        "circuit_loss": removal.circuit_loss,
        "circuit_loss_interval": list(removal.circuit_loss_interval),
        "model_loss": removal.model_loss,
        "model_loss_interval": list(removal.model_loss_interval),
        "difference": removal.difference,
        "difference_interval": list(removal.interval),
        "published_incompleteness": removal.published_incompleteness,
    }


def groups_of(circuit: Circuit) -> dict[str, list[list[int]]]:
    """A circuit's heads by group."""
    return {group.name: [list(head) for head in group.heads] for group in circuit}


def n_heads(kept: Circuit | Mapping[str, list[Head]]) -> int:
    """How many heads are kept, at all tokens together."""
    return len(kept) if isinstance(kept, Circuit) else sum(map(len, kept.values()))


PARTS: dict[str, Callable[[Bench], Record]] = {
    "alone": measure_alone,
    "removals": measure_removals,
    "completeness": measure_completeness,
    "minimality": measure_minimality,
}

if __name__ == "__main__":
    main()
