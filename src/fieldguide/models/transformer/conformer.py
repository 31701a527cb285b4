"""Conformer: speech recognition with attention and convolution (Gulati et al. 2020, arXiv:2005.08100).

New here: each block has self-attention, which sees the whole recording, and a depthwise convolution, which sees
nearby frames, between two half-step feed-forward layers (macaron). Two convolutions of stride 2 first reduce the
frame rate by four. Positions are relative (Transformer-XL): a term of each score depends on the distance of the two
frames. The paper uses an RNN transducer; here one linear layer predicts the symbols of CTC (Graves et al. 2006),
blank = 0.

Initialization: torch's default for every layer, zeros for the attention biases u and v; the paper does not specify
it.
Shapes: B batch, T frames of the spectrogram, F features per frame, S = ceil(T/4) frames after subsampling, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.dot_product_attention import dot_product_attention
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.mapping.key_rules import Fused


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 1024  # number of symbols, including the blank (0)
    features: int = 80  # F, mel bands
    dim: int = 144  # D
    depth: int = 16
    heads: int = 4
    growth: int = 4  # hidden width of the feed-forward layers, as a multiple of D
    kernel: int = 31  # kernel size of the depthwise convolution, odd; the paper's 32 has no center
    dropout: float = 0.1  # at the output of each module and inside the feed-forward layers


class Subsampling(nn.Module):
    """Section 2: two 3x3 convolutions of stride 2 with ReLU, then a linear layer over channels and mel bands.

    Each convolution pads by one, so T frames become ceil(T/4), as computed by `Conformer.frames`.
    """

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, dim, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.proj = nn.Linear(dim * -(-features // 4), dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:  # B T F, B -> B S D
        x = x[:, None]  # B 1 T F
        for conv in (self.conv1, self.conv2):
            if lengths is not None:
                x = x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None, :, None]
                lengths = (lengths + 1) // 2
            x = F.relu(conv(x))
        return self.proj(x.transpose(1, 2).flatten(2))  # channel-major, then mel bands


class FeedForward(nn.Module):
    """A feed-forward module with swish (figure 4)."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B S D
        return self.dropout(self.down(self.dropout(F.silu(self.up(self.norm(x))))))


class RelativeAttention(nn.Module):
    """Self-attention with relative positions (figure 3); the scores are those of Dai et al. 2019 (arXiv:1901.02860),
    section 3.3: ((q_i + u) k_j + (q_i + v) W r_{i-j}) / sqrt(d).

    The second term is passed to the fused kernel as an additive mask.
    """

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.pos = nn.Linear(dim, dim, bias=False)
        self.u = nn.Parameter(torch.zeros(heads, dim // heads))
        self.v = nn.Parameter(torch.zeros(heads, dim // heads))
        self.proj = nn.Linear(dim, dim)
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

    def __init__(self, dim: int, kernel: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.up = nn.Conv1d(dim, 2 * dim, 1, bias=False)
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False)
        self.norm2 = MaskedBatchNorm(dim)
        self.down = nn.Conv1d(dim, dim, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D, B S bool -> B S D
        y = F.glu(self.up(self.norm1(x).transpose(1, 2)), 1)  # B D S
        if mask is not None:
            y = y * mask[:, None]
        y = self.down(F.silu(self.norm2(self.conv(y), mask)))
        return self.dropout(y.transpose(1, 2))


class Block(nn.Module):
    """A Conformer block (figure 1 and equation 1): half-step feed-forward, attention, convolution, half-step
    feed-forward, LayerNorm.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.mlp1 = FeedForward(c.dim, c.growth * c.dim, c.dropout)
        self.attn = RelativeAttention(c.dim, c.heads, c.dropout)
        self.conv = Convolution(c.dim, c.kernel, c.dropout)
        self.mlp2 = FeedForward(c.dim, c.growth * c.dim, c.dropout)
        self.norm = nn.LayerNorm(c.dim)

    def forward(self, x: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = x + self.mlp1(x) / 2
        x = x + self.attn(x, places, mask)
        x = x + self.conv(x, mask)
        return self.norm(x + self.mlp2(x) / 2)


class Conformer(nn.Module):
    """A CTC speech recognizer: log-mel features -> logits of the symbols, with blank = 0, at each subsampled frame; see
    `frames`.

    `lengths` are the real frames of each row, or None if there is no padding; frames after them have no influence. A
    row without real frames yields meaningless logits. Raises `SettingsError` for an even `kernel`, an odd `dim` or
    one that `heads` does not divide, and `DataError` for another number of features.
    """

    stride = 4  # spectrogram frames per output frame

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.dim % c.heads or c.dim % 2:
            raise SettingsError(f"dim={c.dim} must be even and a multiple of heads={c.heads}.")
        if c.kernel % 2 == 0:
            raise SettingsError(f"kernel={c.kernel} must be odd, such as {c.kernel - 1} or {c.kernel + 1}.")
        self.stem = Subsampling(c.features, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.head = nn.Linear(c.dim, c.vocab_size)

    def frames(self, lengths: Tensor) -> Tensor:
        """Return the number of output frames for this number of input frames; integers or tensors."""
        return (lengths + self.stride - 1) // self.stride

    def relative_positions(self, x: Tensor) -> Tensor:  # B S D -> 2S D
        """Return sinusoidal embeddings of the distances S-1, ..., 0, ..., -S; positive distances refer to earlier frames."""
        steps, dim = x.shape[1:]
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        distance = torch.arange(steps - 1, -steps - 1, -1, device=x.device, dtype=dtype)
        rate = 10_000 ** -(torch.arange(0, dim, 2, device=x.device, dtype=dtype) / dim)
        angle = distance[:, None] * rate
        return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:  # B T F, B -> B S vocab
        if features.shape[-1] != self.config.features:
            raise DataError(
                f"The frames have {features.shape[-1]} features, but the model expects features={self.config.features}."
            )
        x = self.dropout(self.stem(features, lengths))
        mask = None
        if lengths is not None:
            mask = ensure_nonempty(torch.arange(x.shape[1], device=x.device) < self.frames(lengths)[:, None])
        places = self.relative_positions(x)
        for block in self.blocks:
            x = block(x, places, mask)
        return self.head(x)


LAYER = "wav2vec2_conformer.encoder.layers.{i}."
HUGGINGFACE_LAYERS = {  # blocks and head of Wav2Vec2ConformerForCTC with relative positions, which reads waveforms
    LAYER + "ffn{k}_layer_norm.*": "blocks.{i}.mlp{k}.norm.*",
    LAYER + "ffn{k}.intermediate_dense.*": "blocks.{i}.mlp{k}.up.*",
    LAYER + "ffn{k}.output_dense.*": "blocks.{i}.mlp{k}.down.*",
    LAYER + "self_attn_layer_norm.*": "blocks.{i}.attn.norm.*",
    LAYER + "self_attn.linear_q.*": Fused("blocks.{i}.attn.qkv.*", 0, 3),
    LAYER + "self_attn.linear_k.*": Fused("blocks.{i}.attn.qkv.*", 1, 3),
    LAYER + "self_attn.linear_v.*": Fused("blocks.{i}.attn.qkv.*", 2, 3),
    LAYER + "self_attn.linear_pos.*": "blocks.{i}.attn.pos.*",
    LAYER + "self_attn.pos_bias_*": "blocks.{i}.attn.*",
    LAYER + "self_attn.linear_out.*": "blocks.{i}.attn.proj.*",
    LAYER + "conv_module.layer_norm.*": "blocks.{i}.conv.norm1.*",
    LAYER + "conv_module.pointwise_conv1.*": "blocks.{i}.conv.up.*",
    LAYER + "conv_module.depthwise_conv.*": "blocks.{i}.conv.conv.*",
    LAYER + "conv_module.batch_norm.*": "blocks.{i}.conv.norm2.*",
    LAYER + "conv_module.pointwise_conv2.*": "blocks.{i}.conv.down.*",
    LAYER + "final_layer_norm.*": "blocks.{i}.norm.*",
    "lm_head.*": "head.*",
}

CARD = Card(
    name="conformer",
    model=Conformer,
    config=Config,
    paper="arXiv:2005.08100",
    year=2020,
    input_type="speech",
    output_type="ctc",
    sizes={
        # No parameter counts of these sizes are published. Table 1 has 10.3, 30.7 and 118.8 million with a
        # transducer's LSTM and joint network and kernels of 32; these have 8,850,112, 27,574,272 and 115,601,920,
        # including the head. The blocks alone have 8,098,560, 25,407,488 and 107,468,288; torchaudio's, without
        # relative positions but with biases in the convolutions, have 7,771,392, 24,367,104 and 103,029,248.
        "conformer-s": Size(),
        "conformer-m": Size(dim=256),
        "conformer-l": Size(dim=512, depth=17, heads=8),
        "conformer-xs": Size(dim=64, depth=4, kernel=15),  # not in the paper; for an hour of speech or less
        "conformer-test": Size(vocab_size=7, features=6, dim=8, depth=2, heads=2, growth=2, kernel=3, dropout=0.0),
    },
    recipe={"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "warmup": 0.1, "beta2": 0.98},
)
