"""Between two models: which heads of one bring the other what it gained."""

from transformer_lens import HookedTransformer

from tl_entity.heads import Circuit
from tl_entity.methods.cmap import PATCHES, CrossModelPatching, Patched, cmap_by_group
from tl_entity.methods.compare import Overlap, compare
from tl_entity.methods.discovery import Discovery
from tl_entity.stats import paired_difference_interval
from tl_entity.study.experiments import Bench, accuracy_record, groups_record, heads_record
from tl_entity.study.store import Outcome, Record


def patch_from_other(
    bench: Bench, other: HookedTransformer, source: str, fingerprint: str, circuit: Circuit
) -> Record:
    """Each group of a circuit, and the whole, with what another model computes on the same prompts.

    Args:
        bench: the model that answers.
        other: the model that activations are taken from.
        source: its role.
        fingerprint: of the other model.
        circuit: the groups.
    """
    s = bench.settings
    prompts = bench.test_prompts()
    seed = bench.seed("bootstrap")
    asked = {
        "prompts": s.prompts,
        "boxes": s.boxes,
        "test": bench.seeds["faithfulness"],
        "seed": seed,
        "from": fingerprint,
        "circuit": groups_record(circuit),
        "patches": list(PATCHES),
        "engine": s.engine,
    }

    def compute() -> Outcome:
        runs = len(PATCHES) * (len(circuit.groups) + 1) * len(prompts)
        with bench.progress(f"{source} into {bench.role}: CMAP", runs) as done:
            found = cmap_by_group(
                bench.model,
                other,
                prompts,
                circuit,
                seed=seed,
                engine=s.engine,
                batch_size=bench.batch_size,
                memory=bench.settings.memory_bytes,
                progress=done,
            )
        return _cmap_record(found, bench.role, source), {}

    return bench.step(f"cmap_from_{source}", asked, compute)[0]


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


def compare_discoveries(bench: Bench, base: Discovery, tuned: Discovery, *, paired: bool) -> Record:
    """Heads that two models' circuits share, by group and in all, beside what chance would give.

    Args:
        bench: either model; it knows the seeds.
        base: found in the base.
        tuned: found in its fine-tune.
        paired: whether both were found from the same pairs.
    """
    seed = bench.seed("comparison")
    found = compare(base, tuned, seed=seed, sizes=bench.sizes, paired=paired)
    return {
        "groups": {overlap.name: _overlap_record(overlap) for overlap in found.groups},
        "whole": _overlap_record(found.whole),
        "paired": found.paired,
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
        "precision": overlap.precision,
        "precision_interval": list(overlap.precision_interval),
        "recall": overlap.recall,
        "recall_interval": list(overlap.recall_interval),
        "jaccard": overlap.jaccard,
        "jaccard_interval": list(overlap.jaccard_interval),
        "jaccard_by_chance": overlap.chance_jaccard,
        "jaccard_by_chance_interval": list(overlap.chance_interval),
        "rank_correlation": overlap.correlation,
        "rank_correlation_interval": list(overlap.correlation_interval),
    }
