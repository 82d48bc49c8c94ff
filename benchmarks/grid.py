"""`patch_grid` beside plain hooks, which run the whole model for every layer and token.

    python benchmarks/grid.py MODEL --out grid

Hooks run a few tokens; their seconds are scaled to all. Seconds are of the processor, one thread.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from tl_entity import discovery_pairs, load_model, patch_grid

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--boxes", type=int, default=7)
    parser.add_argument("--tokens", nargs="+", default=["previous_query_label", "last"])
    parser.add_argument("--out", default="grid")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model)
    pairs = discovery_pairs(model.tokenizer, options.pairs, n_boxes=options.boxes, seed=0)
    found = {}
    for over in ("resid_pre", "attn_out", "mlp_out"):
        start = time.process_time()
        whole = patch_grid(model, pairs, over)
        exact = time.process_time() - start
        start = time.process_time()
        some = patch_grid(model, pairs, over, tokens=options.tokens, engine="hooks")
        n_tokens = len(whole.axes["token"])
        hooks = (time.process_time() - start) * n_tokens / len(options.tokens)
        same = patch_grid(model, pairs, over, tokens=options.tokens)
        found[over] = {
            "exact_seconds": exact,
            "hooks_seconds": hooks,
            "ratio": hooks / exact,
            "tokens": n_tokens,
            "difference": float((some.per_example - same.per_example).abs().max()),
        }
        sys.stderr.write(f"{over}: {found[over]}\n")
    content = {"model": Path(options.model).stem, "pairs": options.pairs, "grids": found}
    out = RESULTS / "grids" / f"{options.out}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
