"""Draw the pictures of these pages from a folder that `tl-entity reproduce` has filled.

tl-entity reproduce --out results
python docs/figures/draw.py results
"""

import io
import sys
from pathlib import Path

from PIL import Image

from tl_entity import (
    attention_over_prompt,
    compare,
    discover_circuit,
    discovery_pairs,
    evaluate,
    load_model,
)
from tl_entity.plots.render import PngRenderer
from tl_entity.study.figures import figures_of
from tl_entity.study.folder import STUDY
from tl_entity.study.mechanism_figures import mechanism_figures
from tl_entity.study.results import Study

FROM_RESULTS = {
    "accuracy": "accuracy",
    "heatmaps": "base_heatmaps",
    "circuit": "base_circuit",
    "faithfulness": "faithfulness",
    "completeness": "tuned_completeness",
    "minimality": "tuned_minimality",
    "carries": "tuned_carries_own_heads",
    "knockout": "tuned_knockout",
    "cmap": "cmap_tuned_into_base",
}

SIZES = {"value_fetcher": 2, "pos_transmitter": 2, "pos_detector": 2, "struct_reader": 4}


def attention_and_comparison():
    """Of the pair that ships: a fetcher over a prompt that the base answers wrong; both circuits
    compared."""
    base, tuned = load_model("default-base"), load_model("default-tuned")
    pairs = discovery_pairs(base.tokenizer, 150, n_boxes=7, seed=0)
    right = evaluate(base, pairs.clean).correct
    both = pairs[(right & evaluate(tuned, pairs.clean).correct).nonzero().squeeze(1)]
    found = [discover_circuit(model, both, sizes=SIZES) for model in (base, tuned)]
    wrong = int((~right).nonzero()[0])
    fetcher = found[0].circuit["value_fetcher"][:1]
    models = {"base": base, "tuned": tuned}
    attention = attention_over_prompt(models, pairs.clean, fetcher, index=wrong)
    return {
        "attention": attention.plot(),
        "comparison": compare(*found, paired=True).plot(),
    }


def main(results: Path) -> None:
    """Write all pictures beside this file."""
    study = Study.load(results / STUDY)
    drawn = {**figures_of(study), **mechanism_figures(study)}
    figures = {name: drawn[source] for name, source in FROM_RESULTS.items()}
    figures |= attention_and_comparison()
    with PngRenderer() as renderer:
        for name, figure in figures.items():
            picture = Image.open(io.BytesIO(renderer(figure, width=900)))
            path = Path(__file__).with_name(f"{name}.png")
            picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=0).save(
                path, optimize=True
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
