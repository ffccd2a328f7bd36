"""The code of docs/training_step.md, extending.md and library.md, as it stands there."""

import ast
import inspect
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException

import forked
from consistency.methods.training import ConsistencyTraining
from consistency.models import register

ROOT = Path(__file__).parents[1]
# Appended to the commands of a page: what they do is theirs, how long it takes is ours.
FEW_STEPS = {
    "train": (
        "trainer.max_steps=6",
        "trainer.accelerator=cpu",
        "data.batch_size=16",
        "callbacks.quality=null",
        "callbacks.sample_grid.num_samples=4",
        "callbacks.log.every_n_steps=2",
    ),
    "sample": ("num_samples=4", "device=cpu"),
    "edit": ("num_images=2", "steps=2", "device=cpu"),
    "data": (),
}


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def write_files(folder: Path) -> list[str]:
    """The files of extending.md, each named by its first line; returns their names."""
    names = []
    for block in blocks("extending.md", "python") + blocks("extending.md", "yaml"):
        name = re.match(r"# (\S+\.(?:py|yaml))\n", block)
        assert name, f"a block of extending.md has no file name in its first line:\n{block}"
        (folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
        (folder / name[1]).write_text(block)
        names.append(name[1])
    return names


def without_docstring(function) -> str:
    """Source of a method at the margin, without its docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    lines, doc = source.splitlines(), ast.parse(source).body[0].body[0]
    return "\n".join(lines[: doc.lineno - 1] + lines[doc.end_lineno :])


def test_the_step_of_the_page_is_that_of_the_source():
    (shown,) = blocks("training_step.md", "python")
    for method in (ConsistencyTraining.neighbour, ConsistencyTraining.step):
        assert textwrap.indent(without_docstring(method), "    ") in shown


@pytest.mark.parametrize("page", ["training_step.md", "extending.md", "library.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / "docs" / page).read_text()
    named = set(re.findall(r"`((?:callbacks|data|methods|models|noise|runs|sampling|checkpoints)/\w+\.py)`", text))
    assert [name for name in sorted(named) if not (ROOT / "src" / "consistency" / name).exists()] == []


def test_options_that_the_table_of_a_step_names_exist():
    """Groups and their files: `levels=ratio`, and options of the composed configuration: `data.sigma_data`."""
    from omegaconf import OmegaConf

    from composing import composed
    from consistency import config

    text = (ROOT / "docs" / "training_step.md").read_text()
    ict, cd = (composed("train", f"experiment=digits_{name}") for name in ("ict", "cd"))
    for group, choice in re.findall(r"`(\w+)=(\w+)`", text):
        if (config.CONF_DIR / group).is_dir():
            assert (config.CONF_DIR / group / f"{choice}.yaml").exists(), f"{group}={choice}"
        else:
            assert group in ict, group
    options = re.findall(r"`((?:callbacks|curriculum|data|method|model|optimizer|trainer)\.[\w.]+)`", text)
    assert options
    for option in options:
        found = [OmegaConf.select(cfg, option, throw_on_missing=False, default="no") for cfg in (ict, cd)]
        assert found != ["no", "no"], option


def test_library_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, page = {}, blocks("library.md", "python")
    assert page[0].count("steps = 40 ") == 1
    for block in page:
        assert len(block.splitlines()) <= 30
        block = block.replace("steps = 40 ", "steps = 4 ")
        exec(compile(block, "docs/library.md", "exec"), names)
    assert (tmp_path / "samples.png").exists()


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder with the files of extending.md, from which they can be imported."""
    names = write_files(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for kind, classes in register._CLASSES.items():  # what the files register is forgotten afterwards
        monkeypatch.setitem(register._CLASSES, kind, dict(classes))
    yield tmp_path
    for name in names:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_files_of_extending_are_short_and_do_what_their_seam_asks(user):
    assert all(len(file.read_text().splitlines()) < 40 for file in user.glob("*.py"))
    from functools import partial

    import my_data
    import my_levels
    import my_method
    import my_metric
    import my_network
    import my_parametrization
    import my_sampler

    from consistency import Denoiser
    from consistency.methods.base import Random
    from consistency.methods.metrics import l1
    from consistency.noise.levels import LogNormal
    from consistency.noise.weightings import uniform

    network = my_network.MLP(image_size=8, in_channels=1, num_classes=2, width=16)
    denoiser = Denoiser(network, my_parametrization.PredictX(sigma_data=1.0), sigma_max=2.0)
    assert Denoiser.from_config(denoiser.config).config == denoiser.config
    options = {
        "levels": LogNormal(),
        "weighting": uniform,
        "metric": l1,
        "optimizer": partial(torch.optim.Adam, lr=0.1),
    }
    method = my_method.LearnedWeight(denoiser, **options)
    data = my_data.Stripes()
    images = torch.stack([data[index][0] for index in range(4)]) / 127.5 - 1
    optimizer = method.configure_optimizers()["optimizer"]
    before = [parameter.clone() for parameter in method.u.parameters()]
    step = method.step(images, data.labels[:4], 0, Random())
    assert step.loss.shape == step.sigma.shape == (4,)
    step.loss.mean().backward()
    optimizer.step()
    assert all((old != new).any() for old, new in zip(before, method.u.parameters(), strict=True))
    levels = my_levels.LogUniformPairs(0.002, 80.0, total_steps=10)
    lo, hi = levels(10, torch.tensor([0.0, 0.5, 1 - 1e-9], dtype=torch.float64))
    assert hi.tolist() == pytest.approx([80.0, 0.4, 0.002])
    assert (lo / hi).tolist() == pytest.approx([255 / 256] * 3)
    assert my_metric.root_mean_square(images, images + 2).tolist() == pytest.approx([2.0] * 4)
    with torch.no_grad():
        assert my_sampler.Halving(3)(denoiser.eval(), torch.randn(4, 1, 8, 8), data.labels[:4]).shape == (4, 1, 8, 8)


def said(action) -> str:
    """The line that a user sees of an error."""
    try:
        action()
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else None
        return str(cause or error).splitlines()[0]
    raise AssertionError("no error")


def test_errors_of_extending_are_as_the_page_says(user):
    from functools import partial

    import my_data
    import my_network
    import my_sampler
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from consistency import ConsistencyTraining, Denoiser, config, load, register_network, save_denoiser
    from consistency.commands.build import make_method
    from consistency.commands.rundata import _own_parts
    from consistency.commands.sample import check_sampler
    from consistency.data.module import ImageDataModule
    from consistency.methods.metrics import l2
    from consistency.noise.levels import LogNormal
    from consistency.noise.weightings import inverse_gap

    class Nameless(torch.nn.Module):
        in_channels, num_classes = 1, 0

    @register_network("with_function")
    class WithFunction(Nameless):
        image_size = 8

        def __init__(self, act):
            super().__init__()

    denoiser = Denoiser(my_network.MLP(image_size=8, in_channels=1, width=16))
    save_denoiser(denoiser, user / "model", {})
    config.register()
    one = {
        "optimizer": partial(torch.optim.Adam, lr=0.1),
        "levels": LogNormal(),
        "metric": l2,
        "weighting": inverse_gap,
    }
    lines = [
        said(lambda: Denoiser(Nameless())),
        said(lambda: Denoiser(WithFunction(torch.nn.SiLU())).config),
        said(lambda: register.import_modules(["nowhere"])),
        said(lambda: ConsistencyTraining(denoiser, **one)),
        said(lambda: make_method(OmegaConf.create({"method": {"_target_": "torch.nn.Identity"}}))),
        said(lambda: ImageDataModule(my_data.Stripes(), batch_size=8, seed=0, image_size=16, channels=1).setup("fit")),
        said(lambda: check_sampler(my_sampler.Halving(), "consistency", "outputs/my_network")),
        said(lambda: _own_parts({"_target_": "my_data.Stripes"}, Path("outputs/my_data/config.yaml"))),
    ]
    Nameless.image_size = 8
    lines.append(said(lambda: Denoiser(Nameless()).config))
    del register._CLASSES["network"]["my_mlp"]
    lines.append(said(lambda: load(user / "model", device="cpu")))
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        base = ["experiment=digits_edm", "trainer.accelerator=cpu"]
        cfg = compose("train", overrides=[*base, "parametrization._target_=my_parametrization.PredictX"])
        lines.append(said(lambda: instantiate(cfg.method, _convert_="object")))
        mine = f"hydra.searchpath=[file://{user / 'my_conf'}]"
        lines.append(said(lambda: compose("train", overrides=[mine, *base, "parametrization=predict_x"])))
    text = (ROOT / "docs" / "extending.md").read_text().split("## What is said when something is missing")[1]
    quoted = re.findall(r"^\| `(.+?)` \|", text, flags=re.MULTILINE)
    assert len(quoted) == len(lines)
    for line in quoted:
        pattern = ".*".join(re.escape(part) for part in line.split("..."))
        assert any(re.search(pattern, error) for error in lines), (line, lines)


@pytest.mark.slow
def test_commands_of_extending_run(tmp_path):
    write_files(tmp_path)
    commands = [line for block in blocks("extending.md", "bash") for line in block.splitlines()]
    assert len(commands) > 12
    for command in commands:
        name, *arguments = shlex.split(command)
        name = name.removeprefix("consistency-")
        forked.command(name, *arguments, *FEW_STEPS[name], cwd=tmp_path)
    for picture in re.findall(r"out=(\S+\.png)", "\n".join(commands)):
        assert (tmp_path / picture).exists()
    assert (tmp_path / "edits" / "grid.png").exists()
    header = (tmp_path / "outputs" / "my_method" / "metrics.csv").read_text().splitlines()[0]
    assert "u" in header.split(",")
    assert "ratio" in (tmp_path / "outputs" / "my_levels" / "metrics.csv").read_text().splitlines()[0].split(",")
