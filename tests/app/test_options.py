"""The options of consistency-app."""

import pytest
from omegaconf import OmegaConf

from consistency.commands.checks import check
from consistency.config import CONF_DIR


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("ckpt", "outputs/run", None),
        ("port", 7860, None),
        ("port", 0, "port is 0; allowed: an integer, at least 1 and at most 65535"),
        ("port", "http", "port is http"),
        ("host", "", "host is ''; allowed: a name"),
        ("host", None, "host is None"),
        ("max_upload_mb", 0, "max_upload_mb is 0"),
        ("max_upload_mb", None, "max_upload_mb is None"),
    ],
)
def test_options_are_checked_before_torch_is_imported(option, value, words):
    cfg = OmegaConf.merge(OmegaConf.load(CONF_DIR / "app.yaml"), {"ckpt": "run", option: value})
    if words is None:
        check("app", cfg)
        return
    with pytest.raises(ValueError, match="^" + words.replace(".", r"\.")):
        check("app", cfg)
