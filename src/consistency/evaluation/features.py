"""A small classifier whose features measure a data set where Inception says nothing, or is not at hand.

Distances in its features are named `fd_classifier`, never FID.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consistency.evaluation.statistics import FeatureMoments


class SmallClassifier(nn.Module):
    """Three convolutions and two linear layers; `features` is the 64-vector before the last.

    Images of 16 pixels and more are first brought below 16, by a convolution and a pooling for each halving.

    Args:
        in_channels: Image channels.
        image_size: Height and width, at least 4.
        num_classes: Number of labels.
    """

    feature_dim = 64

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.in_channels, self.image_size, self.num_classes = in_channels, image_size, num_classes
        halvings: list[nn.Module] = []
        channels, size = in_channels, image_size
        while size >= 16:
            halvings += [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = 32, size // 2
        self.body = nn.Sequential(
            *halvings,
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (size // 4) ** 2, self.feature_dim),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.feature_dim, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> float32 [B, 64]."""
        return self.body(images.float() / 127.5 - 1)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] -> logits [B, num_classes]."""
        return self.head(self.features(images))


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    epochs: int | None = None,
    holdout: float = 0.2,
    device: torch.device | str = "cpu",
) -> tuple[SmallClassifier, float]:
    """Train on (1 - holdout) of the images; returns the classifier in eval mode and its accuracy on the rest.

    Deterministic in `seed`; the global random state is left as it was.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        seed: Of the split, the weights and the batches.
        epochs: Passes over the training part; None for 30, or as many as show 500,000 images.
        holdout: Fraction kept for the accuracy.
        device: Where to train; on a GPU the last bits may differ from run to run.
    """
    epochs = epochs or max(1, min(30, 500_000 // len(images)))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.enable_grad():
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        held, train = order.split([round(holdout * len(images)), len(images) - round(holdout * len(images))])
        model = SmallClassifier(images.shape[1], images.shape[2], int(labels.max()) + 1).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for batch in train[torch.randperm(len(train))].split(64):
                loss = F.cross_entropy(model(images[batch].to(device)), labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(images[batch].to(device)).argmax(dim=1).cpu() for batch in held.split(512)])
    return model, (guesses == labels[held]).float().mean().item()


@torch.no_grad()
def classifier_moments(model: SmallClassifier, images: Tensor, batch_size: int = 512) -> FeatureMoments:
    """Moments of the features of uint8 images [N, C, H, W]."""
    moments = FeatureMoments(model.feature_dim)
    for batch in images.split(batch_size):
        moments.add(model.features(batch))
    return moments
