"""What each group of heads carries: DCM on its heads, then patching those that DCM selected."""

from collections.abc import Callable, Mapping

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group, Head
from tl_entity.methods.activation_patching import CarriedInformation, carries
from tl_entity.methods.dcm import MaskRun, MaskStep, learn_masks, training_steps
from tl_entity.study.experiments import Bench, accuracy_record, groups_record, heads_record
from tl_entity.study.store import Outcome, Record
from tl_entity.tasks.batches import PairBatch
from tl_entity.tasks.desiderata import DESIDERATA, MAIN_DESIDERATA, desideratum_draws

MASK_BATCH = 8
"""Pairs a step of training. A mask can fall by a tenth a step and must fall by half, so that small
numbers of pairs need small batches."""

Draws = Mapping[str, Callable[[int], PairBatch]]
"""For each desideratum a function from a seed to pairs."""


def writable_draws(bench: Bench, n_pairs: int) -> tuple[Draws, dict[str, str]]:
    """Draws of every desideratum whose prompts the model's tokenizer can write, and for each of the
    others the reason why it can't."""
    draws = desideratum_draws(
        bench.tokenizer, list(DESIDERATA), n_pairs, n_boxes=bench.settings.boxes
    )
    left_out: dict[str, str] = {}
    for name, draw in draws.items():
        try:
            draw(0)
        except InputError as reason:
            left_out[name] = str(reason)
    return {name: draw for name, draw in draws.items() if name not in left_out}, left_out


def learn_what_groups_carry(bench: Bench, circuit: Circuit) -> Record:
    """Which heads of each group carry each kind of information, by DCM.

    There is a mask for each draw of pairs and each price of a head. Of these one is chosen, whose
    heads are patched later: the one with the highest validation accuracy, of equals the one with
    the fewest heads. Test pairs have no say in it.
    """
    s = bench.settings
    draws, left_out = writable_draws(bench, s.mask_pairs)
    kinds = [kind for kind in MAIN_DESIDERATA if kind in draws]
    groups = [group for group in circuit if group.heads]
    seeds = {
        kind: [
            bench.seed("dcm", kind),
            *(bench.seed("dcm", kind, number) for number in range(1, s.mask_seeds)),
        ]
        for kind in kinds
    }
    asked = {
        "circuit": groups_record(circuit),
        "pairs": s.mask_pairs,
        "batch": MASK_BATCH,
        "boxes": s.boxes,
        "seeds": seeds,
        "sparsities": s.sparsities,
        "engine": s.engine,
    }

    def compute() -> Outcome:
        found = []
        n_masks = len(kinds) * len(groups) * s.mask_seeds * len(s.sparsities)
        n_steps = n_masks * training_steps(s.mask_pairs, batch_size=MASK_BATCH)
        with bench.progress(f"{bench.role}: DCM", n_steps) as done:

            def count(step: MaskStep) -> None:
                done(1, f"loss {step.loss:.2f}, {step.n_selected} heads")

            for kind in kinds:
                for group in groups:
                    runs = learn_masks(
                        bench.model,
                        draws[kind],
                        group.heads,
                        position=group.position,
                        seeds=seeds[kind],
                        sparsities=s.sparsities,
                        engine=s.engine,
                        batch_size=MASK_BATCH,
                        memory=bench.settings.memory_bytes,
                        progress=count,
                    ).runs
                    best = max(runs, key=_worth)
                    found += [
                        {
                            "group": group.name,
                            "desideratum": kind,
                            "chosen": run is best,
                            **_mask_record(run),
                        }
                        for run in runs
                    ]
        return {"masks": found, "left_out": left_out}, {}

    return bench.step("dcm", asked, compute)[0]


def patch_what_groups_carry(bench: Bench, circuit: Circuit, dcm: Record, of: str) -> Record:
    """How often the heads that DCM selected, taken from the counterfactual, bring the target.

    Args:
        bench: the model.
        circuit: the groups.
        dcm: what `learn_what_groups_carry` found in the model of the role `of`.
        of: the model whose heads they are, which may be another than the bench's.
    """
    s = bench.settings
    draws, _ = writable_draws(bench, max(4, s.prompts // 2))
    seeds = [bench.seed("activation patching", number) for number in range(s.draws)]
    chosen = {kind: selected_circuit(circuit, dcm, kind) for kind in draws}
    asked = {
        "heads": {kind: groups_record(heads) for kind, heads in chosen.items()},
        "prompts": s.prompts,
        "boxes": s.boxes,
        "seeds": seeds,
        "engine": s.engine,
    }

    def compute() -> Outcome:
        # Each group by itself, and nothing patched.
        runs = (1 + len(circuit.groups)) * len(draws) * len(seeds) * max(4, s.prompts // 2)
        with bench.progress(f"{bench.role}: activation patching", runs) as done:
            found = carries(
                bench.model,
                draws,
                chosen,
                seeds=seeds,
                engine=s.engine,
                batch_size=bench.batch_size,
                memory=bench.settings.memory_bytes,
                progress=done,
            )
        return {"entries": _carried_record(found)}, {}

    return bench.step(f"activation_patching_{of}_heads", asked, compute)[0]


def selected_circuit(circuit: Circuit, dcm: Record, desideratum: str) -> Circuit:
    """The heads of each group in the mask that was chosen for a desideratum; the further desiderata
    for position have those of `position`."""
    kind = desideratum if desideratum in MAIN_DESIDERATA else "position"
    selected = {
        mask["group"]: tuple(Head(*head) for head in mask["selected"])
        for mask in dcm["masks"]
        if mask["desideratum"] == kind and mask["chosen"]
    }
    return Circuit(
        tuple(Group(g.name, g.position, selected.get(g.name, ())) for g in circuit.groups)
    )


def _worth(run: MaskRun) -> tuple[float, int]:
    """What a mask is chosen by, the more the better; of equals the first is taken."""
    return run.mask.validation_accuracy or 0.0, -len(run.mask.selected)


def _mask_record(run: MaskRun) -> Record:
    mask = run.mask
    return {
        "position": mask.position,
        "seed": run.seed,
        "sparsity": mask.sparsity,
        "candidates": heads_record(mask.heads),
        "values": mask.values.tolist(),
        "selected": heads_record(mask.selected),
        "losses": mask.losses.tolist(),
        "validation_accuracy": mask.validation_accuracy,
        "test": accuracy_record(run.test),
        "test_of_all": accuracy_record(run.test_of_all),
        "test_of_none": accuracy_record(run.test_of_none),
    }


def _carried_record(found: CarriedInformation) -> list[Record]:
    return [
        {
            "group": entry.group,
            "position": entry.position,
            "heads": heads_record(entry.heads),
            "desideratum": entry.desideratum,
            "correct": sum(entry.correct),
            "prompts": sum(entry.n_pairs),
            "accuracy": entry.accuracy,
            "interval": list(entry.interval),
            "draws": list(entry.accuracies),
        }
        for entry in found.entries
    ]
