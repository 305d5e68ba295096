"""The examples run from another folder, and the notebook has the script's cells.

Run: python -m pytest tests/test_examples.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.notebook import cells_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, NOTEBOOK = (ROOT / "examples" / f"doors.{kind}" for kind in ("py", "ipynb"))


def cells_of_notebook() -> list[tuple[str, str]]:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]


def test_the_notebook_has_the_cells_of_the_script_and_no_output():
    assert cells_of_notebook() == cells_of(SCRIPT.read_text(encoding="utf-8"))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)


def test_the_cells_run_from_another_folder(tmp_path):
    """As a notebook runs them: one after another, without a file of their own."""
    code = "\n\n".join(text for kind, text in cells_of_notebook() if kind == "code")
    result = subprocess.run([sys.executable, "-"], input=code, cwd=tmp_path, text=True,
                            capture_output=True, env={**os.environ, "DGPO": str(ROOT)})
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("[('Paper Lake (novel)'")
    assert "[('Dario Quist', 0.0), ('Tessa Wexler', 1.0)]" in lines
    losses = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("step ")]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0] < 1


def test_the_script_is_called_from_another_folder(tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, text=True,
                            capture_output=True)  # fmt: skip
    assert result.returncode == 0 and result.stdout.count("step ") == 3, result.stderr
