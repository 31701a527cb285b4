"""Training text classifiers: ours against the same networks of torch.nn in a plain PyTorch loop.

    python benchmarks/text_training.py [--steps 4] [--rounds 5] [--save]

Rows of 32 to 64 random tokens, batches of 32, padded to the longest. "like for like": float32, clipped, fused AdamW,
the same sizes and dropout. The plain LSTM packs its rows and the plain encoder masks them, so that all ignore padding.
"defaults": ours as `fit` chooses precision by timing, against plain AdamW without clipping in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from common import compute_ratio, make_parser, parse_options, report, time_in_turns
from loops import run_ours, run_plain
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fieldguide import create
from fieldguide.data.loader import Batches

VOCAB, CLASSES, BATCH, ROWS = 8000, 4, 32, 256
INPUTS = ("tokens", "mask")


class PlainLSTM(nn.Module):
    """The sizes of lstm-s."""

    def __init__(self, dim: int = 128, hidden: int = 256, dropout: float = 0.3):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(VOCAB, dim), nn.Dropout(dropout)
        self.rnn = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.dropout(self.embed(tokens)), mask.sum(1), True, enforce_sorted=False)
        _, (last, _) = self.rnn(packed)
        return self.head(self.dropout(torch.cat([last[0], last[1]], 1)))


class PlainEncoder(nn.Module):
    """The sizes of transformer-encoder-s."""

    def __init__(self, dim: int = 128, depth: int = 2, heads: int = 4, dropout: float = 0.1):
        super().__init__()
        self.embed, self.dropout = nn.Embedding(VOCAB, dim), nn.Dropout(dropout)
        self.pos = nn.Parameter(torch.zeros(512, dim), requires_grad=False)
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.dropout(self.embed(tokens) + self.pos[: tokens.shape[1]])
        x = self.encoder(x, src_key_padding_mask=~mask)
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_options(parser)
    rng = np.random.default_rng(0)
    lengths = rng.integers(32, 65, ROWS)  # with 32 rows a batch, all batches are nearly 64 wide
    tokens = torch.from_numpy(rng.integers(1, VOCAB, (ROWS, 64)))
    labels = torch.from_numpy(rng.integers(0, CLASSES, ROWS))

    def make(rows: np.ndarray, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        index, length = torch.from_numpy(rows), torch.from_numpy(lengths[rows])
        mask = torch.arange(int(length.max())) < length[:, None]
        return {"tokens": tokens[index, : mask.shape[1]] * mask, "mask": mask, "target": labels[index]}

    fixed = [make(np.arange(i, i + BATCH)) for i in range(0, ROWS, BATCH)]

    batches, rows = Batches(ROWS, make), []
    read = options.steps * float(np.mean([int(b["mask"].sum()) for b in fixed]))
    for name, peer in (("lstm-s", PlainLSTM), ("transformer-encoder-s", PlainEncoder)):
        new = lambda name=name: create(name, vocab_size=VOCAB, num_classes=CLASSES)
        runs = {
            "ours, float32": run_ours(new(), INPUTS, batches, BATCH, precision="float32"),
            "plain, float32": run_plain(peer(), INPUTS, fixed, lr=1e-3, fused=True, clip=1.0),
            "ours, defaults": run_ours(new(), INPUTS, batches, BATCH),
            "plain, defaults": run_plain(peer(), INPUTS, fixed, lr=1e-3),
        }
        times = time_in_turns({key: lambda run=run: run(options.steps) for key, run in runs.items()}, options.rounds)
        for what in ("float32", "defaults"):
            us, them = f"ours, {what}", f"plain, {what}"
            best, low, high = compute_ratio(times, us, them)
            speed = [read / min(times[key]) for key in (us, them)]
            rows.append(
                [
                    name,
                    "like for like" if what == "float32" else "defaults",
                    *(f"{s:,.0f}" for s in speed),
                    f"{best:.2f}",
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    report(
        "Training text classifiers, batch 32, 32 to 64 tokens a row",
        ["", "", "ours, tokens/s", "torch.nn, tokens/s", "ratio", "rounds"],
        rows,
        options.save,
    )


if __name__ == "__main__":
    main()
