"""Between two models: which heads of one bring the other what it gained."""

from collections.abc import Sequence

from transformer_lens import HookedTransformer

from tl_entity.heads import Circuit, Head
from tl_entity.methods.cmap import OUTPUT, PATCHES, CrossModelPatching, cmap_by_group
from tl_entity.studies.entity_tracking import PUBLISHED_KINDS
from tl_entity.study.experiment_results import GroupMasks, Transfer
from tl_entity.study.experiments import Bench
from tl_entity.study.store import Step

CMAP = Step(CrossModelPatching)


def patch_from_other(
    bench: Bench,
    other: HookedTransformer,
    source: str,
    fingerprint: str,
    circuit: Circuit,
    *,
    patches: Sequence[str] = PATCHES,
    name: str = "cmap",
) -> Transfer:
    """Each group of a circuit, and the whole, with what another model computes on the same prompts.

    Args:
        bench: the model that answers.
        other: the model that activations are taken from.
        source: its role.
        fingerprint: of the other model.
        circuit: the groups.
        patches: what is patched.
        name: of the step.
    """
    prompts = bench.test_prompts()

    def compute() -> CrossModelPatching:
        runs = len(patches) * (len(circuit.groups) + 1) * len(prompts)
        with bench.progress(f"{source} into {bench.role}: CMAP", runs) as done:
            return cmap_by_group(
                bench.model,
                other,
                prompts,
                circuit,
                patches=patches,
                progress=done,
                **bench.how,
            )

    of_other = {"from": fingerprint, "circuit": circuit, "patches": list(patches)}
    asked = {**bench.tested_on, **of_other}
    return Transfer(bench.role, source, bench.step(f"{name}_from_{source}", CMAP, asked, compute))


def patch_as_published(
    bench: Bench,
    other: HookedTransformer,
    source: str,
    fingerprint: str,
    circuit: Circuit,
    dcm: GroupMasks,
) -> Transfer:
    """What the paper's CMAP patches: outputs of the *fine-tune's* own circuit, each group cut down
    to the heads that DCM selected in it for what the group carries (`PUBLISHED_KINDS`).

    Args:
        bench: the model that answers.
        other: the fine-tune.
        source: its role.
        fingerprint: of the fine-tune.
        circuit: of the fine-tune.
        dcm: its masks.
    """
    selected: dict[str, tuple[Head, ...]] = {
        found.group: found.run.mask.selected
        for found in dcm.masks
        if found.chosen and PUBLISHED_KINDS.get(found.group) == found.desideratum
    }
    heads = circuit.restrict(selected)
    found = patch_from_other(
        bench, other, source, fingerprint, heads, patches=[OUTPUT], name="cmap_as_published"
    )
    return Transfer(found.into_role, found.from_role, found.found, heads)
