"""A residual classifier for photographs: its features see what the three convolutions of the small one do not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Brings distances to the size that one is used to: random halves of CIFAR-10 are then about 1 apart, not 0.004, which
# would pass for a set compared with itself. A power of two changes no bit of what is learned.
_SCALE = 16.0


class ResidualClassifier(nn.Module):
    """A stem and three stages, each a convolution, a halving of the size and a residual pair; `features` is their mean.

    Args:
        in_channels: Image channels.
        image_size: Height and width, at least 8.
        num_classes: Number of labels.
        width: Channels of the stem; the stages have 2, 4 and 4 times as many.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(
                f"a residual classifier needs images of 8 pixels or more, got {image_size}; use evaluation=classifier"
            )
        self.in_channels, self.image_size, self.num_classes = in_channels, image_size, num_classes
        self.feature_dim = 4 * width
        stages: list[nn.Module] = [_convolution(in_channels, width)]
        for before, after in ((width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)):
            stages += [_convolution(before, after, halve=True), _Residual(after)]
        self.body = nn.Sequential(*stages)
        self.head = _Head(self.feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, 4 * width], 16 times the mean over all places before the last layer."""
        return _SCALE * self.body(images.float() / 127.5 - 1).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> logits [B, num_classes]."""
        return self.head(self.features(images))


class _Head(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features / _SCALE)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pair(x)


def _convolution(before: int, after: int, *, halve: bool = False) -> nn.Sequential:
    """Pooling comes first of what follows a convolution: the rest then has a quarter of the places."""
    pool = [nn.MaxPool2d(2)] if halve else []
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(after), nn.ReLU())


@dataclass(frozen=True)
class ResidualRecipe:
    """A `ResidualClassifier` and how it is trained: SGD with Nesterov momentum, crops, flips, smoothed labels.

    The learning rate rises linearly over the first fifth of the steps, then falls linearly to nothing.

    Args:
        width: See `ResidualClassifier`. 64: 3.6M parameters, 256 features.
        epochs: Passes over the training part.
        batch_size: Images of a step.
        lr: At the top.
        pad: Images are moved by up to so many pixels each way; what comes in from outside is mirrored.
        flip: Half of the images are mirrored; false where left and right differ.
        holdout: Fraction of the images that is kept for the accuracy.
        seed: Of the split, the weights and the batches.
    """

    width: int = 64
    epochs: int = 16
    batch_size: int = 256
    lr: float = 0.2
    pad: int = 3
    flip: bool = True
    holdout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for option, least in (("width", 1), ("epochs", 1), ("batch_size", 2), ("pad", 0)):
            value = getattr(self, option)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"evaluation.extractor.network.{option} must be an integer, at least {least}, got {value}"
                )
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"evaluation.extractor.network.lr must be a positive number, got {self.lr}")
        if not isinstance(self.flip, bool):
            raise ValueError(f"evaluation.extractor.network.flip must be true or false, got {self.flip}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"evaluation.extractor.network.holdout must be above 0 and below 1, got {self.holdout}")

    def settings(self) -> dict[str, Any]:
        """All that decides which classifier this gives."""
        return {"network": "residual", "recipe": 1, **asdict(self)}

    def build(self, in_channels: int, image_size: int, num_classes: int) -> ResidualClassifier:
        """A fresh classifier."""
        return ResidualClassifier(in_channels, image_size, num_classes, width=self.width)

    def train(
        self, images: Tensor, labels: Tensor, device: torch.device | str = "cpu"
    ) -> tuple[ResidualClassifier, float]:
        """The trained classifier in eval mode, on `device`, and its accuracy on the images that were kept.

        On a CPU a function of the settings alone; on a GPU, in bfloat16, the last bits may differ from run to run. The
        global random state is left as it was.

        Args:
            images: uint8 [N, C, H, W].
            labels: int64 [N].
            device: Where to train; all images are put there.
        """
        device = torch.device(device)
        if self.pad >= images.shape[-1]:
            raise ValueError(
                f"evaluation.extractor.network.pad must be below the images' {images.shape[-1]} pixels, got {self.pad}"
            )
        if not 1 <= round(self.holdout * len(images)) <= len(images) - 2:
            raise ValueError(f"{len(images)} images are too few for a classifier; use evaluation=proxy (Inception)")
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
            torch.manual_seed(self.seed)
            order = torch.randperm(len(images))
            held, train = order.split(
                [round(self.holdout * len(images)), len(images) - round(self.holdout * len(images))]
            )
            model = self.build(images.shape[1], images.shape[2], int(labels.max()) + 1)
            model.to(device).to(memory_format=torch.channels_last)
            images, labels = images.to(device), labels.to(device)
            self._fit(model, images, labels, train)
        model.eval().to(memory_format=torch.contiguous_format)
        with torch.no_grad():
            right = [(model(images[i]).argmax(dim=1) == labels[i]).sum() for i in held.to(device).split(500)]
        return model, sum(int(count) for count in right) / len(held)

    def _fit(self, model: ResidualClassifier, images: Tensor, labels: Tensor, train: Tensor) -> None:
        """Train in place on the images at the indices `train`; the random numbers are the CPU's on every device."""
        device, batch_size = images.device, min(self.batch_size, len(train))
        steps = len(train) // batch_size
        optimizer = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rise_and_fall(step, self.epochs * steps))
        for _ in range(self.epochs):
            for index in train[torch.randperm(len(train))][: steps * batch_size].split(batch_size):
                batch = self._augment(images, index)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(batch)
                loss = F.cross_entropy(logits.float(), labels[index.to(device)], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def _augment(self, images: Tensor, index: Tensor) -> Tensor:
        """The images at `index`, moved and mirrored at random: uint8 [B, C, H, W], channels last in memory."""
        size, device = images.shape[-1], images.device
        across, down = (
            torch.randint(-self.pad, self.pad + 1, (len(index), 1)) + torch.arange(size) for _ in range(2)
        )  # [B, size] each: which column and row is shown where
        if self.flip:
            across = torch.where(torch.rand(len(index), 1) < 0.5, size - 1 - across, across)
        across, down = (_mirrored(places, size).to(device) for places in (across, down))
        # A slice between index tensors: what they select comes first, the channels last.
        return images[index.to(device)[:, None, None], :, down[:, :, None], across[:, None, :]].permute(0, 3, 1, 2)


def _mirrored(places: Tensor, size: int) -> Tensor:
    """Places outside of 0..size-1, mirrored into it at the outermost pixels."""
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _rise_and_fall(step: int, total: int) -> float:
    """Share of the highest rate at a step: linear from 0 to 1 over a fifth of the steps, then to 0."""
    top = max(1, total // 5)
    return (step + 1) / top if step < top else (total - step) / (total - top + 1)
