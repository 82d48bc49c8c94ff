"""What each group of heads carries: DCM on its heads, then patching those that DCM selected."""

from collections.abc import Callable
from typing import Any

from tl_entity.errors import InputError
from tl_entity.heads import Circuit, Group
from tl_entity.methods.activation_patching import CarriedInformation, carries
from tl_entity.methods.dcm import MaskRun, MaskStep, learn_masks, training_steps
from tl_entity.studies.design import Draws
from tl_entity.study.experiment_results import GroupMask, GroupMasks
from tl_entity.study.experiments import Bench
from tl_entity.study.store import Step
from tl_entity.tasks.desiderata import MAIN_DESIDERATA

DCM, CARRIED = Step(GroupMasks), Step(CarriedInformation)

MASK_BATCH = 8
"""Pairs a step of training. A mask can fall by a tenth a step and must fall by half, so that small
numbers of pairs need small batches."""


def writable_draws(bench: Bench, n_pairs: int) -> tuple[Draws, dict[str, str]]:
    """Draws of every desideratum whose prompts the model's tokenizer can write, and for each of the
    others the reason why it can't."""
    information = bench.design.task.information
    draws = {} if information is None else information(bench.tokenizer, n_pairs)
    left_out: dict[str, str] = {}
    for name, draw in draws.items():
        try:
            draw(0)
        except InputError as reason:
            left_out[name] = str(reason)
    return {name: draw for name, draw in draws.items() if name not in left_out}, left_out


def learn_what_groups_carry(bench: Bench, circuit: Circuit) -> GroupMasks:
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

    how: dict[str, Any] = {**bench.how, "batch_size": MASK_BATCH}

    def learn(kind: str, group: Group, count: Callable[[MaskStep], object]) -> list[GroupMask]:
        runs = learn_masks(
            bench.model,
            draws[kind],
            group.heads,
            position=group.position,
            seeds=seeds[kind],
            sparsities=s.sparsities,
            progress=count,
            **how,
        ).runs
        best = max(runs, key=_worth)
        return [GroupMask(group.name, kind, run is best, run) for run in runs]

    def compute() -> GroupMasks:
        n_masks = len(kinds) * len(groups) * s.mask_seeds * len(s.sparsities)
        n_steps = n_masks * training_steps(s.mask_pairs, batch_size=MASK_BATCH)
        with bench.progress(f"{bench.role}: DCM", n_steps) as done:

            def count(step: MaskStep) -> None:
                done(1, f"loss {step.loss:.2f}, {step.n_selected} heads")

            found = [learn(kind, group, count) for kind in kinds for group in groups]
        return GroupMasks(tuple(mask for masks in found for mask in masks), left_out)

    asked = {
        "circuit": circuit,
        "pairs": s.mask_pairs,
        "batch": MASK_BATCH,
        **bench.design.task.inputs,
        "seeds": seeds,
        "sparsities": s.sparsities,
    }
    return bench.step("dcm", DCM, asked, compute)


def patch_what_groups_carry(
    bench: Bench, circuit: Circuit, dcm: GroupMasks, of: str
) -> CarriedInformation:
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
    chosen = {kind: dcm.selected(circuit, kind) for kind in draws}

    def compute() -> CarriedInformation:
        # Each group by itself, and nothing patched.
        runs = (1 + len(circuit.groups)) * len(draws) * len(seeds) * max(4, s.prompts // 2)
        with bench.progress(f"{bench.role}: activation patching", runs) as done:
            return carries(
                bench.model,
                draws,
                chosen,
                seeds=seeds,
                progress=done,
                **bench.how,
            )

    asked = {"heads": chosen, "prompts": s.prompts, **bench.design.task.inputs, "seeds": seeds}
    return bench.step(f"activation_patching_{of}_heads", CARRIED, asked, compute)


def _worth(run: MaskRun) -> tuple[float, int]:
    """What a mask is chosen by, the more the better; of equals the first is taken."""
    return run.mask.validation_accuracy or 0.0, -len(run.mask.selected)
