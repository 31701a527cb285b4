"""HuBERT: speech recognition after predicting the clusters of hidden frames (Hsu et al. 2021, arXiv:2106.07447).

New here: the network of Wav2Vec 2.0 without a quantizer. Before pre-training, the frames of the corpus are clustered, first by their
MFCCs and later by the features of an earlier network, and the Transformer predicts the cluster of each hidden frame. Afterwards
an output layer is trained with CTC on transcripts, or on classes.

Initialization: as Wav2Vec 2.0: N(0, 0.02) for matrices and zero biases; convolutions Kaiming-normal; vectors of clusters uniform
from 0 to 1, as in the authors' code.
Shapes: B batch, N samples, S frames, C width of the convolutions, D width, K clusters, E width of the comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.mapping.config_rules import ConfigRow, Expect, WithDefault
from fieldguide.models.mapping.key_rules import Row
from fieldguide.models.transformer._shared.waveform_encoder import (
    OUTPUT_TYPES,
    SMALL,
    WaveformConfig,
    WaveformEncoder,
    configure,
    name_all,
)


@dataclass(frozen=True, kw_only=True)
class Config(WaveformConfig):
    clusters: int = 100  # K, of frames, which pre-training predicts
    contrast_dim: int = 256  # E


class ClusterHead(nn.Module):
    """Logits of clusters: the cosine similarity of a projected frame and the vector of each cluster, divided by a temperature
    (equation 3).
    """

    temperature: ClassVar[float] = 0.1

    def __init__(self, dim: int, width: int, clusters: int):
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.vectors = nn.Parameter(torch.empty(clusters, width))

    def reset_parameters(self) -> None:
        self.proj.reset_parameters()
        nn.init.uniform_(self.vectors)

    def forward(self, x: Tensor) -> Tensor:  # ... D -> ... K
        return F.normalize(self.proj(x), dim=-1) @ F.normalize(self.vectors, dim=-1).T / self.temperature


class Hubert(WaveformEncoder):
    """A recording -> the output given by `config.output_type`: also "clusters", for pre-training; see `WaveformEncoder`."""

    heads: ClassVar[tuple[str, ...]] = (*WaveformEncoder.heads, "clusters")
    output_types: ClassVar[tuple[str, ...]] = (*OUTPUT_TYPES, "clusters")

    def add_head(self) -> None:
        super().add_head()
        c = self.config
        if c.output_type == "clusters":
            self.clusters = ClusterHead(c.dim, c.contrast_dim, c.clusters)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.output_type == "clusters":
            self.clusters.reset_parameters()

    def encode_hidden(
        self, waveform: Tensor, lengths: Tensor | None, hidden: Tensor
    ) -> tuple[Tensor, Tensor]:  # B N, B, B S bool -> B S D, B S C
        """Return the states of frames of which the Transformer must not see those that are `hidden`, and the output of the
        convolutions before normalization. `self.clusters` maps states to logits.
        """
        convolved = self.run_stem(waveform, lengths)
        x = self.stem_out(convolved)
        return self.contextualize(x, self.make_mask(x, lengths), hidden), convolved

    def predict_codes(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> B S 1 int64
        """Return the most probable cluster of each frame."""
        return self.clusters(self.features(waveform, lengths)).argmax(-1, keepdim=True)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        if self.config.output_type == "clusters":
            return self.clusters(self.features(waveform, lengths))  # B S K
        return super().forward(waveform, lengths)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head; those of clusters, which transformers does not
    have, as in the authors' code.
    """
    return name_all("hubert.", config) | {"final_proj.*": "clusters.proj.*", "label_embs_concat": "clusters.vectors"}


KINDS = {
    "ForCTC": "ctc",
    "ForSequenceClassification": "label",
    "Model": "vector",
    "ForPreTraining": "clusters",  # no class of transformers, whose HubertModel reads the encoder of such files
}
CONFIG: dict[str, ConfigRow] = {
    **configure("Hubert", "hubert", KINDS),
    "num_clusters": WithDefault("clusters", 100),  # this key and the next are no fields of transformers
    "proj_cluster_dim": WithDefault("contrast_dim", 256),
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
    output_type=(*OUTPUT_TYPES, "clusters"),
    sizes={
        "hubert-base": Size(output_type="vector", params=94_371_712, source="facebook/hubert-base-ls960"),
        "hubert-large": Size(
            dim=1024, depth=24, heads=16, hidden=4096, **STABLE, params=315_471_520, source="facebook/hubert-large-ls960-ft"
        ),
        "hubert-xlarge": Size(
            dim=1280, depth=48, heads=16, hidden=5120, **STABLE, params=962_538_400, source="facebook/hubert-xlarge-ls960-ft"
        ),
        "hubert-xs": Size(**SMALL),  # not in the paper; for minutes to a few hours of speech
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
            clusters=6,
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
