"""Is the circuit all there is, and does it need all of its heads?"""

import math

from tl_entity.heads import Circuit
from tl_entity.hooks.ablations import AblationKind
from tl_entity.methods.completeness import Completeness, completeness
from tl_entity.methods.minimality import LARGEST_SHARE, Minimality, minimality
from tl_entity.study.experiment_results import MinimalityByAblation
from tl_entity.study.experiments import Bench
from tl_entity.study.store import Record, Step

COMPLETENESS, MINIMALITY = Step(Completeness), Step(MinimalityByAblation)

RANDOM_PARTS = 20
"""Random parts of the circuit that completeness removes."""


def measure_completeness(bench: Bench, circuit: Circuit) -> Completeness:
    """Circuit and model without the same heads: each group, and random parts of the circuit."""
    seed = bench.seed("completeness")
    prompts = bench.test_prompts()
    # Of no heads, no parts can be drawn.
    n_random = RANDOM_PARTS if len(circuit) else 0

    def compute() -> Completeness:
        n_groups = sum(bool(group.heads) for group in circuit)
        runs = 2 * (1 + n_groups + n_random) * len(prompts)
        with bench.progress(f"{bench.role}: completeness", runs) as done:
            return completeness(
                bench.model,
                prompts,
                circuit,
                ablation=bench.ablation(bench.settings.ablation),
                seed=seed,
                n_random=n_random,
                progress=done,
                **bench.how,
            )

    asked = {**_tested_on(bench, circuit), "seed": seed, "random": RANDOM_PARTS}
    return bench.step("completeness", COMPLETENESS, asked, compute)


def measure_minimality(bench: Bench, circuit: Circuit) -> MinimalityByAblation:
    """What the circuit loses with each of its heads, and which are kept."""
    seed = bench.seed("minimality")
    prompts = bench.test_prompts()

    def compute() -> MinimalityByAblation:
        # At most so many: which parts are removed depends on what is found on the way.
        parts = sum(
            n * (n + 1) // 2 + 2 * n * math.ceil(LARGEST_SHARE * n)
            for n in (len(group.heads) for group in circuit)
        )
        kinds = bench.ablation_kinds
        most, shown = len(kinds) * (2 + parts) * len(prompts), 0
        with bench.progress(f"{bench.role}: minimality", most) as done:

            def count(runs: int) -> None:
                nonlocal shown
                shown += runs
                done(runs)

            def under(kind: AblationKind) -> Minimality:
                return minimality(
                    bench.model,
                    prompts,
                    circuit,
                    ablation=bench.ablation(kind),
                    seed=seed,
                    progress=count,
                    **bench.how,
                )

            found: dict[AblationKind, Minimality] = {kind: under(kind) for kind in kinds}
            done(most - shown)
        return MinimalityByAblation(found)

    asked = {**_tested_on(bench, circuit), "seed": seed}
    return bench.step("minimality", MINIMALITY, asked, compute)


def _tested_on(bench: Bench, circuit: Circuit) -> Record:
    ablation = [bench.settings.ablation, bench.seed("ablation")]
    return {**bench.tested_on, "circuit": circuit, "ablation": ablation}
