"""FastConformer: a Conformer that keeps one frame in eight (Rekesh et al. 2023, arXiv:2305.05084).

New here: three convolutions of stride 2, of which two are depthwise separable, reduce the frame rate by eight instead of four, and
the kernel of the convolution in the blocks has 9 frames instead of 31: about a third of the Conformer's work for the same accuracy.
Parakeet are its public checkpoints. One frame covers 80 ms, so symbols are word pieces, which CTC (Graves et al. 2006) predicts;
blank = 0.

Initialization: torch's default for every layer, zeros for the attention biases u and v; the paper does not specify it.
Shapes: B batch, T frames of the spectrogram, F features per frame, C channels of the convolutions, S = ceil(T/8) frames, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.layers.symbol_head import SymbolHead
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Fused, MovedRow, Row
from fieldguide.models.transformer._shared.conformer_blocks import ConformerBlock, relative_positions


@dataclass(frozen=True, kw_only=True)
class Config:
    vocab_size: int = 1025  # number of symbols, including the blank (0)
    features: int = 80  # F, mel bands, a multiple of `reduction`
    dim: int = 1024  # D
    depth: int = 24
    heads: int = 8
    hidden: int = 4096  # hidden width of the feed-forward layers
    kernel: int = 9  # kernel size of the depthwise convolution in the blocks, odd
    reduction: int = 8  # frames of the spectrogram per output frame, a power of 2
    stem_channels: int = 256  # C
    bias: bool = True  # of linear layers in the blocks
    conv_bias: bool = True  # of convolutions in the blocks
    scaled: bool = True  # multiply the input of the blocks by sqrt(D)
    dropout: float = 0.1
    blank: int = 1024  # place of the blank in public files; it is 0 here


class SeparableSubsampling(nn.Module):
    """A 3x3 convolution of stride 2, then depthwise ones of stride 2 with a pointwise one after each, ReLU after each pair, and a
    linear layer over channels and mel bands.

    Padding is zero after each convolution, so T frames become ceil(T/2) with each stride.
    """

    def __init__(self, features: int, channels: int, dim: int, strides: int):
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, 2, 1)
        self.depthwise = nn.ModuleList(nn.Conv2d(channels, channels, 3, 2, 1, groups=channels) for _ in range(strides - 1))
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(strides - 1))
        self.proj = nn.Linear(channels * (features >> strides), dim)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:  # B T F, B -> B S D
        x = hide_padding(x[:, None], lengths)  # B 1 T F
        lengths = None if lengths is None else (lengths + 1) // 2
        x = F.relu(hide_padding(self.conv(x), lengths))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise):
            lengths = None if lengths is None else (lengths + 1) // 2
            x = hide_padding(depthwise(x), lengths)
            x = F.relu(hide_padding(pointwise(x), lengths))
        return self.proj(x.transpose(1, 2).flatten(2))  # channel-major, then mel bands


def hide_padding(x: Tensor, lengths: Tensor | None) -> Tensor:  # B C T F, B -> B C T F
    """Return the frames with zeros after the real ones."""
    if lengths is None:
        return x
    return x * (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None, :, None]


class FastConformer(nn.Module):
    """A CTC speech recognizer: log-mel features -> logits of the symbols, with blank = 0, at each subsampled frame; see
    `frames`.

    `lengths` are the real frames of each row, or None if there is no padding; frames after them have no influence. Raises
    `SettingsError` for settings that do not fit each other, and `DataError` for another number of features.
    """

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        if c.reduction < 2 or c.reduction & (c.reduction - 1) or c.features % c.reduction:
            raise SettingsError(f"reduction={c.reduction} must be a power of 2 that divides features={c.features}.")
        self.stem = SeparableSubsampling(c.features, c.stem_channels, c.dim, c.reduction.bit_length() - 1)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            ConformerBlock(c.dim, c.heads, c.hidden, c.kernel, c.dropout, c.bias, c.conv_bias) for _ in range(c.depth)
        )
        self.head = SymbolHead(c.dim, c.vocab_size)

    @property
    def stride(self) -> int:
        """Spectrogram frames per output frame."""
        return self.config.reduction

    def frames(self, lengths: Tensor) -> Tensor:
        """Return the number of output frames for this number of input frames; integers or tensors."""
        return (lengths + self.stride - 1) // self.stride

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:  # B T F, B -> B S vocab
        c = self.config
        if features.shape[-1] != c.features:
            raise DataError(f"The frames have {features.shape[-1]} features, but the model expects features={c.features}.")
        x = self.stem(features, lengths) * (math.sqrt(c.dim) if c.scaled else 1.0)
        mask = None
        if lengths is not None:
            mask = ensure_nonempty(torch.arange(x.shape[1], device=x.device) < self.frames(lengths)[:, None])
        places = relative_positions(x)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, places, mask)
        return self.head(x)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of ParakeetForCTC."""
    layer, blank = "encoder.layers.{i}.", min(config.blank, config.vocab_size - 1)
    stem = {"encoder.subsampling.layers.0.*": "stem.conv.*", "encoder.subsampling.linear.*": "stem.proj.*"}
    for i in range(config.reduction.bit_length() - 2):  # the layers in between are activations
        stem[f"encoder.subsampling.layers.{3 * i + 2}.*"] = f"stem.depthwise.{i}.*"
        stem[f"encoder.subsampling.layers.{3 * i + 3}.*"] = f"stem.pointwise.{i}.*"
    return {
        **stem,
        layer + "norm_feed_forward{k}.*": "blocks.{i}.mlp{k}.norm.*",
        layer + "feed_forward{k}.linear1.*": "blocks.{i}.mlp{k}.up.*",
        layer + "feed_forward{k}.linear2.*": "blocks.{i}.mlp{k}.down.*",
        layer + "norm_self_att.*": "blocks.{i}.attn.norm.*",
        **{layer + f"self_attn.{x}_proj.*": Fused("blocks.{i}.attn.qkv.*", i, 3) for i, x in enumerate("qkv")},
        layer + "self_attn.o_proj.*": "blocks.{i}.attn.proj.*",
        layer + "self_attn.relative_k_proj.*": "blocks.{i}.attn.pos.*",
        layer + "self_attn.bias_u": "blocks.{i}.attn.u",
        layer + "self_attn.bias_v": "blocks.{i}.attn.v",
        layer + "norm_conv.*": "blocks.{i}.conv.norm1.*",
        layer + "conv.pointwise_conv1.*": "blocks.{i}.conv.up.*",
        layer + "conv.depthwise_conv.*": "blocks.{i}.conv.conv.*",
        layer + "conv.norm.*": "blocks.{i}.conv.norm2.*",
        layer + "conv.pointwise_conv2.*": "blocks.{i}.conv.down.*",
        layer + "norm_out.*": "blocks.{i}.norm.*",
        "ctc_head.weight": MovedRow("head.weight", blank, ones=1),  # a convolution over one frame
        "ctc_head.bias": MovedRow("head.bias", blank),
    }


CONFIG: dict[str, ConfigRow] = {
    "model_type": Expect("parakeet_ctc"),
    "architectures": Derived(lambda t: {}, lambda c: ["ParakeetForCTC"]),
    "vocab_size": "vocab_size",
    "pad_token_id": WithDefault("blank", 1024),
    "encoder_config.model_type": Derived(lambda t: {}, lambda c: "parakeet_encoder"),
    "encoder_config.num_mel_bins": "features",
    "encoder_config.hidden_size": "dim",
    "encoder_config.num_hidden_layers": "depth",
    "encoder_config.num_attention_heads": "heads",
    "encoder_config.num_key_value_heads": Expect(lambda c: c.heads),
    "encoder_config.intermediate_size": "hidden",
    "encoder_config.hidden_act": Expect("silu"),
    "encoder_config.conv_kernel_size": "kernel",
    "encoder_config.subsampling_factor": "reduction",
    "encoder_config.subsampling_conv_channels": "stem_channels",
    "encoder_config.subsampling_conv_kernel_size": Expect(3),
    "encoder_config.subsampling_conv_stride": Expect(2),
    "encoder_config.attention_bias": "bias",
    "encoder_config.convolution_bias": "conv_bias",
    "encoder_config.scale_input": "scaled",
    "encoder_config.dropout": "dropout",
    "encoder_config.dropout_positions": Derived(lambda t: {}, lambda c: 0.0),
    "encoder_config.activation_dropout": Derived(lambda t: {}, lambda c: c.dropout),
    "encoder_config.attention_dropout": Derived(lambda t: {}, lambda c: 0.0),
    "encoder_config.layerdrop": Derived(lambda t: {}, lambda c: 0.0),
}

CARD = Card(
    name="fastconformer",
    model=FastConformer,
    config=Config,
    paper="arXiv:2305.05084",
    year=2023,
    input_type="speech",
    output_type="ctc",
    sizes={
        "parakeet-ctc-0.6b": Size(params=608_799_745, source="nvidia/parakeet-ctc-0.6b"),
        "parakeet-ctc-1.1b": Size(depth=42, params=1_062_540_289, source="nvidia/parakeet-ctc-1.1b"),
        # Table 1 of the paper: 17 layers of width 512, "Large"
        "fastconformer-large": Size(dim=512, depth=17, hidden=2048, params=109_287_937, source="arXiv:2305.05084, table 1"),
        "fastconformer-test": Size(
            vocab_size=7,
            features=8,
            dim=8,
            depth=2,
            heads=2,
            hidden=12,
            kernel=3,
            reduction=4,
            stem_channels=4,
            dropout=0.0,
            blank=6,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-3, "weight_decay": 1e-3, "warmup": 0.1, "beta2": 0.98},
)
