"""The block of the Conformer (Gulati et al. 2020, arXiv:2005.08100), which networks for speech share.

Half-step feed-forward, self-attention with relative positions, convolution, half-step feed-forward, LayerNorm.
Shapes: B batch, S frames, D width, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.mapping.key_rules import Fused, Row


def relative_positions(x: Tensor) -> Tensor:  # B S D -> 2S D
    """Return sinusoidal embeddings of the distances S-1, ..., 0, ..., -S; positive distances refer to earlier frames."""
    steps, dim = x.shape[1:]
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    distance = torch.arange(steps - 1, -steps - 1, -1, device=x.device, dtype=dtype)
    rate = 10_000 ** -(torch.arange(0, dim, 2, device=x.device, dtype=dtype) / dim)
    angle = distance[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class FeedForward(nn.Module):
    """A feed-forward module with swish (figure 4 of the paper)."""

    def __init__(self, dim: int, hidden: int, dropout: float, bias: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B S D
        return self.dropout(self.down(self.dropout(F.silu(self.up(self.norm(x))))))


class RelativeAttention(nn.Module):
    """Self-attention with relative positions (figure 3); the scores are those of Dai et al. 2019 (arXiv:1901.02860),
    section 3.3: ((q_i + u) k_j + (q_i + v) W r_{i-j}) / sqrt(d).

    The second term is passed to the fused kernel as an additive mask.
    """

    def __init__(self, dim: int, heads: int, dropout: float, bias: bool = True):
        super().__init__()
        if dim % heads or dim % 2:
            raise SettingsError(f"dim={dim} must be even and a multiple of heads={heads}.")
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias)
        self.pos = nn.Linear(dim, dim, bias=False)
        self.u = nn.Parameter(torch.zeros(heads, dim // heads))
        self.v = nn.Parameter(torch.zeros(heads, dim // heads))
        self.proj = nn.Linear(dim, dim, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:  # B S D, 2S D, B S bool -> B S D
        steps = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads S d
        r = self.pos(places).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)  # heads d 2S
        bias = (q + self.v[:, None]) @ r * q.shape[-1] ** -0.5  # B heads S 2S
        # Row i needs the distances i, i-1, ... i-S+1, which begin at column S-1-i: one column earlier in each row.
        bias = bias.flatten(-2)[..., steps - 1 : -1].unflatten(-1, (steps, 2 * steps - 1))[..., :steps]
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], -torch.inf)
        q = q + self.u[:, None]
        y = dot_product_attention(q, k, v, bias.to(q.dtype))
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch normalization whose training statistics exclude padding frames."""

    running_mean: Tensor  # never None: statistics are always tracked
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # B D S, B S bool -> B D S
        if mask is None or not self.training:
            return super().forward(x)
        x32 = x if x.dtype == torch.float64 else x.float()
        weight = mask[:, None].to(x32.dtype)
        count = weight.sum()
        mean = (x32 * weight).sum((0, 2)) / count
        centred = x32 - mean[:, None]
        var = (centred.square() * weight).sum((0, 2)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(self.running_var.dtype), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale[:, None] + self.bias[:, None]).to(x.dtype)


class Convolution(nn.Module):
    """The convolution module (figure 2): gated linear unit, depthwise convolution over time, batch normalization, swish."""

    def __init__(self, dim: int, kernel: int, dropout: float, bias: bool = False):
        super().__init__()
        if kernel % 2 == 0:
            raise SettingsError(f"kernel={kernel} must be odd, such as {kernel - 1} or {kernel + 1}.")
        self.norm1 = nn.LayerNorm(dim)
        self.up = nn.Conv1d(dim, 2 * dim, 1, bias=bias)
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias)
        self.norm2 = MaskedBatchNorm(dim)
        self.down = nn.Conv1d(dim, dim, 1, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D, B S bool -> B S D
        y = F.glu(self.up(self.norm1(x).transpose(1, 2)), 1)  # B D S
        if mask is not None:
            y = y * mask[:, None]
        y = self.down(F.silu(self.norm2(self.conv(y), mask)))
        return self.dropout(y.transpose(1, 2))


class ConformerBlock(nn.Module):
    """A Conformer block (figure 1 and equation 1): half-step feed-forward, attention, convolution, half-step
    feed-forward, LayerNorm.

    Raises `SettingsError` for an even `kernel`, an odd `dim` or one that `heads` does not divide.
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, kernel: int, dropout: float, bias: bool = True, conv_bias: bool = False
    ):
        super().__init__()
        self.mlp1 = FeedForward(dim, hidden, dropout, bias)
        self.attn = RelativeAttention(dim, heads, dropout, bias)
        self.conv = Convolution(dim, kernel, dropout, conv_bias)
        self.mlp2 = FeedForward(dim, hidden, dropout, bias)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = x + self.mlp1(x) / 2
        x = x + self.attn(x, places, mask)
        x = x + self.conv(x, mask)
        return self.norm(x + self.mlp2(x) / 2)


def name_blocks(layer: str) -> dict[str, Row]:
    """Return the names of transformers for the blocks of its Wav2Vec2Conformer, which begin with `layer`."""
    return {
        layer + "ffn{k}_layer_norm.*": "blocks.{i}.mlp{k}.norm.*",
        layer + "ffn{k}.intermediate_dense.*": "blocks.{i}.mlp{k}.up.*",
        layer + "ffn{k}.output_dense.*": "blocks.{i}.mlp{k}.down.*",
        layer + "self_attn_layer_norm.*": "blocks.{i}.attn.norm.*",
        **{layer + f"self_attn.linear_{x}.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, x in enumerate("qkv")},
        layer + "self_attn.linear_pos.*": "blocks.{i}.attn.pos.*",
        layer + "self_attn.pos_bias_*": "blocks.{i}.attn.*",
        layer + "self_attn.linear_out.*": "blocks.{i}.attn.proj.*",
        layer + "conv_module.layer_norm.*": "blocks.{i}.conv.norm1.*",
        layer + "conv_module.pointwise_conv1.*": "blocks.{i}.conv.up.*",
        layer + "conv_module.depthwise_conv.*": "blocks.{i}.conv.conv.*",
        layer + "conv_module.batch_norm.*": "blocks.{i}.conv.norm2.*",
        layer + "conv_module.pointwise_conv2.*": "blocks.{i}.conv.down.*",
        layer + "final_layer_norm.*": "blocks.{i}.norm.*",
    }
