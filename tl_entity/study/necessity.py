"""Is the circuit all there is, and does it need all of its heads?"""

import math

from tl_entity.heads import Circuit
from tl_entity.hooks.ablations import AblationKind
from tl_entity.methods.completeness import Removal, completeness
from tl_entity.methods.minimality import LARGEST_SHARE, HeadMinimality, Minimality, minimality
from tl_entity.study.experiments import Bench, accuracy_record, groups_record, heads_record
from tl_entity.study.store import Outcome, Record, number_record

RANDOM_PARTS = 20
"""Random parts of the circuit that completeness removes."""


def measure_completeness(bench: Bench, circuit: Circuit) -> Record:
    """Circuit and model without the same heads: each group, and random parts of the circuit."""
    seed = bench.seed("completeness")
    prompts = bench.test_prompts()
    # Of no heads, no parts can be drawn.
    n_random = RANDOM_PARTS if len(circuit) else 0

    def compute() -> Outcome:
        n_groups = sum(bool(group.heads) for group in circuit)
        runs = 2 * (1 + n_groups + n_random) * len(prompts)
        with bench.progress(f"{bench.role}: completeness", runs) as done:
            found = completeness(
                bench.model,
                prompts,
                circuit,
                ablation=bench.ablation(bench.settings.ablation),
                seed=seed,
                n_random=n_random,
                engine=bench.settings.engine,
                batch_size=bench.batch_size,
                memory=bench.settings.memory_bytes,
                progress=done,
            )
        kinds = {"whole": (found.whole,), "group": found.groups, "random": found.random}
        return {
            "ablation": found.ablation,
            "entries": [
                _removal_record(kind, removal)
                for kind, removals in kinds.items()
                for removal in removals
            ],
        }, {}

    asked = {**_tested_on(bench, circuit), "seed": seed, "random": RANDOM_PARTS}
    return bench.step("completeness", asked, compute)[0]


def measure_minimality(bench: Bench, circuit: Circuit) -> Record:
    """What the circuit loses with each of its heads, and which are kept."""
    seed = bench.seed("minimality")
    prompts = bench.test_prompts()

    def compute() -> Outcome:
        # At most so many: which parts are removed depends on what is found on the way.
        parts = sum(
            n * (n + 1) // 2 + 2 * n * math.ceil(LARGEST_SHARE * n)
            for n in (len(group.heads) for group in circuit)
        )
        kinds = dict.fromkeys((bench.settings.ablation, "index"))
        most, shown = len(kinds) * (2 + parts) * len(prompts), 0
        with bench.progress(f"{bench.role}: minimality", most) as done:

            def count(runs: int) -> None:
                nonlocal shown
                shown += runs
                done(runs)

            def under(kind: AblationKind) -> Record:
                return _minimality_record(
                    minimality(
                        bench.model,
                        prompts,
                        circuit,
                        ablation=bench.ablation(kind),
                        seed=seed,
                        engine=bench.settings.engine,
                        batch_size=bench.batch_size,
                        memory=bench.settings.memory_bytes,
                        progress=count,
                    )
                )

            found = {kind: under(kind) for kind in kinds}
            done(most - shown)
        # The paper's ablation beside the one that is asked for.
        return {**found[bench.settings.ablation], "by_index": found["index"]}, {}

    return bench.step("minimality", {**_tested_on(bench, circuit), "seed": seed}, compute)[0]


def _tested_on(bench: Bench, circuit: Circuit) -> Record:
    s = bench.settings
    return {
        "circuit": groups_record(circuit),
        "prompts": s.prompts,
        "boxes": s.boxes,
        "test": bench.seed("faithfulness"),
        "ablation": [bench.settings.ablation, bench.seed("ablation")],
        "engine": s.engine,
    }


def _removal_record(kind: str, removal: Removal) -> Record:
    return {
        "kind": kind,
        "removed": removal.name or "nothing",
        "heads": {position: heads_record(heads) for position, heads in removal.heads.items()},
        "circuit": accuracy_record(removal.of_circuit),
        "model": accuracy_record(removal.of_model),
        "circuit_loss": removal.circuit_loss,
        "circuit_loss_interval": list(removal.circuit_loss_interval),
        "model_loss": removal.model_loss,
        "model_loss_interval": list(removal.model_loss_interval),
        "difference": removal.difference,
        "difference_interval": list(removal.interval),
        "published_incompleteness": removal.published_incompleteness,
    }


def _minimality_record(found: Minimality) -> Record:
    return {
        "ablation": found.ablation,
        "entries": [_head_record(head) for head in found.heads],
        "circuit": accuracy_record(found.of_circuit),
        "minimal": accuracy_record(found.of_minimal),
        "minimal_circuit": groups_record(found.minimal),
    }


def _head_record(found: HeadMinimality) -> Record:
    return {
        "group": found.group,
        "head": list(found.head),
        "removed": heads_record(found.removed),
        "without_removed": accuracy_record(found.without_removed),
        "without_head": accuracy_record(found.without_head),
        # Infinite where nothing is left without the head.
        "score": number_record(found.score),
        "interval": [number_record(end) for end in found.interval],
        "kept": found.kept,
    }
