"""The ladder on photographs: which runs are trained on a GPU and on a CPU, and how they are measured; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

METHODS = ("edm", "cd", "ct", "ict", "ect")  # in the order of training: CD and ECT start from EDM


@dataclass(frozen=True)
class Ladder:
    """What is trained and measured on a kind of machine: names of runs, and overrides of the commands."""

    prefix: str
    train: tuple[str, ...] = ()
    network: tuple[str, ...] = ()  # of methods that have one of their own: CD takes the teacher's
    method: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of one method
    evaluate: tuple[str, ...] = ()
    samples: tuple[int, ...] = (10_000, 50_000)
    image_size: int = 32

    def command(self, method: str, outputs: Path, data: str) -> list[str]:
        """Overrides of consistency-train for one method."""
        run = outputs / f"{self.prefix}{method}"
        start = {"cd": [f"teacher={outputs}/{self.prefix}edm"], "ect": [f"init_from={outputs}/{self.prefix}edm"]}
        network = () if method == "cd" else self.network
        return [
            *(f"experiment=photos_{method}", f"run_name={run.name}", f"hydra.run.dir={run}", *self.data(data)),
            *(*self.train, *network, *self.method.get(method, ()), *start.get(method, ())),
        ]

    def data(self, name: str) -> tuple[str, ...]:
        """Overrides that choose the photographs."""
        return (
            f"data={name}",
            f"data.image_size={self.image_size}",
            "data.dataset.crop._target_=consistency.data.cropping.adm",
        )


LADDERS = {
    "gpu": Ladder("photos_", train=("speed=gpu",)),
    "cpu": Ladder(
        "photos16_",
        image_size=16,
        train=(
            *("data.batch_size=64", "trainer.max_steps=1000", "optimizer.lr=1.0e-3"),
            *("callbacks.weight_ema.decays=[0.995]", "callbacks.log.every_n_steps=50"),
        ),
        network=(
            *("network=unet_tiny", "network.channels=32", "network.channel_mult=[1,2]"),
            "network.attention_resolutions=[8]",
        ),
        method={"ect": ("levels.steps_per_stage=125",)},
        evaluate=("evaluation.extractor.network.width=16", "evaluation.extractor.network.epochs=10"),
        samples=(10_000,),
    ),
}
