"""What matters most of a study, on more prompts than all of it could have.

Takes the circuits and masks that `tl-entity reproduce` found, and measures on new prompts: the
accuracy of the models, of their circuits and of larger ones, which group's outputs bring the gain
(CMAP, both ways, beside random heads of the same layers), what the groups carry, and how the gain
comes along the checkpoints of the fine-tune. Steps are kept in the folder, so that the same command
goes on where it was stopped.

python docs/studies/more.py RESULTS MODEL ADAPTER --out more [--checkpoints FINETUNE]
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from tl_entity import (
    Circuit,
    Evaluation,
    Faithfulness,
    Group,
    Head,
    box_prompts,
    discovery_pairs,
    evaluate,
    load_model,
    mean_head_outputs,
    random_circuits,
)
from tl_entity.methods.activation_patching import carries
from tl_entity.methods.cmap import cmap_by_group, cmap_each
from tl_entity.study.experiment_results import GroupMasks
from tl_entity.study.folder import STUDY
from tl_entity.study.results import Study
from tl_entity.study.store import Outcome, Record, Store, fingerprint, to_json
from tl_entity.tasks.desiderata import MAIN_DESIDERATA, desideratum_draws

BATCH = 8
PATCHES = ("output", "q")
"""Of the four patches those that changed anything with few prompts."""

DRAWS = 5
"""Sets of random heads that CMAP is held against."""

TIMES = (1, 2, 4, 8, 16)
"""How many times larger the groups of a circuit are made."""


def main() -> None:
    """Measure, and write more.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--checkpoints", type=Path, help="folder of a fine-tune, with step-*/")
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=100, help="to see what the groups carry")
    parser.add_argument("--checkpoint-prompts", type=int, default=100)
    parser.add_argument(
        "--control-prompts",
        type=int,
        default=100,
        help="for CMAP into the fine-tune and of random heads",
    )
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--seed", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    store = Store(options.out, functools.partial(print, flush=True))
    found = json.loads((options.results / "results.json").read_text(encoding="utf-8"))
    circuits = {
        role: Circuit.load(options.results / f"{role}_circuit.json") for role in found["models"]
    }
    models = {
        "base": load_model(options.model),
        "tuned": load_model(options.model, adapter=options.adapter),
    }
    inputs = {
        "circuits": fingerprint({role: circuit.to_json() for role, circuit in circuits.items()}),
        "models": [model["fingerprint"] for model in found["models"].values()],
        **{name: getattr(options, name) for name in ("prompts", "pairs", "boxes", "seed")},
    }
    content: Record = {
        name: getattr(options, name)
        for name in ("prompts", "pairs", "checkpoint_prompts", "control_prompts", "boxes", "seed")
    }
    content["alone"], content["sizes"], content["carries"] = {}, {}, {}
    for role, model in models.items():
        content["alone"][role] = store.step(
            f"alone_{role}", inputs, functools.partial(alone, model, circuits, options)
        )[0]
    for role, model in models.items():
        few = {**inputs, "prompts": options.checkpoint_prompts, "times": TIMES}
        content["sizes"][role] = store.step(
            f"sizes_{role}",
            few,
            functools.partial(by_size, model, circuits[role], found["models"][role], options),
        )[0]

    given = (models["base"], models["tuned"], circuits["base"], options.prompts, options)
    content["cmap"] = store.step(
        "cmap_tuned_into_base", inputs, functools.partial(transfer, *given)
    )[0]
    some = {**inputs, "prompts": options.control_prompts}
    given = (models["tuned"], models["base"], circuits["base"], options.control_prompts, options)
    content["cmap_base_into_tuned"] = store.step(
        "cmap_base_into_tuned", some, functools.partial(transfer, *given)
    )[0]
    given = (models["base"], models["tuned"], circuits["base"], options)
    content["cmap_random"] = store.step(
        "cmap_random", {**some, "draws": DRAWS}, functools.partial(random_transfer, *given)
    )[0]
    if options.checkpoints is not None:
        content["checkpoints"] = {}
        for folder in sorted(options.checkpoints.glob("step-*")):
            step = folder.name.removeprefix("step-").lstrip("0")
            given = (models["base"], options.model, folder, circuits["base"], options)
            content["checkpoints"][step] = store.step(
                f"checkpoint_{step}",
                {**inputs, "prompts": options.checkpoint_prompts, "folder": folder.name},
                functools.partial(along, *given),
            )[0]
    for role, model in models.items():
        masks = Study.load(options.results / STUDY).models[role].dcm
        content["carries"][role] = store.step(
            f"carries_{role}",
            {**inputs, "masks": fingerprint(masks)},
            functools.partial(carried, model, circuits[role], masks, options),
        )[0]
    store.write("more.json", to_json(content))


def alone(model: HookedTransformer, circuits: dict[str, Circuit], options: Any) -> Outcome:
    """The model's accuracy, that of both circuits and of every head at their tokens."""
    n, boxes, seed = options.prompts, options.boxes, options.seed
    prompts = box_prompts(model.tokenizer, n, n_boxes=boxes, seed=seed)
    others = discovery_pairs(model.tokenizer, n, n_boxes=boxes, seed=seed + 1).corrupt
    means = mean_head_outputs(model, others, batch_size=BATCH)
    whole = evaluate(model, prompts, batch_size=BATCH)
    heads = [Head(n, h) for n in range(model.cfg.n_layers) for h in range(model.cfg.n_heads)]
    kept: dict[str, Any] = {
        **circuits,
        "every_head": dict.fromkeys(circuits["base"].heads_at(), heads),
    }
    record: Record = {"whole": accuracy(whole)}
    for name, keep in kept.items():
        alone = evaluate(model, prompts, keep=keep, mean_outputs=means, batch_size=BATCH)
        share = Faithfulness.of(alone, whole, seed=seed + 2)
        record[name] = {
            **accuracy(alone),
            "faithfulness": share.value,
            "faithfulness_interval": list(share.interval),
        }
    return record, {}


def by_size(model: HookedTransformer, circuit: Circuit, found: Record, options: Any) -> Outcome:
    """What circuits of more heads have alone: each group with the next heads of its score map."""
    n, boxes, seed = options.checkpoint_prompts, options.boxes, options.seed
    prompts = box_prompts(model.tokenizer, n, n_boxes=boxes, seed=seed)
    others = discovery_pairs(model.tokenizer, n, n_boxes=boxes, seed=seed + 1).corrupt
    means = mean_head_outputs(model, others, batch_size=BATCH)
    whole = evaluate(model, prompts, batch_size=BATCH)
    entries = []
    for times in TIMES:
        groups: list[Group] = []
        taken: set[tuple[str, Head]] = set()
        # A head of both A and B counts as B's, as in the paper.
        for group in reversed(circuit.groups):
            scores = found["discovery"][group.name]["scores"]
            ranked = sorted(
                (score, Head(layer, head))
                for layer, row in enumerate(scores)
                for head, score in enumerate(row)
                if score is not None and (group.position, Head(layer, head)) not in taken
            )
            kept = tuple(head for _, head in ranked[: times * len(group.heads)])
            taken |= {(group.position, head) for head in kept}
            groups.insert(0, Group(group.name, group.position, kept))
        larger = Circuit(tuple(groups))
        share = Faithfulness.of(
            evaluate(model, prompts, keep=larger, mean_outputs=means, batch_size=BATCH),
            whole,
            seed=seed + 2,
        )
        entries.append(
            {
                "times": times,
                "heads": len(larger),
                **accuracy(share.of_circuit),
                "faithfulness": share.value,
                "faithfulness_interval": list(share.interval),
            }
        )
    return {"whole": accuracy(whole), "entries": entries}, {}


def transfer(
    into: HookedTransformer,
    source: HookedTransformer,
    circuit: Circuit,
    n_prompts: int,
    options: Any,
) -> Outcome:
    """Accuracy with each group's, and all groups', activations of the other model."""
    prompts = box_prompts(into.tokenizer, n_prompts, n_boxes=options.boxes, seed=options.seed)
    found = cmap_by_group(
        into, source, prompts, circuit, seed=options.seed + 3, patches=PATCHES, batch_size=BATCH
    )
    entries = [
        {
            "group": entry.group,
            "patch": entry.patch,
            **accuracy(entry.evaluation),
            "recovered": entry.recovered,
            "recovered_interval": list(entry.recovered_interval),
        }
        for entry in found.entries
    ]
    return {"into": accuracy(found.base), "from": accuracy(found.tuned), "entries": entries}, {}


def random_transfer(
    into: HookedTransformer, source: HookedTransformer, circuit: Circuit, options: Any
) -> Outcome:
    """Accuracy with outputs of found heads of the other model, of random heads of the same layers,
    and of every head at their tokens."""
    prompts = box_prompts(
        into.tokenizer, options.control_prompts, n_boxes=options.boxes, seed=options.seed
    )
    every = [Head(n, h) for n in range(into.cfg.n_layers) for h in range(into.cfg.n_heads)]
    entries: list[Record] = []
    parts = {group.name: Circuit((group,)) for group in circuit} | {"whole circuit": circuit}
    for name, found in parts.items():
        drawn = random_circuits(into, found, DRAWS, seed=options.seed + 5, match="layer")
        choices = [found, *drawn, dict.fromkeys(found.heads_at(), every)]
        measured = cmap_each(
            into, source, prompts, [(heads, "output") for heads in choices], batch_size=BATCH
        )
        of_found, *of_random, of_every = map(accuracy, measured)
        entries.append(
            {"group": name, "found": of_found, "random": of_random, "every_head": of_every}
        )
    return {"entries": entries}, {}


def carried(model: HookedTransformer, circuit: Circuit, masks: GroupMasks, options: Any) -> Outcome:
    """How often the heads that DCM chose bring the target of each kind of information."""
    draws = desideratum_draws(
        model.tokenizer, list(MAIN_DESIDERATA), options.pairs, n_boxes=options.boxes
    )
    chosen = {kind: masks.selected(circuit, kind) for kind in draws}
    found = carries(model, draws, chosen, seeds=[options.seed + 4], batch_size=BATCH)
    entries = [
        {
            "group": entry.group,
            "desideratum": entry.desideratum,
            "heads": [list(head) for head in entry.heads],
            "accuracy": entry.accuracy,
            "interval": list(entry.interval),
        }
        for entry in found.entries
    ]
    return {"entries": entries}, {}


def along(
    base: HookedTransformer, name: str, adapter: Path, circuit: Circuit, options: Any
) -> Outcome:
    """A checkpoint's own accuracy, and what its heads bring the base."""
    model = load_model(name, adapter=adapter)
    return transfer(base, model, circuit, options.checkpoint_prompts, options)


def accuracy(evaluation: Evaluation) -> Record:
    """An accuracy with its interval."""
    return {"accuracy": evaluation.accuracy, "interval": list(evaluation.interval)}


if __name__ == "__main__":
    main()
