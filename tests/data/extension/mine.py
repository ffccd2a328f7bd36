"""A network, a parametrization, a method, levels, a metric, a data set and a sampler from outside the package."""

from dataclasses import dataclass

import torch
from torch import nn

from consistency import Method, Step, add_noise, register_network, register_parametrization
from consistency.models.parametrization import Coefficients


@register_network("mine_mlp")
class MyNetwork(nn.Module):
    """A perceptron on pixels: no channels, blocks or resolutions, as the UNet has them."""

    def __init__(self, *, image_size, in_channels, num_classes=0, width=32, dropout=0.0):
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        pixels = in_channels * image_size**2
        self.labels = nn.Embedding(num_classes + 1, width)
        self.enter, self.noise = nn.Linear(pixels, width), nn.Linear(1, width)
        self.leave, self.dropout = nn.Linear(width, pixels), nn.Dropout(dropout)

    def forward(self, x, c_noise, labels=None):
        """F, [B, C, H, W]."""
        label = 0 if labels is None else self.labels(labels + 1)
        hidden = self.enter(x.flatten(1)) + self.noise(c_noise[:, None]) + label
        return self.leave(self.dropout(torch.nn.functional.silu(hidden))).view_as(x)


@register_parametrization("mine_predict_x")
@dataclass(frozen=True)
class PredictX:
    """The network predicts the image: D = F."""

    sigma_data: float = 0.5
    boundary: float = 0.0

    def __call__(self, sigma):
        """Coefficients at sigma [B]."""
        one = torch.ones_like(sigma)
        return Coefficients(0 * one, one, (sigma**2 + self.sigma_data**2).rsqrt(), sigma.log() / 4)


class MyMethod(Method):
    """Denoising in the l1 sense, with a learned weight of the level: a second module that is trained."""

    kind = "diffusion"

    def __init__(self, denoiser, *, levels, metric, **options):
        super().__init__(denoiser, **options)
        self.levels, self.metric = levels, metric
        self.level_weight = nn.Linear(1, 1)

    def trained_modules(self):
        """The denoiser and the weight."""
        return [self.denoiser, self.level_weight]

    def step(self, images, labels, k, random):
        """exp(-w) d(D(x + sigma z), x) + w."""
        sigma = self.levels(k, random.uniform(images))
        noisy = add_noise(images, random.normal(images), sigma)
        w = self.level_weight(sigma.log()[:, None])[:, 0]
        loss = self.metric(self.denoiser(noisy, sigma, labels), images)
        return Step((-w).exp() * loss + w, sigma, {"w": float(w.detach().mean())})


def root_mean_square(a, b):
    """A metric, [B]."""
    return (a - b).square().flatten(1).mean(1).sqrt()


class Stripes(torch.utils.data.Dataset):
    """200 grey images 8x8 of two classes: rows and columns."""

    labels = torch.arange(200) % 2

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """uint8 [1, 8, 8] and its label."""
        rows = (torch.arange(8) + index // 2) % 4 < 2
        image = (255 * rows).to(torch.uint8).repeat(8, 1)
        return (image if index % 2 else image.T)[None], index % 2


def my_sampler(denoiser, noise, labels=None, randn_like=torch.randn_like, *, steps=4):
    """Euler's method on levels that halve."""
    sigma = denoiser.sigma_max
    x = noise * sigma
    for step in range(steps):
        following = 0.0 if step == steps - 1 else sigma / 2
        clean = denoiser(x, x.new_full((len(x),), sigma), labels)
        x, sigma = clean + following / sigma * (x - clean), following
    return x
