"""Where a study's gain comes from and what its groups carry, on more prompts than it had.

Takes the circuits and masks that `tl-entity reproduce` found, and measures on new prompts: which
group's outputs bring the gain (CMAP, both ways; of the fine-tune's own heads, as published; and
beside random heads of the same layers), what the groups carry, and how the gain comes along the
checkpoints of the fine-tune. Steps are kept in the folder, so that the same command goes on where
it was stopped. Parts that are not asked for stay as they are in its more.json.

python docs/studies/more.py RESULTS MODEL ADAPTER --out more [--checkpoints FINETUNE] [--only cmap]
"""

import argparse
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

from tl_entity import (
    Circuit,
    Evaluation,
    Group,
    Head,
    PromptBatch,
    box_prompts,
    evaluate,
    load_model,
    random_circuits,
)
from tl_entity.methods.activation_patching import carries
from tl_entity.methods.cmap import OUTPUT, WHOLE_CIRCUIT, cmap_each
from tl_entity.methods.gains import recovered_gain
from tl_entity.results import plain
from tl_entity.stats import paired_difference_interval
from tl_entity.study.published import PUBLISHED_KINDS
from tl_entity.study.store import Record, Store, fingerprint, to_json
from tl_entity.tasks.desiderata import MAIN_DESIDERATA, desideratum_draws

BATCH = 8
PATCHES = (OUTPUT, "q")
"""Of the four patches those that changed anything with few prompts."""

DRAWS = 5
"""Sets of random heads that CMAP is held against."""


@dataclass
class Study:
    """What all parts share.

    Attributes:
        models: by role.
        circuits: by role.
        masks: of DCM, by role.
        inputs: what every step depends on.
        options: of the command.
        store: where steps are kept.
    """

    models: Mapping[str, HookedTransformer]
    circuits: Mapping[str, Circuit]
    masks: Mapping[str, Record]
    inputs: Record
    options: argparse.Namespace
    store: Store

    def step(self, name: str, compute: Callable[[], Record], **inputs: Any) -> Record:
        """What is measured, unless the folder has it from the same inputs."""
        asked = {**self.inputs, **inputs}
        return self.store.step(name, asked, lambda: (compute(), {}))[0]

    def prompts(self, n: int) -> PromptBatch:
        """As many prompts."""
        o = self.options
        return box_prompts(self.models["base"].tokenizer, n, n_boxes=o.boxes, seed=o.seed)


def main() -> None:
    """Measure, and write more.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder with results.json")
    parser.add_argument("model")
    parser.add_argument("adapter")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--checkpoints", type=Path, help="folder of a fine-tune, with step-*/")
    parser.add_argument("--prompts", type=int, default=300, help="for CMAP into the base")
    parser.add_argument("--back-prompts", type=int, default=200, help="for CMAP into the fine-tune")
    parser.add_argument("--pairs", type=int, default=100, help="to see what the groups carry")
    parser.add_argument("--checkpoint-prompts", type=int, default=100)
    parser.add_argument("--control-prompts", type=int, default=100, help="for CMAP of random heads")
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--seed", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = json.loads((options.results / "results.json").read_text(encoding="utf-8"))
    circuits = {
        role: Circuit.entity_tracking(**model["circuit"]) for role, model in found["models"].items()
    }
    study = Study(
        models={
            "base": load_model(options.model),
            "tuned": load_model(options.model, adapter=options.adapter),
        },
        circuits=circuits,
        masks={role: model["dcm"] for role, model in found["models"].items()},
        inputs={
            "circuits": fingerprint({role: c.to_json() for role, c in circuits.items()}),
            "models": [model["fingerprint"] for model in found["models"].values()],
            "boxes": options.boxes,
            "seed": options.seed,
        },
        options=options,
        store=Store(options.out, functools.partial(print, flush=True)),
    )
    written = options.out / "more.json"
    content: Record = json.loads(written.read_text(encoding="utf-8")) if written.exists() else {}
    for part in options.only:
        content[part] = PARTS[part](study)
    study.store.write("more.json", to_json(content))


def measure_cmap(study: Study) -> Record:
    """Each model with heads of the other."""
    o = study.options
    record: Record = {}
    for into, source, n in (("base", "tuned", o.prompts), ("tuned", "base", o.back_prompts)):
        name = f"{source}_into_{into}"
        compute = functools.partial(transfer, study, into, source, n)
        masks = fingerprint(study.masks["tuned"])
        record[name] = study.step(f"cmap_{name}", compute, prompts=n, masks=masks)
    return record


def transfer(study: Study, into: str, source: str, n_prompts: int) -> Record:
    """Accuracy with each group's, and all groups', activations of the other model: of the base's
    circuit and, into the base, of the heads that were patched as published."""
    prompts = study.prompts(n_prompts)
    circuit, published = study.circuits["base"], published_heads(study)
    choices = [(name, part, p) for p in PATCHES for name, part in parts(circuit).items()]
    if into == "base":
        choices += [(name, part, "as published") for name, part in parts(published).items()]
    found = cmap_each(
        study.models[into],
        study.models[source],
        prompts,
        [(part, OUTPUT if patch not in PATCHES else patch) for _, part, patch in choices],
        batch_size=BATCH,
    )
    before, after = (
        evaluate(study.models[role], prompts, batch_size=BATCH) for role in (into, source)
    )
    entries = [
        {
            "group": name,
            "patch": patch,
            "heads": len(part),
            **answers(each),
            **share_of_gain(each, before, after),
        }
        for (name, part, patch), each in zip(choices, found, strict=True)
    ]
    right = [of.correct.cpu().numpy() for of in (after, before)]
    return {
        "into": answers(before),
        "from": answers(after),
        "gain": after.accuracy - before.accuracy,
        "gain_interval": list(paired_difference_interval(*right)),
        "entries": entries,
    }


def published_heads(study: Study) -> Circuit:
    """What the paper's CMAP patches: the fine-tune's circuit, its groups cut down to the heads that
    DCM selected."""
    selected = {
        group: selected_circuit(study.circuits["tuned"], study.masks["tuned"], kind)[group]
        for group, kind in PUBLISHED_KINDS.items()
    }
    return study.circuits["tuned"].restrict(selected)


def selected_circuit(circuit: Circuit, dcm: Record, desideratum: str) -> Circuit:
    """The heads of each group in the kept mask that was chosen for a desideratum."""
    selected = {
        mask["group"]: tuple(Head(*head) for head in mask["selected"])
        for mask in dcm["masks"]
        if mask["desideratum"] == desideratum and mask["chosen"]
    }
    return Circuit(
        tuple(Group(g.name, g.position, selected.get(g.name, ())) for g in circuit.groups)
    )


def parts(circuit: Circuit) -> dict[str, Circuit]:
    """Each group by itself, and all of them."""
    return {group.name: Circuit((group,)) for group in circuit} | {WHOLE_CIRCUIT: circuit}


def measure_random(study: Study) -> Record:
    """CMAP of found heads, of random ones of the same layers, and of every head at their tokens."""
    n = study.options.control_prompts

    def compute() -> Record:
        into, source, circuit = study.models["base"], study.models["tuned"], study.circuits["base"]
        every = [Head(n, h) for n in range(into.cfg.n_layers) for h in range(into.cfg.n_heads)]
        entries: list[Record] = []
        for name, found in parts(circuit).items():
            seed = study.options.seed + 5
            drawn = random_circuits(into, found, DRAWS, seed=seed, match="layer")
            choices = [found, *drawn, dict.fromkeys(found.heads_at(), every)]
            patched = [(heads, OUTPUT) for heads in choices]
            measured = cmap_each(into, source, study.prompts(n), patched, batch_size=BATCH)
            of_found, *of_random, of_every = map(answers, measured)
            entries.append(
                {"group": name, "found": of_found, "random": of_random, "every_head": of_every}
            )
        return {"prompts": n, "entries": entries}

    return study.step("cmap_random", compute, prompts=n, draws=DRAWS)


def measure_carries(study: Study) -> Record:
    """How often the heads that DCM chose bring the target of each kind of information."""
    o = study.options

    def compute(role: str) -> Record:
        model, circuit = study.models[role], study.circuits[role]
        kinds = list(MAIN_DESIDERATA)
        draws = desideratum_draws(model.tokenizer, kinds, o.pairs, n_boxes=o.boxes)
        chosen = {kind: selected_circuit(circuit, study.masks[role], kind) for kind in draws}
        found = carries(model, draws, chosen, seeds=[o.seed + 4], batch_size=BATCH)
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
        return {"pairs": o.pairs, "entries": entries}

    return {
        role: study.step(
            f"carries_{role}",
            functools.partial(compute, role),
            masks=fingerprint(study.masks[role]),
            pairs=o.pairs,
        )
        for role in study.models
    }


def measure_checkpoints(study: Study) -> Record:
    """What outputs of the checkpoints of the fine-tune bring the base."""
    o = study.options

    def compute(folder: Path) -> Record:
        base, model = study.models["base"], load_model(o.model, adapter=folder)
        prompts, some = study.prompts(o.checkpoint_prompts), parts(study.circuits["base"])
        patched = [(part, OUTPUT) for part in some.values()]
        found = cmap_each(base, model, prompts, patched, batch_size=BATCH)
        entries = [
            {"group": name, "patch": OUTPUT, **answers(each)}
            for name, each in zip(some, found, strict=True)
        ]
        alone = {"into": base, "from": model}
        return {
            "prompts": o.checkpoint_prompts,
            "entries": entries,
            **{
                name: answers(evaluate(of, prompts, batch_size=BATCH)) for name, of in alone.items()
            },
        }

    folders = [] if o.checkpoints is None else sorted(o.checkpoints.glob("step-*"))
    return {
        folder.name.removeprefix("step-").lstrip("0"): study.step(
            f"checkpoint_{folder.name}",
            functools.partial(compute, folder),
            prompts=o.checkpoint_prompts,
        )
        for folder in folders
    }


def answers(evaluation: Evaluation) -> Record:
    """An accuracy with its interval, and for each prompt whether it was answered right."""
    right = "".join("01"[right] for right in evaluation.correct.tolist())
    interval = list(evaluation.interval)
    return {"accuracy": evaluation.accuracy, "interval": interval, "right": right}


def share_of_gain(evaluation: Evaluation, base: Evaluation, tuned: Evaluation) -> Record:
    """The gain, and its share of the other model's, where there is one to be shared."""
    found = recovered_gain(evaluation, base, tuned)
    return {
        "gain": found.gain,
        "gain_interval": list(found.gain_interval),
        "recovered": found.recovered,
        "recovered_interval": [plain(end) for end in found.recovered_interval],
    }


PARTS: dict[str, Callable[[Study], Record]] = {
    "cmap": measure_cmap,
    "random": measure_random,
    "checkpoints": measure_checkpoints,
    "carries": measure_carries,
}

if __name__ == "__main__":
    main()
