"""Between two models: which heads of one bring the other what it gained."""

from collections.abc import Sequence

from transformer_lens import HookedTransformer

from tl_entity.heads import Circuit, Head
from tl_entity.methods.cmap import OUTPUT, PATCHES, CrossModelPatching, Patched, cmap_by_group
from tl_entity.methods.compare import Overlap, compare
from tl_entity.methods.discovery import Discovery
from tl_entity.stats import paired_difference_interval
from tl_entity.study.experiments import Bench, accuracy_record, groups_record, heads_record
from tl_entity.study.published import PUBLISHED_KINDS
from tl_entity.study.store import Outcome, Record


def patch_from_other(
    bench: Bench,
    other: HookedTransformer,
    source: str,
    fingerprint: str,
    circuit: Circuit,
    *,
    patches: Sequence[str] = PATCHES,
    name: str = "cmap",
) -> Record:
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
    s = bench.settings
    prompts = bench.test_prompts()
    asked = {
        "prompts": s.prompts,
        "boxes": s.boxes,
        "test": bench.seeds["faithfulness"],
        "from": fingerprint,
        "circuit": groups_record(circuit),
        "patches": list(patches),
        "engine": s.engine,
    }

    def compute() -> Outcome:
        runs = len(patches) * (len(circuit.groups) + 1) * len(prompts)
        with bench.progress(f"{source} into {bench.role}: CMAP", runs) as done:
            found = cmap_by_group(
                bench.model,
                other,
                prompts,
                circuit,
                patches=patches,
                engine=s.engine,
                batch_size=bench.batch_size,
                memory=bench.settings.memory_bytes,
                progress=done,
            )
        return _cmap_record(found, bench.role, source), {}

    return bench.step(f"{name}_from_{source}", asked, compute)[0]


def patch_as_published(
    bench: Bench,
    other: HookedTransformer,
    source: str,
    fingerprint: str,
    circuit: Circuit,
    dcm: Record,
) -> Record:
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
    selected: dict[str, list[Head]] = {}
    for mask in dcm["masks"]:
        if mask["chosen"] and PUBLISHED_KINDS.get(mask["group"]) == mask["desideratum"]:
            selected[mask["group"]] = [Head(*head) for head in mask["selected"]]
    restricted = circuit.restrict(selected)
    record = patch_from_other(
        bench, other, source, fingerprint, restricted, patches=[OUTPUT], name="cmap_as_published"
    )
    return {**record, "heads": groups_record(restricted)}


def _cmap_record(found: CrossModelPatching, into: str, source: str) -> Record:
    before, after = (of.correct.cpu().numpy() for of in (found.base, found.tuned))
    return {
        "into_role": into,
        "from_role": source,
        "into": accuracy_record(found.base),
        "from": accuracy_record(found.tuned),
        "gain": found.tuned.accuracy - found.base.accuracy,
        "gain_interval": list(paired_difference_interval(after, before)),
        "entries": [_entry_record(entry) for entry in found.entries],
    }


def _entry_record(entry: Patched) -> Record:
    return {
        "group": entry.group,
        "patch": entry.patch,
        **accuracy_record(entry.evaluation),
        "gain": entry.gain,
        "gain_interval": list(entry.gain_interval),
        "recovered": entry.recovered,
        "recovered_interval": list(entry.recovered_interval),
    }


def compare_discoveries(
    base: Discovery, tuned: Discovery, *, paired: bool, again: Discovery | None = None
) -> Record:
    """Heads that two models' circuits share, by group and in all, beside what chance would give and
    what the base's circuit shares with itself, found again.

    Args:
        base: found in the base.
        tuned: found in its fine-tune.
        paired: whether both were found from the same pairs.
        again: found in the base from other pairs.
    """
    found = compare(base, tuned, again=again, paired=paired)
    return {
        "groups": {overlap.name: _overlap_record(overlap) for overlap in found.groups},
        "whole": _overlap_record(found.whole),
        "paired": found.paired,
        "ceiling": None
        if again is None
        else {
            "groups": {overlap.name: _overlap_record(overlap) for overlap in found.ceiling[:-1]},
            "whole": _overlap_record(found.ceiling[-1]),
        },
    }


def _overlap_record(overlap: Overlap) -> Record:
    return {
        "first": len(overlap.shared) + len(overlap.lost),
        "second": len(overlap.shared) + len(overlap.new),
        "shared": heads_record(head for _, head in overlap.shared),
        "only_first": heads_record(head for _, head in overlap.lost),
        "only_second": heads_record(head for _, head in overlap.new),
        "population": overlap.population,
        "shared_by_chance": overlap.chance.expected,
        "chance_range": [overlap.chance.low, overlap.chance.high],
        "p_value": overlap.p_value,
        "shared_by_chance_over_all_layers": overlap.chance_over_all_layers.expected,
        "precision": overlap.precision,
        "recall": overlap.recall,
        "jaccard": overlap.jaccard,
        "jaccard_by_chance": overlap.chance_jaccard,
        "jaccard_by_chance_interval": list(overlap.chance_interval),
        "rank_correlation": overlap.correlation,
    }
