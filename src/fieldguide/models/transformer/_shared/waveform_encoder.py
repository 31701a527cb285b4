"""The encoder of recordings that Wav2Vec 2.0 and HuBERT share, its heads, and its public names.

Convolutions turn the samples of a recording into a vector every 20 ms; a Transformer follows, whose positions are the sum of each
vector and a wide grouped convolution over its neighbors.
Shapes: B batch, N samples, S frames, C width of the convolutions, D width of the Transformer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.errors import SettingsError
from fieldguide.models.layers.attention import Attention
from fieldguide.models.layers.mlp import Mlp
from fieldguide.models.layers.padding import ensure_nonempty, masked_mean
from fieldguide.models.layers.symbol_head import SymbolHead
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, ValueMap, WithDefault
from fieldguide.models.mapping.key_rules import Dropped, Fused, MovedRow, Row, Zeros
from fieldguide.models.transformer._shared.text_encoder import PostNormBlock
from fieldguide.models.transformer.bert import CLASSES

EPS = 1e-5
OUTPUT_TYPES = ("ctc", "label", "vector")
# A network for little speech. Its convolutions are those of contrastive predictive coding (van den Oord et al. 2018,
# arXiv:1807.03748, section 3.1), fewer and with a frame every 160 samples.
SMALL: dict[str, Any] = {
    "dim": 96,
    "depth": 4,
    "heads": 4,
    "hidden": 384,
    "pre_norm": True,
    "stem_dims": (96,) * 5,
    "stem_kernels": (10, 8, 4, 4, 4),
    "stem_strides": (5, 4, 2, 2, 2),
    "stem_norm": "layer",
    "stem_bias": True,
    "pos_kernel": 32,
    "pos_groups": 8,
    "projection": 96,
    "contrast_dim": 64,
}


@dataclass(frozen=True, kw_only=True)
class WaveformConfig:
    """Fields that all encoders of recordings have."""

    vocab_size: int = 32  # number of symbols, including the blank (0)
    num_classes: int = 2
    output_type: str = "ctc"
    dim: int = 768  # D
    depth: int = 12
    heads: int = 12
    hidden: int = 3072  # hidden width of the MLPs
    pre_norm: bool = False  # normalize before attention and MLP ("stable layer norm") instead of after
    stem_dims: tuple[int, ...] = (512,) * 7  # C of each convolution of the stem
    stem_kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    stem_strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    stem_bias: bool = False
    stem_norm: str = "group"  # group: over time, after the first convolution; layer: over C, after each
    pos_kernel: int = 128  # of the convolution that stands for positions
    pos_groups: int = 16
    projection: int = 256  # width before the classes of a recording
    weigh_layers: bool = False  # classes are predicted from a weighted mean of all blocks' outputs instead of the last
    dropout: float = 0.1
    mask_time: float = 0.05  # fraction of the frames that masks cover in training, at most
    mask_time_length: int = 10  # frames of a mask
    mask_features: float = 0.0  # fraction of the features that masks cover in training, at most
    mask_features_length: int = 10
    blank: int = 0  # place of the blank in public files; it is 0 here

    @property
    def field(self) -> int:
        """Samples that a frame of the stem sees: the shortest recording."""
        size, step = 1, 1
        for kernel, stride in zip(self.stem_kernels, self.stem_strides):
            size, step = size + (kernel - 1) * step, step * stride
        return size


class TimeNorm(nn.GroupNorm):
    """Normalization of each channel over the real frames of a recording: a group norm with a channel per group.

    Zeros that pad a recording would change the statistics, and with them all frames of it.
    """

    def __init__(self, dim: int):
        super().__init__(dim, dim, EPS)

    def forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:  # B C S, B -> B C S
        if frames is None:
            return super().forward(x)
        real = torch.arange(x.shape[2], device=x.device) < frames[:, None, None]  # B 1 S
        x32 = x if x.dtype == torch.float64 else x.float()
        count = frames.clamp(min=1)[:, None, None].to(x32.dtype)
        centered = x32 - (x32 * real).sum(2, keepdim=True) / count
        var = (centered.square() * real).sum(2, keepdim=True) / count
        return (centered * (var + self.eps).rsqrt() * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each frame."""

    def forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:  # B C S -> B C S
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class StemLayer(nn.Module):
    """A convolution over time, normalization (or none) and GELU."""

    def __init__(self, width: int, dim: int, kernel: int, stride: int, bias: bool, norm: nn.Module | None):
        super().__init__()
        self.conv = nn.Conv1d(width, dim, kernel, stride, bias=bias)
        self.norm = norm

    def forward(self, x: Tensor, frames: Tensor | None) -> Tensor:  # B C N, B -> B C S
        x = self.conv(x)
        return F.gelu(x if self.norm is None else self.norm(x, frames))


class PositionalConvolution(nn.Module):
    """A grouped convolution whose weight is a direction and a length for each place of the kernel (weight normalization, Salimans
    and Kingma 2016, arXiv:1602.07868), then GELU.

    An even kernel sees one frame more on the left than on the right.
    """

    def __init__(self, dim: int, kernel: int, groups: int):
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self.direction = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.length = nn.Parameter(torch.empty(1, 1, kernel))
        self.bias = nn.Parameter(torch.empty(dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.direction, std=2 * math.sqrt(1 / (self.kernel * self.bias.numel())))
        with torch.no_grad():
            self.length.copy_(self.direction.norm(dim=(0, 1), keepdim=True))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B S D
        weight = self.direction * (self.length / self.direction.norm(dim=(0, 1), keepdim=True))
        y = F.conv1d(x.transpose(1, 2), weight.to(x.dtype), self.bias, padding=self.kernel // 2, groups=self.groups)
        return F.gelu(y[..., : x.shape[1]]).transpose(1, 2)


class PreNormBlock(nn.Module):
    """A pre-norm Transformer block: attention and MLP, each after a normalization and with a residual connection."""

    def __init__(self, attn: nn.Module, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, EPS), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, EPS), Mlp(dim, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class WaveformEncoder(nn.Module):
    """An encoder of recordings with the head given by `config.output_type`: symbols of CTC with blank = 0 at each frame (see
    `frames`), classes, or the mean over the real frames.

    `lengths` are the real samples of each row, or None if there is no padding; samples after them have no influence, also where
    the statistics of normalization span a whole recording. In training, masks hide frames (SpecAugment, Park et al. 2019,
    arXiv:1904.08779) by `mask_time` and features by `mask_features`. Raises `SettingsError` for settings that do not fit each other.
    """

    heads: ClassVar[tuple[str, ...]] = ("head", "projector", "layer_weights")
    output_types: ClassVar[tuple[str, ...]] = OUTPUT_TYPES
    frozen_parts: ClassVar[tuple[str, ...]] = ("stem",)  # in fine-tuning, as published

    def __init__(self, config: Any):
        super().__init__()
        c = self.config = config
        self.check_settings()
        widths = (1, *c.stem_dims)
        self.stem = nn.ModuleList()
        for i, (dim, kernel, stride) in enumerate(zip(c.stem_dims, c.stem_kernels, c.stem_strides)):
            norm = ChannelNorm(dim) if c.stem_norm == "layer" else TimeNorm(dim) if i == 0 else None
            self.stem.append(StemLayer(widths[i], dim, kernel, stride, c.stem_bias, norm))
        self.stem_out = nn.LayerNorm(c.stem_dims[-1], EPS)
        self.proj = nn.Linear(c.stem_dims[-1], c.dim)
        if self.has_mask:
            self.mask_embed = nn.Parameter(torch.empty(c.dim))
        self.add_positions()
        self.norm = nn.LayerNorm(c.dim, EPS)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(self.build_block() for _ in range(c.depth))
        self.add_head()
        self.reset_parameters()

    def check_settings(self) -> None:
        """Raise `SettingsError` for settings that do not fit each other."""
        c = self.config
        if c.output_type not in self.output_types:
            raise SettingsError(
                f"output_type={c.output_type!r} is not supported. Choose one of {', '.join(self.output_types)}."
            )
        if c.stem_norm not in ("group", "layer"):
            raise SettingsError(f"stem_norm={c.stem_norm!r} must be group or layer.")
        if not len(c.stem_dims) == len(c.stem_kernels) == len(c.stem_strides) > 0:
            raise SettingsError("stem_dims, stem_kernels and stem_strides must have the same length, at least 1.")

    def build_block(self) -> nn.Module:
        """Return a block of the Transformer."""
        c = self.config
        attn = Attention(c.dim, c.heads, c.dropout)
        return (
            PreNormBlock(attn, c.dim, c.hidden, c.dropout)
            if c.pre_norm
            else PostNormBlock(attn, c.dim, c.hidden, c.dropout, EPS)
        )

    def add_positions(self) -> None:
        """Create the layer that stands for positions."""
        c = self.config
        if c.dim % c.pos_groups:
            raise SettingsError(f"dim={c.dim} must be divisible by pos_groups={c.pos_groups}.")
        self.pos = PositionalConvolution(c.dim, c.pos_kernel, c.pos_groups)

    def locate(self, x: Tensor) -> Tensor:  # B S D -> B S D
        """Add positions."""
        return x + self.pos(x)

    def run_blocks(self, x: Tensor, mask: Tensor | None, states: list[Tensor]) -> Tensor:  # B S D -> B S D
        """Return the output of the last block; the output of each is added to `states`."""
        for block in self.blocks:
            x = block(x, mask)
            states.append(x)
        return x

    def add_head(self) -> None:
        """Create the layers of the head."""
        c = self.config
        if c.output_type == "ctc":
            self.head: nn.Module = SymbolHead(c.dim, c.vocab_size)
        if c.output_type == "label" and c.weigh_layers:
            self.layer_weights = nn.Parameter(torch.ones(c.depth + 1) / (c.depth + 1))
        if c.output_type == "label":
            self.projector, self.head = nn.Linear(c.dim, c.projection), nn.Linear(c.projection, c.num_classes)

    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, PositionalConvolution):
                module.reset_parameters()
        bound = self.proj.in_features**-0.5
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)
        if self.has_mask:
            nn.init.uniform_(self.mask_embed)

    @property
    def has_mask(self) -> bool:
        """Whether there is a vector for hidden frames."""
        return self.config.mask_time > 0 or self.config.mask_features > 0

    @property
    def stride(self) -> int:
        """Samples per output frame."""
        return math.prod(self.config.stem_strides)

    @property
    def field(self) -> int:
        """Samples that an output frame sees in the stem."""
        return self.config.field

    def count_frames(self, lengths: Any, layers: int | None = None) -> Any:
        """Return the number of frames after the first `layers` convolutions, by default all, for numbers of samples."""
        for kernel, stride in list(zip(self.config.stem_kernels, self.config.stem_strides))[:layers]:
            lengths = (lengths - kernel) // stride + 1
        return max(lengths, 0) if isinstance(lengths, int) else lengths.clip(0)

    def frames(self, lengths: Any) -> Any:
        """Return the number of output frames for this number of samples; integers or tensors. Only whole windows count."""
        return self.count_frames(lengths)

    def run_stem(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:  # B N, B -> B S C
        """Return the output of the convolutions."""
        x = F.pad(waveform, (0, max(0, self.field - waveform.shape[1])))[:, None]
        for i, layer in enumerate(self.stem):
            x = layer(x, None if lengths is None else self.count_frames(lengths, i + 1))
        return x.transpose(1, 2)

    def convolve(self, waveform: Tensor, lengths: Tensor | None) -> Tensor:  # B N, B -> B S C
        """Return the normalized output of the convolutions."""
        return self.stem_out(self.run_stem(waveform, lengths))

    def contextualize(
        self, x: Tensor, mask: Tensor | None, hidden: Tensor | None = None, states: list[Tensor] | None = None
    ) -> Tensor:  # B S C -> B S D
        """Return the output of the Transformer. `mask` is True for real frames, `hidden` for those that are hidden.

        The input of the first block and the output of each are added to `states`.
        """
        x = self.dropout(self.proj(x))
        if hidden is None and self.training and self.has_mask:
            hidden = self.sample_time_masks(x, mask)
        if hidden is not None:
            vector = self.mask_embed.to(x.dtype) if self.has_mask else torch.zeros_like(x)
            x = torch.where(hidden[..., None], vector, x)
        if self.training and self.config.mask_features:
            x = x.masked_fill(self.sample_feature_masks(x), 0.0)
        if mask is not None:
            x = x * mask[..., None]  # the positional convolution must not see padding
        x = self.locate(x)
        x = self.dropout(x if self.config.pre_norm else self.norm(x))
        states = [] if states is None else states
        states.append(x)
        x = self.run_blocks(x, mask, states)
        return self.norm(x) if self.config.pre_norm else x

    def sample_time_masks(self, x: Tensor, mask: Tensor | None) -> Tensor:  # B S D -> B S bool
        """Return random frames to hide in training."""
        c = self.config
        counts = torch.full((len(x),), x.shape[1]) if mask is None else mask.sum(1)
        return sample_spans(counts.to(x.device), x.shape[1], c.mask_time, c.mask_time_length)

    def sample_feature_masks(self, x: Tensor) -> Tensor:  # B S D -> B 1 D bool
        """Return random features to hide in training."""
        c = self.config
        counts = torch.full((len(x),), x.shape[2], device=x.device)
        return sample_spans(counts, x.shape[2], c.mask_features, c.mask_features_length)[:, None]

    def make_mask(self, x: Tensor, lengths: Tensor | None) -> Tensor | None:  # B S C, B -> B S bool
        """Return which frames are real."""
        if lengths is None:
            return None
        return ensure_nonempty(torch.arange(x.shape[1], device=x.device) < self.frames(lengths)[:, None])

    def features(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> B S D
        """Return the final hidden states of the frames."""
        x = self.convolve(waveform, lengths)
        return self.contextualize(x, self.make_mask(x, lengths))

    def list_states(self, waveform: Tensor, lengths: Tensor | None = None) -> list[Tensor]:  # B N, B -> B S D each
        """Return the input of the first block and the output of each block."""
        states: list[Tensor] = []
        x = self.convolve(waveform, lengths)
        self.contextualize(x, self.make_mask(x, lengths), None, states)
        return states

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        states: list[Tensor] = []
        x = self.convolve(waveform, lengths)
        mask = self.make_mask(x, lengths)
        x = self.contextualize(x, mask, None, states)
        if self.config.output_type == "ctc":
            return self.head(self.dropout(x))  # B S vocab
        if self.config.output_type == "label":
            if self.config.weigh_layers:
                x = torch.einsum("lbsd,l->bsd", torch.stack(states), self.layer_weights.softmax(0).to(x.dtype))
            x = self.projector(x)
        x = x.mean(1) if mask is None else masked_mean(x, mask)
        return self.head(x) if self.config.output_type == "label" else x  # B classes, or B D


def sample_spans(counts: Tensor, width: int, share: float, length: int) -> Tensor:  # B -> B width bool
    """Return random spans of `length` positions within the first `counts` of each row, which cover at most a fraction `share`.

    The number of spans is share * count / length, rounded up or down at random. They begin at different places and may overlap.
    """
    length = max(1, min(length, width))
    places = counts - length + 1  # where a span may begin
    spans = (share * counts / length + torch.rand(1, device=counts.device)).floor().clamp(max=width)
    spans = torch.minimum(spans, places.clamp(min=0))
    drawn = torch.rand(len(counts), width, device=counts.device)
    drawn = drawn.masked_fill(torch.arange(width, device=counts.device) >= places[:, None], -1.0)
    begins = drawn.argsort(1, descending=True).argsort(1) < spans[:, None]  # B width
    reached = F.pad(begins.float().cumsum(1), (length, 0))
    return reached[:, length:] - reached[:, :width] > 0


# Public names


def name_encoder(before: str, config: Any) -> dict[str, Row]:
    """Return the names of transformers for the encoder, which begin with `before`."""
    layer = before + "encoder.layers.{i}."
    pos = before + "encoder.pos_conv_embed.conv."
    names: dict[str, Row] = {
        before + "feature_extractor.conv_layers.{i}.conv.*": "stem.{i}.conv.*",
        before + "feature_extractor.conv_layers.{i}.layer_norm.*": "stem.{i}.norm.*",
        before + "feature_projection.layer_norm.*": "stem_out.*",
        before + "feature_projection.projection.*": "proj.*",
        pos + "parametrizations.weight.original0": "pos.length",
        pos + "parametrizations.weight.original1": "pos.direction",
        pos + "weight_g": "pos.length",  # in older files
        pos + "weight_v": "pos.direction",
        pos + "bias": "pos.bias",
        before + "encoder.layer_norm.*": "norm.*",
        **{layer + f"attention.{x}_proj.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, x in enumerate("qkv")},
        layer + "attention.out_proj.*": "blocks.{i}.attn.proj.*",
        layer + "layer_norm.*": "blocks.{i}.norm1.*",
        layer + "feed_forward.intermediate_dense.*": "blocks.{i}.mlp.up.*",
        layer + "feed_forward.output_dense.*": "blocks.{i}.mlp.down.*",
        layer + "final_layer_norm.*": "blocks.{i}.norm2.*",
    }
    if config.mask_time > 0 or config.mask_features > 0:
        names[before + "masked_spec_embed"] = "mask_embed"
    else:
        names[before + "masked_spec_embed"] = Dropped("hides frames, which this configuration does not")
    return names


def name_all(prefix: str, config: Any) -> dict[str, Row]:
    """Return the names of transformers for the bare encoder, whose files have no prefix, or with a head."""
    names: dict[str, Row] = {}
    for before in ("", prefix) if config.output_type == "vector" else (prefix, ""):  # the first is written
        names |= name_encoder(before, config)
    if (
        config.mask_time > 0 or config.mask_features > 0
    ):  # published networks for CTC lack the vector, which inference does not need
        names["<hidden frames>"] = Zeros("mask_embed", like="proj.bias", length=config.dim)
    if config.output_type == "ctc":
        names["lm_head.*"] = MovedRow("head.*", min(config.blank, config.vocab_size - 1))
    else:
        names["classifier.*"] = "head.*"
    return names | {"projector.*": "projector.*", "layer_weights": "layer_weights"}


def configure(kind: str, model_type: str, outputs: Mapping[str, str]) -> dict[str, ConfigRow]:
    """Return the configuration keys of transformers, for class names that begin with `kind`."""
    return {
        "model_type": Expect(model_type),
        "architectures": ValueMap("output_type", {kind + name: gives for name, gives in outputs.items()}),
        "vocab_size": "vocab_size",
        "id2label": CLASSES,
        "hidden_size": "dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "hidden",
        "hidden_act": Expect("gelu"),
        "feat_extract_activation": Expect("gelu"),
        "do_stable_layer_norm": "pre_norm",
        "conv_dim": "stem_dims",
        "conv_kernel": "stem_kernels",
        "conv_stride": "stem_strides",
        "num_feat_extract_layers": Expect(lambda c: len(c.stem_dims)),
        "conv_bias": "stem_bias",
        "feat_extract_norm": "stem_norm",
        "num_conv_pos_embeddings": "pos_kernel",
        "num_conv_pos_embedding_groups": "pos_groups",
        "classifier_proj_size": "projection",
        "use_weighted_layer_sum": "weigh_layers",
        "layer_norm_eps": Expect(EPS),
        "hidden_dropout": "dropout",
        "attention_dropout": Derived(lambda t: {}, lambda c: c.dropout),
        "activation_dropout": Derived(lambda t: {}, lambda c: c.dropout),
        "final_dropout": Derived(lambda t: {}, lambda c: c.dropout),
        "layerdrop": Derived(lambda t: {}, lambda c: 0.0),  # blocks are never left out here
        "mask_time_prob": "mask_time",
        "mask_time_length": "mask_time_length",
        "mask_feature_prob": "mask_features",
        "mask_feature_length": "mask_features_length",
        "pad_token_id": WithDefault("blank", 0),
    }
