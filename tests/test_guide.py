"""The Python blocks of README and docs/python.md run as they stand, on small models in place of trained ones."""

import re
from pathlib import Path

import pytest

from consistency import save_denoiser

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_code_runs(page, make_denoiser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"image_size": 8, "num_classes": 10}
    save_denoiser(make_denoiser(**options), tmp_path / "outputs" / "digits_ict", {"method": "ConsistencyTraining"})
    edm = make_denoiser(boundary=0.0, label_dropout=0.1, **options)
    save_denoiser(edm, tmp_path / "outputs" / "digits_edm_guided", {"method": "EDM"})
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    names = {}
    for block in blocks:
        exec(block, names)
    for picture in re.findall(r"images/guide_(\w+\.png)", text):
        assert (tmp_path / picture).exists()
        assert (ROOT / "docs" / "images" / f"guide_{picture}").exists()
