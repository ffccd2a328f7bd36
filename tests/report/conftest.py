"""Small study folders, written by hand as the commands write them."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

TARGETS = {"l2": "consistency.methods.metrics.l2", "pseudo_huber": "consistency.methods.metrics.pseudo_huber"}


def composed(seed, *, metric="l2", c=None, lr=0.001, start=10, steps=100, variant=None, batch_size=128, dropout=0):
    """`.hydra/config.yaml`: settings as composed, with references."""
    return {
        "seed": seed,
        "run_name": "${consistency.run_name:x}",
        "study_name": "study",
        "variant": variant,
        "data": {"_target_": "consistency.data.module.ImageDataModule", "seed": "${seed}", "batch_size": batch_size},
        "metric": {"_target_": TARGETS.get(metric, metric), "_partial_": True, **({"c": c} if c is not None else {})},
        "optimizer": {"_target_": "torch.optim.RAdam", "lr": lr},
        "curriculum": {
            "start": start,
            "num_levels": {"start": "${curriculum.start}", "total_steps": "${trainer.max_steps}"},
        },
        "trainer": {"max_steps": steps},
        "network": {"dropout": dropout},
        "samplers": {"onestep": {"mid_sigmas": []}, "twostep": {"mid_sigmas": [0.821]}},
        "method": {"_target_": "consistency.methods.training.ConsistencyTraining", "metric": "${metric}"},
        "callbacks": {
            "quality": {"samplers": "${samplers}", "dirpath": "${paths.output_dir}"},
            "sample_grid": {"num_samples": 4, "dirpath": "${paths.output_dir}/samples"},
        },
        "paths": {"output_dir": "${hydra:runtime.output_dir}", "data_dir": ".data"},
    }


def resolved(tree, folder):
    """`config.yaml`: the same with values in place of references."""
    text = {"${hydra:runtime.output_dir}": str(folder), "${paths.output_dir}": str(folder)}

    def walk(node):
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        if not isinstance(node, str) or "${" not in node:
            return node
        for reference, value in text.items():
            node = node.replace(reference, value)
        if node.startswith("${consistency"):
            return folder.name
        if node.startswith("${"):
            found = tree
            for key in node[2:-1].split("."):
                found = found[key]
            return walk(found)
        return node

    return walk(tree)


def quality_rows(onestep, twostep=None, *, every=100, **about):
    """Lines of `quality.jsonl`, as two samplers give them."""
    rows = []
    for index, values in enumerate(zip(onestep, twostep or onestep, strict=True), start=1):
        for sampler, value in zip(("onestep", "twostep"), values, strict=True):
            place = {"images_seen": index * every, "step": index * every // 10}
            protocol = {"nfe": 1, "seed": 1_000_000, "num_samples": 1797, "weights": "ema0.999", **about}
            rows.append({**place, "name": sampler, "fd_classifier": float(value), **protocol})
    return rows


class StudyFolder:
    """A folder with the files that a sweep leaves."""

    def __init__(self, path):
        self.path, self.listed = path, {}
        path.mkdir(parents=True)

    def run(
        self,
        name,
        *overrides,
        seed=0,
        scores=(40.0, 20.0),
        twostep=None,
        state="finished",
        listed=True,
        about=None,
        **own,
    ):
        """Write one run directory; `scores` at 100, 200, ... images."""
        folder = self.path / name
        (folder / ".hydra").mkdir(parents=True)
        tree = composed(seed, **own)
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
        (folder / "config.yaml").write_text(yaml.safe_dump(resolved(tree, folder), sort_keys=False))
        seen = 100 * len(scores)
        self.status(name, state=state, step=seen // 10, images_seen=seen, seconds=60.0 + seed)
        rows = quality_rows(scores, twostep, **(about or {}))
        (folder / "quality.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"{i * 5},{1 / i},{2 + i},{i * 50}\n" for i in range(1, 2 * len(scores) + 1)]
        (folder / "metrics.csv").write_text("step,loss,num_levels,images_seen\n" + "".join(lines))
        if listed:
            self.listed[name] = {"overrides": [*overrides]}
        return folder

    def status(self, name, **status):
        (self.path / name).mkdir(parents=True, exist_ok=True)
        (self.path / name / "status.json").write_text(json.dumps(status))

    def grid(self, name, sampler="onestep", *, images_seen=200, colour=(10, 200, 10), size=(22, 22)):
        """A picture of samples, as `SampleGrid` writes them."""
        folder = self.path / name / "samples"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", size, colour).save(folder / f"{sampler}_{images_seen:09d}.png")

    def note(self, *never_started):
        """Write `study.json`; runs that never started are (name, overrides)."""
        self.listed |= {name: {"overrides": list(overrides)} for name, overrides in never_started}
        content = {
            "study": self.path.name,
            "command": "consistency-train -m metric=l2,pseudo_huber",
            "runs": self.listed,
        }
        (self.path / "study.json").write_text(json.dumps(content))
        return self.path


@pytest.fixture
def study(tmp_path) -> StudyFolder:
    return StudyFolder(tmp_path / "outputs" / "metrics")


@pytest.fixture
def two_metrics(study) -> Path:
    """l2 and pseudo_huber, two seeds each, all finished."""
    for metric, scores in (("l2", (40.0, 30.0)), ("pseudo_huber", (20.0, 10.0))):
        for seed in (0, 1):
            values = [value + 4 * seed for value in scores]
            half = [value / 2 for value in values]
            overrides = ("experiment=digits_ict", f"metric={metric}", f"seed={seed}")
            study.run(f"{metric}-seed{seed}", *overrides, seed=seed, metric=metric, scores=values, twostep=half)
    return study.note()
