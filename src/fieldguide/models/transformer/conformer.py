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
from fieldguide.core.errors import DataError
from fieldguide.models.layers.padding import ensure_nonempty
from fieldguide.models.layers.symbol_head import SymbolHead
from fieldguide.models.transformer._shared.conformer_blocks import ConformerBlock, name_blocks, relative_positions


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
        self.stem = Subsampling(c.features, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            ConformerBlock(c.dim, c.heads, c.growth * c.dim, c.kernel, c.dropout) for _ in range(c.depth)
        )
        self.head = SymbolHead(c.dim, c.vocab_size)

    def frames(self, lengths: Tensor) -> Tensor:
        """Return the number of output frames for this number of input frames; integers or tensors."""
        return (lengths + self.stride - 1) // self.stride

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:  # B T F, B -> B S vocab
        if features.shape[-1] != self.config.features:
            raise DataError(
                f"The frames have {features.shape[-1]} features, but the model expects features={self.config.features}."
            )
        x = self.dropout(self.stem(features, lengths))
        mask = None
        if lengths is not None:
            mask = ensure_nonempty(torch.arange(x.shape[1], device=x.device) < self.frames(lengths)[:, None])
        places = relative_positions(x)
        for block in self.blocks:
            x = block(x, places, mask)
        return self.head(x)


# Blocks and head of Wav2Vec2ConformerForCTC with relative positions, which reads waveforms
HUGGINGFACE_LAYERS = {**name_blocks("wav2vec2_conformer.encoder.layers.{i}."), "lm_head.*": "head.*"}

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
