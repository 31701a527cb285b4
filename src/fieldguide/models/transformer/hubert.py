"""HuBERT: speech recognition after predicting the clusters of hidden frames (Hsu et al. 2021, arXiv:2106.07447).

New here: the network of Wav2Vec 2.0 without a quantizer. Before pre-training, the frames of the corpus are clustered, first by their
MFCCs and later by the features of an earlier network, and the Transformer predicts the cluster of each hidden frame. Afterwards
an output layer is trained with CTC on transcripts, or on classes.

Initialization: as Wav2Vec 2.0: N(0, 0.02) for matrices and zero biases; convolutions Kaiming-normal.
Shapes: B batch, N samples, S frames, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import ConfigRow, Expect
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer._shared.waveform_encoder import (
    OUTPUT_TYPES,
    WaveformConfig,
    WaveformEncoder,
    configure,
    name_all,
)


@dataclass(frozen=True, kw_only=True)
class Config(WaveformConfig):
    """The fields of all encoders of recordings."""


class Hubert(WaveformEncoder):
    """A recording -> the output given by `config.output_type`; see `WaveformEncoder`."""

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        return super().forward(waveform, lengths)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    return name_all("hubert.", config)


CONFIG: dict[str, ConfigRow] = {
    **configure("Hubert", "hubert", {"ForCTC": "ctc", "ForSequenceClassification": "label", "Model": "vector"}),
    "feat_proj_layer_norm": Expect(True),
    "conv_pos_batch_norm": Expect(False),
}

STABLE: Mapping[str, Any] = {"pre_norm": True, "stem_norm": "layer", "stem_bias": True}

CARD = Card(
    name="hubert",
    model=Hubert,
    config=Config,
    paper="arXiv:2106.07447",
    year=2021,
    input_type="waveform",
    output_type=OUTPUT_TYPES,
    sizes={
        "hubert-base": Size(output_type="vector", params=94_371_712, source="facebook/hubert-base-ls960"),
        "hubert-large": Size(
            dim=1024, depth=24, heads=16, hidden=4096, **STABLE, params=315_471_520, source="facebook/hubert-large-ls960-ft"
        ),
        "hubert-xlarge": Size(
            dim=1280, depth=48, heads=16, hidden=5120, **STABLE, params=962_538_400, source="facebook/hubert-xlarge-ls960-ft"
        ),
        "hubert-test": Size(
            vocab_size=7,
            num_classes=3,
            dim=8,
            depth=2,
            heads=2,
            hidden=12,
            stem_dims=(6, 6),
            stem_kernels=(4, 3),
            stem_strides=(2, 2),
            stem_norm="layer",
            stem_bias=True,
            pre_norm=True,
            pos_kernel=4,
            pos_groups=2,
            projection=5,
            dropout=0.0,
            mask_time=0.0,
        ),
    },
    weights={"huggingface": huggingface},
    configs={"huggingface": CONFIG},
    recipe={"optimizer": "adamw", "lr": 1e-4, "beta2": 0.98, "weight_decay": 0.01, "warmup": 0.1},
)
