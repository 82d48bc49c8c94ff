"""Run the notebooks from top to bottom and store them with what they show.

    python notebooks/build.py [NAME ...]

Pictures are stored as PNG, so that they show where no code runs; run live, they are interactive.
Whatever differs from machine to machine or from run to run is left out.
"""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent

SECONDS = 600
"""A cell that takes longer is stopped."""

SET_UP = """
import base64
import io
import plotly.graph_objects as go
import plotly.io as pio
from plotly.io.base_renderers import MimetypeRenderer

class Stored(MimetypeRenderer):
    def to_mimebundle(self, figure):
        return {"image/png": base64.b64encode(picture(go.Figure(figure))).decode()}

pio.renderers["stored"] = Stored()
pio.renderers.default = "stored"
"""

DRAW = """
from PIL import Image
from tl_entity.plots.render import PngRenderer

draw = PngRenderer().__enter__()

def picture(figure):
    drawn, small = Image.open(io.BytesIO(draw(figure, width=820))), io.BytesIO()
    few = drawn.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=0)
    few.save(small, "png", optimize=True)
    return small.getvalue()
"""

DO_NOT_DRAW = """
def picture(figure):
    return figure.to_json().encode()
"""


def execute(notebook: Any, folder: Path, *, draw: bool = True) -> Any:
    """Run all cells with this folder as the current one; an error in a cell is raised.

    Without `draw`, figures are made and written out in full, but not as pictures.
    """
    ran = nbformat.from_dict(notebook)
    ran.cells.insert(0, nbformat.v4.new_code_cell(SET_UP + (DRAW if draw else DO_NOT_DRAW)))
    os.environ.setdefault("TQDM_DISABLE", "1")
    NotebookClient(
        ran, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    del ran.cells[0]
    return ran


def clean(notebook: Any) -> Any:
    """The notebook without machine noise: fixed cell ids, cells counted from one, no messages of
    libraries, no metadata but the language."""
    count = 0
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _joined([o for o in cell.outputs if o.get("name") != "stderr"])
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = {}
            if "execution_count" in output:
                output.execution_count = count
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """Printed text as one output, in however many pieces it came."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main(names: list[str]) -> None:
    """Build these notebooks, or all."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        nbformat.write(clean(execute(nbformat.read(path, as_version=4), FOLDER)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
