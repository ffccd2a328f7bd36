"""The floor: what a training step has to do, how fast this device can do it, and what stands around it."""

from __future__ import annotations

import time
import warnings
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from timing import device_rates, in_turns, ratio, seconds_of, spread
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from consistency import config
from consistency.commands.build import build_method, build_trainer, fit_quietly
from consistency.data.arrays import ImageArray
from consistency.data.module import ImageDataModule
from consistency.models.averages import ema_update_
from consistency.models.execution import matmul_in_tf32
from consistency.ops import from_uint8
from consistency.training.averaging import TargetEMA, WeightEMA
from consistency.training.required import StepSeeds

# What a run has besides: files and pictures, at places that are far apart.
_APART = ("checkpoint", "sample_grid", "quality", "progress", "prune", "log", "collapse")


def compose_recipe(overrides: list[str]) -> DictConfig:
    """The configuration of a training, of which nothing will be written."""
    config.register()
    with initialize_config_dir(str(config.CONF_DIR), version_base="1.3"):
        fixed = ["logger=none", "paths.output_dir=.bench", "run_name=bench", "optimizer.lr=1.0e-4"]
        return compose("train", overrides=[*overrides, *fixed])


class BytesCounter(TorchDispatchMode):
    """Bytes that the operators of a step read and write, each operand once: what eager execution moves at most."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and do it."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            moved = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.total += sum(x.nbytes for x in {id(x): x for x in moved}.values())
        return out


class Bench:
    """A recipe on random images: its parts one by one, the bare loop, and Lightning's step.

    Args:
        overrides: Of `consistency-train`.
        device: "cpu" or "cuda".
    """

    def __init__(self, overrides: list[str], device: torch.device) -> None:
        self.recipe = overrides
        self.cfg, self.device = compose_recipe([*overrides, f"trainer.accelerator={_accelerator(device)}"]), device
        L.seed_everything(0, verbose=False)
        self.data = self._random_data()
        self.trainer = self._trainer([])
        self.method = self._method()
        self.optimizer = self._optimizer(self.method)
        self.weights = list(self.method.denoiser.parameters())
        ema = self.cfg.callbacks.weight_ema
        count = len(ema.decays or ()) + len(ema.half_lives or ())
        self.averages = [[parameter.detach().clone() for parameter in self.weights] for _ in range(count)]
        images, labels = self.data.dataset.__getitems__(list(range(self.cfg.data.batch_size)))
        self.batch = from_uint8(images.to(device)), labels.to(device)

    def _random_data(self) -> ImageDataModule:
        cfg = self.cfg.data
        shape = (max(2 * cfg.batch_size, 512), cfg.channels, cfg.image_size, cfg.image_size)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.arange(shape[0]) % max(cfg.num_classes, 1)
        names = ("batch_size", "image_size", "channels", "num_classes", "sigma_data", "flip")
        options = {name: cfg[name] for name in names}
        data = ImageDataModule(ImageArray(images, labels), seed=0, on_device=cfg.on_device, **options)
        data.setup("fit")
        return data

    def _method(self) -> Any:
        method = build_method(self.cfg, self.data).to(self.device).train()
        method.trainer = self.trainer
        return method

    def _optimizer(self, method: Any) -> torch.optim.Optimizer:
        return method.optimizer(method.trained_parameters())

    def _trainer(self, callbacks: list[Any]) -> L.Trainer:
        return build_trainer(self.cfg, callbacks, [], None)

    def forward_backward(self) -> None:
        """The whole loss: student forward and backward, target forward, and what is around them."""
        with self.trainer.precision_plugin.train_step_context():
            loss = self.method.training_step(self.batch, 0)["loss"]
        loss.backward()

    def bare_step(self) -> None:
        """What any loop has to do, and nothing else."""
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()
        if self.method.target is not None:
            ema_update_(self.method.target.parameters(), self.weights, 0.9)

    def average(self) -> None:
        """As many averages of the weights as the recipe keeps."""
        for averages in self.averages:
            ema_update_(averages, self.weights, 0.999)

    def counted(self) -> dict[str, float]:
        """FLOPs (a multiplication and an addition are two) and bytes of a step without compiler, by counting them."""
        if self.cfg.compile is not False:
            return Bench([*self.recipe, "compile=false"], self.device).counted()
        self.bare_step()
        flops, moved = FlopCounterMode(display=False), BytesCounter()
        with flops:
            self.bare_step()
        with moved:
            self.bare_step()
        return {"flops": flops.get_total_flops(), "bytes": moved.total}

    def parts(self, rounds: int) -> dict[str, list[float]]:
        """Seconds of the parts of a step."""
        denoiser, (images, labels) = self.method.denoiser, self.batch
        sigma = torch.ones(len(images), device=self.device)
        context = self.trainer.precision_plugin.train_step_context

        def student() -> None:
            for parameter in self.weights:
                parameter.grad = None
            with context():
                out = denoiser(images, sigma, labels)
            out.square().mean().backward()

        @torch.no_grad()
        def target() -> None:
            with context():
                denoiser(images, sigma, labels)

        sides = {"student forward and backward": student, "optimizer": self.optimizer.step, "EMA": self.average}
        if hasattr(self.method, "metric"):
            sides["target forward"] = target
        return in_turns(sides, self.device, rounds=rounds)

    def profile(self, steps: int = 5) -> str:
        """The operators of a few bare steps by their own time; text."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for _ in range(3):
            self.bare_step()
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(steps):
                self.bare_step()
        own = f"self_{self.device.type}_time_total"
        table = profiler.key_averages().table(sort_by=own, row_limit=20, max_name_column_width=50)
        return f"{steps} bare steps of {' '.join(self.recipe)}, batch {self.cfg.data.batch_size}\n{table}"

    def beside_lightning(self, rounds: int, steps: int) -> dict[str, list[float]]:
        """Seconds of a step in the bare loop and in Lightning with the callbacks of a run, in turns of `steps`."""
        turns = _Turns(self, rounds, steps)
        parts = {name: part for name, part in self.cfg.callbacks.items() if part is not None and name not in _APART}
        callbacks = [instantiate(part, _convert_="object") for part in parts.values()]
        log = instantiate(self.cfg.callbacks.log, _convert_="object")
        assert any(isinstance(part, WeightEMA) for part in callbacks)
        assert any(isinstance(part, TargetEMA) for part in callbacks)
        trainer = self._trainer([StepSeeds(0), *callbacks, log, turns])
        method = build_method(self.cfg, self.data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit_quietly(trainer, method, self.data, None, tf32=self.cfg.tf32)
        return turns.seconds


class _Turns(Callback):
    """Inside `trainer.fit`: after every few steps of Lightning, as many of the bare loop."""

    def __init__(self, bench: Bench, rounds: int, steps: int) -> None:
        self.bench, self.rounds, self.steps = bench, rounds, steps
        self.seconds: dict[str, list[float]] = {"bare loop": [], "Lightning": []}
        self._since = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time of both."""
        step = pl_module.progress.step
        if step % self.steps:
            return
        seconds_of(lambda: None, self.bench.device)  # wait
        passed = (time.perf_counter() - self._since) / self.steps
        bare = seconds_of(self.bench.bare_step, self.bench.device, self.steps)
        if step > self.steps:  # the first turn warms up
            self.seconds["Lightning"].append(passed)
            self.seconds["bare loop"].append(bare)
        trainer.should_stop = len(self.seconds["Lightning"]) >= self.rounds
        self._since = time.perf_counter()


def measure(overrides: list[str], device: torch.device, *, rounds: int = 9, steps: int = 5) -> dict[str, Any]:
    """All of it, as plain numbers."""
    bench = Bench(overrides, device)
    with matmul_in_tf32(bench.cfg.tf32):
        counted, rates = bench.counted(), device_rates(device)
        parts = bench.parts(rounds)
    loops = bench.beside_lightning(rounds, steps)
    fraction = ratio(loops["Lightning"], loops["bare loop"])
    step = spread(loops["Lightning"])["median_ms"] / 1e3
    return {
        "recipe": overrides,
        "parameters": sum(parameter.numel() for parameter in bench.method.denoiser.parameters()),
        "batch": bench.cfg.data.batch_size,
        "counted": counted,
        "rates": rates,
        "peak": rates[matmul_of(bench.cfg, rates)],
        "parts": {name: spread(seconds) for name, seconds in parts.items()},
        "loops": {name: spread(seconds) for name, seconds in loops.items()},
        "lightning_over_bare": fraction,
        "images_per_second": bench.cfg.data.batch_size / step,
        "share_of_peak": counted["flops"] / step / rates[matmul_of(bench.cfg, rates)],
    }


def matmul_of(cfg: DictConfig, rates: dict[str, float]) -> str:
    """The rate that a recipe's precision can reach."""
    half = "bfloat16" if str(cfg.trainer.precision).startswith(("bf16", "16")) else "float32"
    return f"matmul_{half}" if f"matmul_{half}" in rates else "matmul_float32"


def _accelerator(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else device.type
