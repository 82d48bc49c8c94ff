"""Two models' mechanisms side by side: each searched again from another seed, other prompts,
another number of boxes, another phrasing and other kinds of ablation; each inside the other model;
their edges and groups.

python docs/studies/two_mechanisms.py default-base default-tuned --out shipped_pair.json

Searches are kept in a folder, and are not made again if they are there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tl_entity import (
    Ablation,
    Circuit,
    Edges,
    InputError,
    Mechanism,
    MechanismGroups,
    MechanismStability,
    PromptBatch,
    box_prompts,
    compare_mechanisms,
    desideratum_draws,
    desideratum_pairs,
    discovery_pairs,
    evaluate,
    find_mechanism,
    load_model,
    mechanism_edges,
    mechanism_groups,
    mechanism_stability,
    pooled_ablation,
    resample_ablation,
    zero_ablation,
)
from tl_entity.models.registry import planted_circuit
from tl_entity.results import plain
from tl_entity.tasks.desiderata import MAIN_DESIDERATA

CHANGED = {
    "seed 1": "seed",
    "other prompts": "prompts",
    "five boxes": "prompts",
    "text before": "phrasing",
    "resample": "ablation",
    "zero": "ablation",
}
ROLES = {"previous_query_label": "label"}


def main() -> None:
    """Search, compare, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("tuned")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=Path("searches"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    models = {"base": load_model(options.base), "tuned": load_model(options.tuned)}
    found = {
        name: searches(model, options.prompts, options.folder / name)
        for name, model in models.items()
    }
    steady = {
        name: mechanism_stability(each, changed={k: v for k, v in CHANGED.items() if k in each})
        for name, each in found.items()
    }
    firsts = {name: each["first"] for name, each in found.items()}
    edges = {name: edges_of(models[name], firsts[name], options.folder / name) for name in models}
    fresh = box_prompts(models["base"].tokenizer, 300, n_boxes=7, seed=61)
    compared = compare_mechanisms(
        firsts["base"],
        firsts["tuned"],
        edges=(edges["base"], edges["tuned"]),
        again=steady,
        models=(models["base"], models["tuned"]),
        prompts=fresh,
    )
    groups = {name: groups_of(models[name], firsts[name], edges[name]) for name in models}
    write(compared, steady, groups, found, options)


def searches(model, n: int, folder: Path) -> dict[str, Mechanism]:
    """The mechanism, found by each search; those that can't be made are left out."""
    tokenizer = model.tokenizer

    def prompts(seed: int, n_boxes: int = 7) -> PromptBatch:
        return box_prompts(tokenizer, n, n_boxes=n_boxes, seed=seed)

    def pooled(seed: int, n_boxes: int = 7) -> Ablation:
        others = discovery_pairs(tokenizer, 200, n_boxes=n_boxes, seed=seed).corrupt
        return pooled_ablation(model, others)

    def phrased(n: int, seed: int) -> PromptBatch:
        return desideratum_pairs(tokenizer, "text_before", n, seed=seed).corrupt

    others = discovery_pairs(tokenizer, 200, n_boxes=7, seed=22).corrupt
    each: dict[str, Callable[[], tuple[PromptBatch, Ablation, int]]] = {
        "first": lambda: (prompts(21), pooled(22), 0),
        "seed 1": lambda: (prompts(21), pooled(22), 1),
        "other prompts": lambda: (prompts(31), pooled(32), 0),
        "five boxes": lambda: (prompts(41, 5), pooled(42, 5), 0),
        "text before": lambda: (phrased(n, 51), pooled_ablation(model, phrased(200, 52)), 0),
        "resample": lambda: (prompts(21), resample_ablation(model, others, seed=0), 0),
        "zero": lambda: (prompts(21), zero_ablation(), 0),
    }
    found: dict[str, Mechanism] = {}
    for name, make in each.items():
        path = folder.with_name(f"{folder.name}_{name.replace(' ', '_')}.safetensors")
        if not path.is_file():
            some, ablation, seed = make()
            try:
                find_mechanism(model, some, ablation=ablation, seed=seed).save(path)
            except InputError as error:
                sys.stderr.write(f"{folder.name}, {name}: {error}\n")
                continue
        found[name] = Mechanism.load(path)
        sys.stderr.write(f"{folder.name}, {name}: {found[name]}\n")
    return found


def edges_of(model, mechanism: Mechanism, folder: Path) -> Edges:
    """All edges of a mechanism, those that matter exactly."""
    path = folder.with_name(f"{folder.name}_edges.safetensors")
    if not path.is_file():
        pairs = discovery_pairs(model.tokenizer, 400, n_boxes=7, seed=1)
        pairs = pairs[evaluate(model, pairs.clean).correct.nonzero().squeeze(1)[:100]]
        mechanism_edges(model, pairs, mechanism, top_n=200).save(path)
    return Edges.load(path)


def groups_of(model, mechanism: Mechanism, edges: Edges) -> MechanismGroups:
    """What the mechanism's groups are and carry."""
    draws = desideratum_draws(model.tokenizer, MAIN_DESIDERATA, 200)
    pairs = {name: draw(7) for name, draw in draws.items()}
    prompts = box_prompts(model.tokenizer, 50, n_boxes=7, seed=3)
    return mechanism_groups(model, prompts, mechanism, edges, draws=pairs, dcm=True)


def write(
    compared,
    steady: dict[str, MechanismStability],
    groups: dict[str, MechanismGroups],
    found: dict[str, dict[str, Mechanism]],
    options,
) -> None:
    """The numbers as JSON, and what they say as text."""
    content: dict[str, object] = {
        "compared": str(compared),
        "inside": compared.faithfulness_dataframe().to_dict("records"),
        "overlap": compared.to_dataframe().to_dict("records"),
        "settled": {k: [str(n) for n in v] for k, v in (compared.settled or {}).items()},
        "threads": torch.get_num_threads(),
        "processor_seconds": round(time.process_time()),
    }
    for name, model in (("base", options.base), ("tuned", options.tuned)):
        content[name] = {
            "stability": str(steady[name]),
            "searches": steady[name].searches_dataframe().to_dict("records"),
            "core": [str(node) for node in steady[name].core],
            "reported": {search: str(each) for search, each in found[name].items()},
            "groups": groups[name].to_dataframe().to_dict("records"),
            "unpatched": {u.desideratum: u.share for u in groups[name].unpatched},
        }
        sys.stdout.write(f"{name}: {steady[name]}\n{steady[name].searches_dataframe()}\n")
        sys.stdout.write(f"{groups[name].table(None).to_string()}\n")
        circuit = Circuit.load(planted_circuit(model))
        sys.stdout.write(f"{groups[name].beside(circuit, ROLES).to_string()}\n")
    sys.stdout.write(f"{compared}\n{compared.faithfulness_dataframe().to_string()}\n")
    options.out.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
