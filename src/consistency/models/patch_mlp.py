"""A perceptron on the pixels of an image: the smallest network that trains."""

from __future__ import annotations

from torch import Tensor, nn

from consistency.models.register import register_network


@register_network("pixel_mlp")
class PixelMLP(nn.Module):
    """Two layers with the noise level added between them.

    Args:
        image_size: Side of the images.
        in_channels: Of the images.
        num_classes: Classes; 0 for none.
        width: Hidden features.
    """

    def __init__(self, *, image_size: int, in_channels: int, num_classes: int = 0, width: int = 64) -> None:
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = image_size, in_channels, num_classes
        pixels = in_channels * image_size**2
        self.enter, self.noise, self.leave = nn.Linear(pixels, width), nn.Linear(1, width), nn.Linear(width, pixels)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """F, [B, C, H, W]; labels are not used."""
        hidden = self.enter(x.flatten(1)) + self.noise(c_noise[:, None])
        return self.leave(nn.functional.silu(hidden)).view_as(x)
