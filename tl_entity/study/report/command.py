"""The findings for a terminal, and the command that finds them again."""

import json
import shlex
from typing import Any

from tl_entity.studies.entity_tracking import GROUPS
from tl_entity.study.report.cells import (
    main_accuracy,
    mechanism_sentence,
    prompts_words,
    ratio_text,
    share_text,
    size,
    sizes_text,
)
from tl_entity.study.settings import Settings
from tl_entity.study.task_settings import PAPER


def summary(results: dict[str, Any]) -> list[str]:
    """The main findings, a line each, for a terminal."""
    lines = []
    for model in results["models"].values():
        accuracy = share_text(main_accuracy(results, model))
        lines.append(f"{model['label']}: accuracy {accuracy} on {prompts_words(results)}")
        if model["no_circuit"] is not None:
            lines.append(f"{model['label']}: no circuit was looked for; {model['no_circuit']}.")
            continue
        if "mechanism" in model:
            lines.append(mechanism_sentence(model))
        if "circuit" not in model:
            continue
        sizes = sizes_text(model["circuit"], results["task"]["groups"])
        line = f"{model['label']}: circuit of {size(model)} heads ({sizes})"
        if "faithfulness" in model:
            control = model["faithfulness"]["random"]
            beside = f", random circuits {control['mean']:.3f}" if control["accuracies"] else ""
            line += f", faithfulness {ratio_text(model['faithfulness'])}{beside}"
        lines.append(line)
    lines += [f"{finding['question']} {finding['answer']}" for finding in results["verdict"]]
    return lines


def command(settings: dict[str, Any]) -> str:
    """The command line that does the same again, all settings written out."""
    words = ["tl-entity", "reproduce"]
    if "task" in settings:
        words = ["tl-entity", "study", "--task", settings["task"]]
        words += ["--recipe", settings["recipe"]] if settings["recipe"] else []
        words += ["--knowing", ",".join(settings["knowing"])] if settings["knowing"] else []
        words += ["--joined"] * settings["joined"]
    words += ["--base", settings["base"]]
    words += ["--tuned", settings["tuned"] or "none"]
    if settings["control"] is not None:
        words += ["--control", settings["control"]]
    for role in ("base", "tuned", "control"):
        if settings[f"{role}_adapter"] is not None:
            words += [f"--{role}-adapter", settings[f"{role}_adapter"]]
    words += ["--prompts", str(settings["prompts"])]
    if settings["pairs"] is not None:
        words += ["--pairs", str(settings["pairs"])]
    words += ["--boxes", str(settings["boxes"])]
    if settings.get("recipe", PAPER) == PAPER and set(settings["sizes"]) == set(GROUPS):
        words += _sizes(settings)
    words += ["--random-circuits", str(settings["random_circuits"])]
    words += _mechanism(settings)
    words += ["--mask-pairs", str(settings["mask_pairs"])]
    words += ["--sparsity", ",".join(map(str, settings["sparsities"]))]
    words += ["--mask-seeds", str(settings["mask_seeds"]), "--draws", str(settings["draws"])]
    if settings["only"] is not None:
        words += ["--only", ",".join(settings["only"])]
    words += ["--ceiling"] * settings.get("ceiling", False)
    words += ["--all-pairs"] * settings["all_pairs"]
    words += ["--seed", str(settings["seed"]), "--engine", settings["engine"]]
    if settings["batch_size"] is not None:
        words += ["--batch-size", str(settings["batch_size"])]
    if settings["memory"] is not None:
        words += ["--memory", f"{settings['memory']:g}"]
    words += ["--dtype", settings["dtype"]]
    words += ["--matmul-precision", settings["matmul_precision"]]
    words += ["--no-png"] * (not settings["png"])
    if settings["device"] is not None:
        words += ["--device", settings["device"]]
    return shlex.join([*words, "--out", "results"])


def _mechanism(settings: dict[str, Any]) -> list[str]:
    """The options of mechanism and gain, where they are not the usual ones."""
    words: list[str] = []
    for name in ("mechanism_prompts", "target", "agreement", "gain_prompts"):
        if settings[name] != getattr(Settings, name):
            words += [f"--{name.replace('_', '-')}", f"{settings[name]:g}"]
    if settings["gate_training"] is not None:
        words += ["--gate-training", json.dumps(settings["gate_training"])]
    return words + ["--edges"] * settings["edges"]


def _sizes(settings: dict[str, Any]) -> list[str]:
    """The options of the paper's groups."""
    sizes, receivers = settings["sizes"], settings["receiver_sizes"]
    kept = [str(sizes[group]) for group in GROUPS]
    into = [str(receivers.get(group, sizes[group])) for group in GROUPS[:-1]]
    return ["--sizes", ",".join(kept), "--receiver-sizes", ",".join(into)]
