"""Stochastic depth: in training, whole branches of a residual network are left out at random.

Huang et al. 2016 (arXiv:1603.09382), as EfficientNet, DeiT and ConvNeXt use it: each row of a batch draws for itself,
and what stays is divided by the chance to stay, so that nothing changes in evaluation.
"""

from __future__ import annotations

from torch import Tensor, nn

from fieldguide.core.errors import SettingsError


class DropPath(nn.Module):
    """A branch, of each row with probability `p` zero; the rest times 1 / (1 - p). Off in evaluation.

    Raises `SettingsError` where p is not from 0 up to, but without, 1.
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0 <= p < 1:
            raise SettingsError(f"drop_path={p}: the chance that a branch is left out lies in [0, 1)")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    def forward(self, x: Tensor) -> Tensor:  # B ... -> B ...
        if not self.training or self.p == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


def stochastic_depth_rates(p: float, depth: int) -> list[float]:
    """The probability of each of `depth` blocks, from 0 at the first to p at the last in equal steps (section 3)."""
    return [p * i / max(depth - 1, 1) for i in range(depth)]
