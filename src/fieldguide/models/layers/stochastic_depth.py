"""Stochastic depth: residual branches are dropped at random during training (Huang et al. 2016, arXiv:1603.09382).

As in EfficientNet, DeiT and ConvNeXt, each sample is dropped independently and the others are divided by the keep
probability, so evaluation needs no scaling.
"""

from __future__ import annotations

from torch import Tensor, nn

from fieldguide.core.errors import SettingsError


class DropPath(nn.Module):
    """Zero a residual branch per sample with probability `p` and scale the rest by 1 / (1 - p). The identity in
    evaluation.

    Raises `SettingsError` if p is not in [0, 1).
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0 <= p < 1:
            raise SettingsError(f"drop_path={p} must be in [0, 1).")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def forward(self, x: Tensor) -> Tensor:  # B ... -> B ...
        if not self.training or self.p == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


def stochastic_depth_rates(p: float, depth: int) -> list[float]:
    """Return the drop probability of each of `depth` blocks, increasing linearly from 0 to p (section 3)."""
    return [p * i / max(depth - 1, 1) for i in range(depth)]
