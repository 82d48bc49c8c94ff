"""Where information passes from token to token: attention knocked out from each layer up."""

from tl_entity.methods.knockout import KnockoutCurves, knockout_curve
from tl_entity.study.experiments import Bench
from tl_entity.study.store import Step
from tl_entity.tasks.batches import ANSWER_POSITION

KNOCKOUT = Step(KnockoutCurves)

CONTROL_DRAWS = 3
"""How often the control draws another token in place of the one that is hidden."""


def knock_out_flow(bench: Bench) -> KnockoutCurves:
    """Accuracy by first knocked-out layer for each pair of tokens, with the random control."""
    prompts = bench.test_prompts()
    seed = bench.seed("knockout")
    hidden = bench.design.task.hidden
    if hidden is None:
        others = [name for name in prompts.positions if name != ANSWER_POSITION]
        hidden = tuple((ANSWER_POSITION, name) for name in others)

    def compute() -> KnockoutCurves:
        runs = (bench.model.cfg.n_layers * (1 + CONTROL_DRAWS) + 1) * len(prompts)
        with bench.progress(f"{bench.role}: knockout", len(hidden) * runs) as done:
            curves = [
                knockout_curve(
                    bench.model,
                    prompts,
                    from_position=from_position,
                    to_position=to_position,
                    random_draws=CONTROL_DRAWS,
                    seed=seed,
                    progress=done,
                    **bench.how,
                )
                for from_position, to_position in hidden
            ]
        return KnockoutCurves(tuple(curves))

    asked = {**bench.tested_on, "seed": seed, "pairs": hidden, "draws": CONTROL_DRAWS}
    return bench.step("knockout", KNOCKOUT, asked, compute)
