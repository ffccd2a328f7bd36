"""The consistency loss: one function for CT, iCT, ECT and CD.

They differ in how `x_lo` is made (`x + sigma_lo z` for training, an ODE step of the teacher for distillation), in what
the target is (an average of the online network, or the online network itself), and in the parts around it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from consistency.models.denoiser import Denoiser
from consistency.ops import append_dims, same_randomness

Metric = Callable[[Tensor, Tensor], Tensor]


def consistency_loss(
    online: Denoiser,
    target: Denoiser,
    x_hi: Tensor,
    x_lo: Tensor,
    sigma_hi: Tensor,
    sigma_lo: Tensor,
    *,
    metric: Metric,
    weight: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """weight * d(f_theta(x_hi, sigma_hi), stopgrad f_theta-(x_lo, sigma_lo)); [B] (CM, Eq. 7, 10; iCT, Eq. 3, 5).

    The online network sees the larger level, the target the smaller one: swapped, the model would never be trained at
    sigma_max, where it is sampled. Both passes use one dropout mask (iCT, Sec. 3.1).

    Args:
        online: f_theta, gets the gradient.
        target: f_theta-; the online network itself where mu = 0 (iCT, ECT).
        x_hi: [B, C, H, W], image plus noise at sigma_hi.
        x_lo: [B, C, H, W], on the same trajectory at sigma_lo.
        sigma_hi: [B].
        sigma_lo: [B], below sigma_hi; 0 (ECT, first stages) makes the clean `x_lo` the target.
        metric: d.
        weight: lambda, [B].
        labels: [B] int64 or None, given to both networks.
    """
    with same_randomness(x_hi.device) as rewind:
        prediction = online(x_hi, sigma_hi, labels)
        rewind()
        with torch.no_grad():
            # The network cannot see ln 0: evaluate such rows at their upper level and drop the result.
            is_clean = sigma_lo <= 0
            reference = target(x_lo, torch.where(is_clean, sigma_hi, sigma_lo), labels)
            reference = torch.where(append_dims(is_clean, x_lo.ndim), x_lo, reference)
    return weight * metric(prediction, reference)
