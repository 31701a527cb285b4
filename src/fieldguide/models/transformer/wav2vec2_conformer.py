"""Wav2Vec2-Conformer: Wav2Vec 2.0 with Conformer blocks (Wang et al. 2020, arXiv:2010.05171).

New here: the encoder of Wav2Vec 2.0 whose Transformer blocks are those of the Conformer: convolution next to attention, whose scores
depend on the distance of two frames, so that no convolution stands for positions. Trained by fairseq (whose paper is cited) on the
60,000 hours of LibriVox.

Initialization: as Wav2Vec 2.0: N(0, 0.02) for matrices and zero biases; convolutions Kaiming-normal; zeros for the attention biases
u and v.
Shapes: B batch, N samples, S frames, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import ConfigRow, Derived, Expect
from fieldguide.models.mapping.key_rules import Dropped, Row
from fieldguide.models.transformer._shared.conformer_blocks import (
    ConformerBlock,
    RelativeAttention,
    name_blocks,
    relative_positions,
)
from fieldguide.models.transformer._shared.waveform_encoder import configure, name_all
from fieldguide.models.transformer.wav2vec2 import OUTPUT_TYPES, Wav2Vec2
from fieldguide.models.transformer.wav2vec2 import Config as Wav2Vec2Config


@dataclass(frozen=True, kw_only=True)
class Config(Wav2Vec2Config):
    kernel: int = 31  # kernel size of the depthwise convolution, odd
    pre_norm: bool = True  # the last LayerNorm follows the blocks


class Wav2Vec2Conformer(Wav2Vec2):
    """A recording -> the output given by `config.output_type`; see `WaveformEncoder`."""

    def build_block(self) -> nn.Module:
        c = self.config
        return ConformerBlock(c.dim, c.heads, c.hidden, c.kernel, c.dropout)

    def add_positions(self) -> None:
        """Add nothing: attention knows the distances."""

    def locate(self, x: Tensor) -> Tensor:  # B S D -> B S D
        return x

    def run_blocks(self, x: Tensor, mask: Tensor | None, states: list[Tensor]) -> Tensor:  # B S D -> B S D
        places = relative_positions(x)
        for block in self.blocks:
            x = block(x, places, mask)
            states.append(x)
        return x

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for module in self.modules():
            if isinstance(module, RelativeAttention):
                nn.init.zeros_(module.u)
                nn.init.zeros_(module.v)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        return super().forward(waveform, lengths)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    prefix = "wav2vec2_conformer."
    names = {key: row for key, row in name_all(prefix, config).items() if "encoder.layers" not in key and "pos_conv" not in key}
    for before in ("", prefix) if config.output_type == "vector" else (prefix, ""):
        names |= name_blocks(before + "encoder.layers.{i}.")
        for part in ("bias", "weight_g", "weight_v", "parametrizations.weight.original{k}"):
            names[f"{before}encoder.pos_conv_embed.conv.{part}"] = Dropped("the network does not use it")
    return names | {
        "quantizer.codevectors": "quantizer.entries",
        "quantizer.weight_proj.*": "quantizer.choose.*",
        "project_hid.*": "context.*",
        "project_q.*": "target.*",
    }


KINDS = {"ForCTC": "ctc", "ForSequenceClassification": "label", "Model": "vector", "ForPreTraining": "contexts"}
CONFIG: dict[str, ConfigRow] = {
    **configure("Wav2Vec2Conformer", "wav2vec2-conformer", KINDS),
    "do_stable_layer_norm": Expect(True, written=False),
    "hidden_act": Expect("swish", absent="gelu"),
    "position_embeddings_type": Expect("relative"),
    "conv_depthwise_kernel_size": "kernel",
    "conformer_conv_dropout": Derived(lambda t: {}, lambda c: c.dropout),
    "num_codevector_groups": "codebooks",
    "num_codevectors_per_group": "codes",
    "codevector_dim": "code_dim",
    "proj_codevector_dim": "contrast_dim",
    "add_adapter": Expect(False),
}

LARGE: dict[str, Any] = {
    **{"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096, "code_dim": 768, "contrast_dim": 768},
    **{"stem_norm": "layer", "stem_bias": True},
}

CARD = Card(
    name="wav2vec2-conformer",
    model=Wav2Vec2Conformer,
    config=Config,
    paper="arXiv:2010.05171",
    year=2020,
    input_type="waveform",
    output_type=(*OUTPUT_TYPES, "contexts"),
    sizes={
        # transformers counts 8,389,760 more: a convolution for positions that the network does not use.
        "wav2vec2-conformer-rel-pos-large": Size(
            **LARGE, params=610_202_144, source="facebook/wav2vec2-conformer-rel-pos-large-960h-ft"
        ),
        "wav2vec2-conformer-test": Size(
            vocab_size=7,
            num_classes=3,
            dim=8,
            depth=2,
            heads=2,
            hidden=12,
            kernel=3,
            pos_kernel=4,
            pos_groups=2,
            stem_dims=(6, 6),
            stem_kernels=(4, 3),
            stem_strides=(2, 2),
            stem_norm="layer",
            stem_bias=True,
            projection=5,
            dropout=0.0,
            mask_time=0.0,
            codes=5,
            code_dim=6,
            contrast_dim=5,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={
        "optimizer": "adamw",
        "lr": 5e-4,
        "beta2": 0.98,
        "weight_decay": 0.01,
        "schedule": "linear",
        "warmup": 0.08,
    },  # base
)
