import pytest

from consistency.validation.ranges import check_ranges


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("metric.c", -1),
        ("callbacks.weight_ema.decays", 0.99),
        ("callbacks.sample_grid.num_samples", 0),
        ("callbacks.sample_grid.every_n_images", -1),
        ("callbacks.quality.every_n_images", -1),
        ("optimizer.betas", [2, 3]),
        ("optimizer.weight_decay", float("nan")),
        ("trainer.devices", -3),
        ("trainer.precision", "foo"),
        ("trainer.accelerator", "tpux"),
        ("trainer.gradient_clip_val", -1),
        ("trainer.num_nodes", True),
        ("callbacks.nonfinite.wait", "perhaps"),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(option, value):
    keys = option.split(".")
    settings = value
    for key in reversed(keys):
        settings = {key: settings}
    with pytest.raises(ValueError, match=rf"^{option} is .*; allowed: "):
        check_ranges(settings)


def test_what_is_allowed_passes():
    check_ranges({"trainer": {"devices": "auto", "precision": "bf16-mixed"}, "metric": {"c": 0.03}, "callbacks": {}})
    check_ranges({"metric": {"c": 0.0}})  # the plain norm: ECT
    for devices in (1, 2, -1, "2", "0,1", [0, 1]):
        check_ranges({"trainer": {"devices": devices, "gradient_clip_val": None}})
