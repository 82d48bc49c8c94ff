"""Does a fine-tuned model use the same mechanism, only better?

Path patching, circuits and cross-model comparison for Llama-family models on TransformerLens.
Every name below is imported on first use, so that `import tl_entity` stays quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tl_entity.versions import check_transformer_lens

if TYPE_CHECKING:
    from tl_entity.errors import InputError as InputError
    from tl_entity.heads import Circuit as Circuit
    from tl_entity.heads import Group as Group
    from tl_entity.heads import Head as Head
    from tl_entity.heads import Node as Node
    from tl_entity.hooks.ablations import Ablation as Ablation
    from tl_entity.methods.ablations import index_ablation as index_ablation
    from tl_entity.methods.ablations import mean_head_outputs as mean_head_outputs
    from tl_entity.methods.ablations import pooled_ablation as pooled_ablation
    from tl_entity.methods.ablations import resample_ablation as resample_ablation
    from tl_entity.methods.ablations import zero_ablation as zero_ablation
    from tl_entity.methods.activation_patching import activation_patch as activation_patch
    from tl_entity.methods.activation_patching import activation_patch_each as activation_patch_each
    from tl_entity.methods.activation_patching import carries as carries
    from tl_entity.methods.attention import attention_over_prompt as attention_over_prompt
    from tl_entity.methods.attention import summarize_attention as summarize_attention
    from tl_entity.methods.attribution import logit_attribution as logit_attribution
    from tl_entity.methods.attribution import logit_lens as logit_lens
    from tl_entity.methods.behaviour import compare_behaviour as compare_behaviour
    from tl_entity.methods.circuits import Evaluation as Evaluation
    from tl_entity.methods.circuits import Faithfulness as Faithfulness
    from tl_entity.methods.circuits import evaluate as evaluate
    from tl_entity.methods.circuits import evaluate_circuits as evaluate_circuits
    from tl_entity.methods.circuits import evaluate_removals as evaluate_removals
    from tl_entity.methods.cmap import cmap as cmap
    from tl_entity.methods.cmap import cmap_by_group as cmap_by_group
    from tl_entity.methods.compare import compare as compare
    from tl_entity.methods.compare_mechanisms import MechanismComparison as MechanismComparison
    from tl_entity.methods.compare_mechanisms import compare_mechanisms as compare_mechanisms
    from tl_entity.methods.completeness import completeness as completeness
    from tl_entity.methods.corners import four_corners as four_corners
    from tl_entity.methods.dcm import HeadMask as HeadMask
    from tl_entity.methods.dcm import LearnedMasks as LearnedMasks
    from tl_entity.methods.dcm import learn_mask as learn_mask
    from tl_entity.methods.dcm import learn_masks as learn_masks
    from tl_entity.methods.discovery import Discovery as Discovery
    from tl_entity.methods.discovery import discover_circuit as discover_circuit
    from tl_entity.methods.edges import Edge as Edge
    from tl_entity.methods.edges import Edges as Edges
    from tl_entity.methods.edges import mechanism_edges as mechanism_edges
    from tl_entity.methods.gate_training import GateTraining as GateTraining
    from tl_entity.methods.grafts import graft as graft
    from tl_entity.methods.grafts import graft_curve as graft_curve
    from tl_entity.methods.judge_pair import judge_pair as judge_pair
    from tl_entity.methods.judgement import Judgement as Judgement
    from tl_entity.methods.knockout import knock_out_attention as knock_out_attention
    from tl_entity.methods.knockout import knockout_curve as knockout_curve
    from tl_entity.methods.masked_forward import MaskedForward as MaskedForward
    from tl_entity.methods.mechanism import find_mechanism as find_mechanism
    from tl_entity.methods.mechanism_groups import MechanismGroups as MechanismGroups
    from tl_entity.methods.mechanism_groups import mechanism_groups as mechanism_groups
    from tl_entity.methods.mechanism_result import Mechanism as Mechanism
    from tl_entity.methods.mib import MIBCircuit as MIBCircuit
    from tl_entity.methods.mib import mib_circuit as mib_circuit
    from tl_entity.methods.minimality import minimality as minimality
    from tl_entity.methods.nodes_evaluation import NodesEvaluation as NodesEvaluation
    from tl_entity.methods.patch_grid import patch_grid as patch_grid
    from tl_entity.methods.path_patching import HeadScores as HeadScores
    from tl_entity.methods.path_patching import MLPScores as MLPScores
    from tl_entity.methods.path_patching import path_patch as path_patch
    from tl_entity.methods.path_patching import path_patch_mlps as path_patch_mlps
    from tl_entity.methods.random_circuits import random_circuits as random_circuits
    from tl_entity.methods.stability import MechanismStability as MechanismStability
    from tl_entity.methods.stability import mechanism_stability as mechanism_stability
    from tl_entity.methods.stages import Stage as Stage
    from tl_entity.methods.weight_shares import WeightShares as WeightShares
    from tl_entity.methods.weight_shares import weight_shares as weight_shares
    from tl_entity.methods.weight_units import Unit as Unit
    from tl_entity.metrics import Metric as Metric
    from tl_entity.models.load import load_model as load_model
    from tl_entity.models.load import load_tokenizer as load_tokenizer
    from tl_entity.runs.runner import Runner as Runner
    from tl_entity.scores import Scores as Scores
    from tl_entity.tasks.batches import PairBatch as PairBatch
    from tl_entity.tasks.batches import PromptBatch as PromptBatch
    from tl_entity.tasks.boxes import box_prompts as box_prompts
    from tl_entity.tasks.boxes import load_prompts as load_prompts
    from tl_entity.tasks.desiderata import DESIDERATA as DESIDERATA
    from tl_entity.tasks.desiderata import Desideratum as Desideratum
    from tl_entity.tasks.desiderata import desideratum_draws as desideratum_draws
    from tl_entity.tasks.desiderata import desideratum_pairs as desideratum_pairs
    from tl_entity.tasks.own import dataset_pairs as dataset_pairs
    from tl_entity.tasks.own import dataset_prompts as dataset_prompts
    from tl_entity.tasks.own import marked_pairs as marked_pairs
    from tl_entity.tasks.own import marked_prompts as marked_prompts
    from tl_entity.tasks.pairs import discovery_pairs as discovery_pairs
    from tl_entity.tasks.shipped.draw import TASKS as TASKS
    from tl_entity.tasks.shipped.draw import task_pairs as task_pairs
    from tl_entity.tasks.shipped.draw import task_prompts as task_prompts
    from tl_entity.tasks.shipped.draw import task_words as task_words

__version__ = "0.1.0"

_HOME = {
    "Ablation": "hooks.ablations",
    "activation_patch": "methods.activation_patching",
    "activation_patch_each": "methods.activation_patching",
    "attention_over_prompt": "methods.attention",
    "box_prompts": "tasks.boxes",
    "carries": "methods.activation_patching",
    "Circuit": "heads",
    "cmap": "methods.cmap",
    "cmap_by_group": "methods.cmap",
    "compare": "methods.compare",
    "compare_behaviour": "methods.behaviour",
    "compare_mechanisms": "methods.compare_mechanisms",
    "completeness": "methods.completeness",
    "dataset_pairs": "tasks.own",
    "dataset_prompts": "tasks.own",
    "DESIDERATA": "tasks.desiderata",
    "Desideratum": "tasks.desiderata",
    "desideratum_draws": "tasks.desiderata",
    "desideratum_pairs": "tasks.desiderata",
    "discover_circuit": "methods.discovery",
    "Discovery": "methods.discovery",
    "discovery_pairs": "tasks.pairs",
    "Edge": "methods.edges",
    "Edges": "methods.edges",
    "evaluate": "methods.circuits",
    "evaluate_circuits": "methods.circuits",
    "evaluate_removals": "methods.circuits",
    "Evaluation": "methods.circuits",
    "Faithfulness": "methods.circuits",
    "find_mechanism": "methods.mechanism",
    "four_corners": "methods.corners",
    "GateTraining": "methods.gate_training",
    "graft": "methods.grafts",
    "graft_curve": "methods.grafts",
    "Group": "heads",
    "Head": "heads",
    "HeadMask": "methods.dcm",
    "HeadScores": "methods.path_patching",
    "index_ablation": "methods.ablations",
    "InputError": "errors",
    "judge_pair": "methods.judge_pair",
    "Judgement": "methods.judgement",
    "knock_out_attention": "methods.knockout",
    "knockout_curve": "methods.knockout",
    "learn_mask": "methods.dcm",
    "learn_masks": "methods.dcm",
    "LearnedMasks": "methods.dcm",
    "load_model": "models.load",
    "logit_attribution": "methods.attribution",
    "logit_lens": "methods.attribution",
    "load_prompts": "tasks.boxes",
    "load_tokenizer": "models.load",
    "marked_pairs": "tasks.own",
    "marked_prompts": "tasks.own",
    "MaskedForward": "methods.masked_forward",
    "mean_head_outputs": "methods.ablations",
    "Mechanism": "methods.mechanism_result",
    "mechanism_edges": "methods.edges",
    "mechanism_groups": "methods.mechanism_groups",
    "mechanism_stability": "methods.stability",
    "MechanismComparison": "methods.compare_mechanisms",
    "MechanismGroups": "methods.mechanism_groups",
    "MechanismStability": "methods.stability",
    "Metric": "metrics",
    "mib_circuit": "methods.mib",
    "MIBCircuit": "methods.mib",
    "minimality": "methods.minimality",
    "MLPScores": "methods.path_patching",
    "PairBatch": "tasks.batches",
    "Node": "heads",
    "NodesEvaluation": "methods.nodes_evaluation",
    "patch_grid": "methods.patch_grid",
    "path_patch": "methods.path_patching",
    "path_patch_mlps": "methods.path_patching",
    "pooled_ablation": "methods.ablations",
    "PromptBatch": "tasks.batches",
    "random_circuits": "methods.random_circuits",
    "resample_ablation": "methods.ablations",
    "Runner": "runs.runner",
    "Scores": "scores",
    "Stage": "methods.stages",
    "summarize_attention": "methods.attention",
    "task_pairs": "tasks.shipped.draw",
    "task_prompts": "tasks.shipped.draw",
    "task_words": "tasks.shipped.draw",
    "TASKS": "tasks.shipped.draw",
    "Unit": "methods.weight_units",
    "weight_shares": "methods.weight_shares",
    "WeightShares": "methods.weight_shares",
    "zero_ablation": "methods.ablations",
}
"""The module in which each public name is defined."""

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        check_transformer_lens()
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
