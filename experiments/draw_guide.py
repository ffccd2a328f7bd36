"""Runs the code of docs/python.md and keeps its pictures as docs/images/guide_*.png.

Needs outputs/digits_ict and outputs/digits_edm_guided (see measure_editing.py). python experiments/draw_guide.py
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Run the blocks one after the other in one namespace, in the folder that holds outputs/."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    for picture in re.findall(r"images/guide_(\w+\.png)", (DOCS / "python.md").read_text()):
        shutil.move(picture, DOCS / "images" / f"guide_{picture}")
    for leftover in ("superresolve.png", "denoise.png"):
        Path(leftover).unlink()


if __name__ == "__main__":
    main()
