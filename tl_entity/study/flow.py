"""Where information passes from token to token: attention knocked out from each layer up."""

from tl_entity.methods.knockout import KnockoutCurve, knockout_curve
from tl_entity.study.experiments import Bench, accuracy_record
from tl_entity.study.store import Outcome, Record

KNOCKOUTS: tuple[tuple[str, str], ...] = (
    ("last", "correct_object"),
    ("last", "query_label"),
    ("query_label", "previous_query_label"),
)
"""From which token to which attention is knocked out (paper, appendix)."""

CONTROL_DRAWS = 3
"""How often the control draws another token in place of the one that is hidden."""


def knock_out_flow(bench: Bench) -> Record:
    """Accuracy by first knocked-out layer for each pair of tokens, with the random control."""
    s = bench.settings
    prompts = bench.test_prompts()
    seed = bench.seed("knockout")
    asked = {
        "prompts": s.prompts,
        "boxes": s.boxes,
        "test": bench.seeds["faithfulness"],
        "seed": seed,
        "pairs": [list(pair) for pair in KNOCKOUTS],
        "engine": s.engine,
    }

    def compute() -> Outcome:
        curves = []
        runs = (bench.model.cfg.n_layers * (1 + CONTROL_DRAWS) + 1) * len(prompts)
        with bench.progress(f"{bench.role}: knockout", len(KNOCKOUTS) * runs) as done:
            for from_position, to_position in KNOCKOUTS:
                curve = knockout_curve(
                    bench.model,
                    prompts,
                    from_position=from_position,
                    to_position=to_position,
                    random_draws=CONTROL_DRAWS,
                    seed=seed,
                    engine=s.engine,
                    batch_size=bench.batch_size,
                    memory=bench.settings.memory_bytes,
                    progress=done,
                )
                curves.append(_curve_record(curve))
        return {"curves": curves}, {}

    return bench.step("knockout", asked, compute)[0]


def _curve_record(curve: KnockoutCurve) -> Record:
    control = curve.control_accuracy
    return {
        "from": curve.from_position,
        "to": curve.to_position,
        "whole": accuracy_record(curve.whole),
        "layers": [accuracy_record(evaluation) for evaluation in curve.evaluations],
        "control": {
            "mean": control.mean(0).tolist(),
            "lowest": control.min(0).tolist(),
            "highest": control.max(0).tolist(),
        },
    }
