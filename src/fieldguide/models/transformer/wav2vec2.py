"""Wav2Vec 2.0: contrastive pre-training on the samples of speech (Baevski et al. 2020, arXiv:2006.11477).

New here: the network reads samples, not a spectrogram. It is pre-trained on unlabeled speech: frames after the convolutions are
hidden from the Transformer, which must tell the quantized vector of each hidden frame from those of other hidden frames. A small
output layer is then trained with CTC on transcripts. Vectors are quantized by choosing one entry from each of two codebooks, which
is learned through a Gumbel softmax (Jang et al. 2016, arXiv:1611.01144). There are two forms: base has one group norm and
normalizes after each layer; large networks of LibriVox and XLSR (Conneau et al. 2020, arXiv:2006.13979; Babu et al. 2021,
arXiv:2111.09296) have LayerNorm in every convolution and normalize before each layer.

Initialization: N(0, 0.02) for matrices and zero biases, as in the authors' code; convolutions Kaiming-normal; codebooks uniform
from 0 to 1, and N(0, 1) for the layer that chooses from them.
Shapes: B batch, N samples, S frames, C width of the convolutions, D width, G codebooks, V entries of each, E width of the comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.core.errors import SettingsError
from fieldguide.models.mapping.config_rules import ConfigRow, Expect
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
    codebooks: int = 2  # G
    codes: int = 320  # V
    code_dim: int = 256  # width of a quantized vector, all codebooks together
    contrast_dim: int = 256  # E


class GumbelQuantizer(nn.Module):
    """Quantization of vectors by one entry of each codebook.

    In training the choice is drawn from a Gumbel softmax whose gradient is that of the soft choice; `temperature` is lowered while
    the network trains. Otherwise the most probable entry is chosen.
    """

    def __init__(self, width: int, codebooks: int, codes: int, dim: int):
        super().__init__()
        if dim % codebooks:
            raise SettingsError(f"code_dim={dim} must be divisible by codebooks={codebooks}.")
        self.codebooks, self.temperature = codebooks, 2.0
        self.entries = nn.Parameter(torch.empty(1, codebooks * codes, dim // codebooks))
        self.choose = nn.Linear(width, codebooks * codes)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.entries)
        nn.init.normal_(self.choose.weight)
        nn.init.zeros_(self.choose.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # B S C -> B S code_dim, B S G V
        """Return quantized vectors, and the probability of each entry (1 or 0 outside of training)."""
        logits = self.choose(x).unflatten(-1, (self.codebooks, -1))  # B S G V
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training:
            chosen = F.gumbel_softmax(logits, self.temperature, hard=True)
            probabilities = logits.softmax(-1)
        else:
            probabilities = chosen = F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        entries = self.entries[0].unflatten(0, (self.codebooks, -1)).to(chosen.dtype)  # G V code_dim/G
        return torch.einsum("bsgv,gvd->bsgd", chosen, entries).flatten(2).to(x.dtype), probabilities


class Contrast(NamedTuple):
    """What contrastive pre-training compares."""

    contexts: Tensor  # B S E: projected output of the Transformer
    targets: Tensor  # B S E: projected quantized vectors
    probabilities: Tensor  # B S G V: of the entries of the codebooks
    convolved: Tensor  # B S C: output of the convolutions before normalization


class Wav2Vec2(WaveformEncoder):
    """A recording -> the output given by `config.output_type`: also "contexts", for pre-training; see `WaveformEncoder`."""

    heads: ClassVar[tuple[str, ...]] = ("head", "projector", "quantizer", "context", "target")
    output_types: ClassVar[tuple[str, ...]] = (*OUTPUT_TYPES, "contexts")

    def add_head(self) -> None:
        super().add_head()
        c = self.config
        if c.output_type == "contexts":
            self.quantizer = GumbelQuantizer(c.stem_dims[-1], c.codebooks, c.codes, c.code_dim)
            self.context, self.target = nn.Linear(c.dim, c.contrast_dim), nn.Linear(c.code_dim, c.contrast_dim)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.config.output_type == "contexts":
            self.quantizer.reset_parameters()
            self.context.reset_parameters()
            self.target.reset_parameters()

    def contrast(self, waveform: Tensor, lengths: Tensor | None = None, hidden: Tensor | None = None) -> Contrast:
        """Return what pre-training compares, for B N samples. `hidden` (B S bool) is True for frames that the Transformer must not
        see. The quantizer sees all frames.
        """
        convolved = self.run_stem(waveform, lengths)
        x = self.stem_out(convolved)
        quantized, probabilities = self.quantizer(self.dropout(x))
        if hidden is None:
            hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        contexts = self.context(self.contextualize(x, self.make_mask(x, lengths), hidden))
        return Contrast(contexts, self.target(quantized), probabilities, convolved)

    def predict_codes(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> B S G int64
        """Return the most probable entry of each codebook for each frame."""
        logits = self.quantizer.choose(self.convolve(waveform, lengths))
        return logits.unflatten(-1, (self.config.codebooks, -1)).argmax(-1)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:  # B N, B -> output
        """Return the output given by `config.output_type`; see `fieldguide.core.card.OUTPUT_TYPES` for the shapes."""
        if self.config.output_type == "contexts":
            return torch.stack(self.contrast(waveform, lengths)[:2], 2)  # B S 2 E
        return super().forward(waveform, lengths)


def huggingface(config: Config) -> dict[str, Row]:
    """Return the weight names of transformers, for the bare encoder or with a head."""
    return name_all("wav2vec2.", config) | {
        "quantizer.codevectors": "quantizer.entries",
        "quantizer.weight_proj.*": "quantizer.choose.*",
        "project_hid.*": "context.*",
        "project_q.*": "target.*",
    }


KINDS = {"ForCTC": "ctc", "ForSequenceClassification": "label", "Model": "vector", "ForPreTraining": "contexts"}
CONFIG: dict[str, ConfigRow] = {
    **configure("Wav2Vec2", "wav2vec2", KINDS),
    "num_codevector_groups": "codebooks",
    "num_codevectors_per_group": "codes",
    "codevector_dim": "code_dim",
    "proj_codevector_dim": "contrast_dim",
    "add_adapter": Expect(False),
    "adapter_attn_dim": Expect(None),
}

LARGE: dict[str, Any] = {"dim": 1024, "depth": 24, "heads": 16, "hidden": 4096, "code_dim": 768, "contrast_dim": 768}
STABLE: dict[str, Any] = {"pre_norm": True, "stem_norm": "layer", "stem_bias": True}

CARD = Card(
    name="wav2vec2",
    model=Wav2Vec2,
    config=Config,
    paper="arXiv:2006.11477",
    year=2020,
    input_type="waveform",
    output_type=(*OUTPUT_TYPES, "contexts"),
    sizes={
        "wav2vec2-base": Size(params=94_396_320, source="facebook/wav2vec2-base-960h"),
        "wav2vec2-large": Size(**LARGE, params=315_461_792, source="facebook/wav2vec2-large-960h"),
        "wav2vec2-large-lv60": Size(**LARGE, **STABLE, params=315_471_520, source="facebook/wav2vec2-large-960h-lv60-self"),
        "wav2vec2-xls-r-1b": Size(
            **{**LARGE, **STABLE, "dim": 1280, "depth": 48, "hidden": 5120, "code_dim": 1024, "contrast_dim": 1024},
            params=962_538_400,
            source="facebook/wav2vec2-xls-r-1b",
        ),
        "wav2vec2-xls-r-2b": Size(
            **{**LARGE, **STABLE, "dim": 1920, "depth": 48, "hidden": 7680, "code_dim": 1024, "contrast_dim": 1024},
            params=2_159_321_120,
            source="facebook/wav2vec2-xls-r-2b",
        ),
        "wav2vec2-xs": Size(**SMALL, codes=64, code_dim=64),  # not in the paper; for minutes to a few hours of speech
        "wav2vec2-base-pretraining": Size(output_type="contexts", params=95_044_608, source="facebook/wav2vec2-base"),
        "wav2vec2-test": Size(
            vocab_size=7,
            num_classes=3,
            dim=8,
            depth=2,
            heads=2,
            hidden=12,
            stem_dims=(6, 6),
            stem_kernels=(4, 3),
            stem_strides=(2, 2),
            pos_kernel=4,
            pos_groups=2,
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
