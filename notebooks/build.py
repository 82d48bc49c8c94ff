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
from PIL import Image
from tl_entity.plots.render import PngRenderer

class Stored(MimetypeRenderer):
    def __init__(self):
        self.draw = PngRenderer().__enter__()

    def to_mimebundle(self, figure):
        picture = Image.open(io.BytesIO(self.draw(go.Figure(figure), width=820)))
        small = io.BytesIO()
        picture.convert("RGB").quantize(128, dither=0).save(small, "png", optimize=True)
        return {"image/png": base64.b64encode(small.getvalue()).decode()}

pio.renderers["stored"] = Stored()
pio.renderers.default = "stored"
"""


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells with this folder as the current one; an error in a cell is raised."""
    ran = nbformat.from_dict(notebook)
    ran.cells.insert(0, nbformat.v4.new_code_cell(SET_UP))
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
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
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


def main(names: list[str]) -> None:
    """Build these notebooks, or all."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        nbformat.write(clean(execute(nbformat.read(path, as_version=4), FOLDER)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
