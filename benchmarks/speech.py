"""Conformer: a training step and an answer, ours against the same network in plain torch layers.

The peer has our sizes (that of conformer-s: 16 blocks of width 144) and is what one writes from the paper in an
afternoon: torch's own LayerNorm, Linear, Conv1d and BatchNorm1d, relative scores by explicit products, a mask for
padding in attention alone. Recordings of 6 to 8 seconds are given as spectrograms, 80 bands, 100 frames a second.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from common import Pair, Run, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, repeat_batches, run_inference, run_ours, run_plain_steps
from torch import Tensor, nn

from fieldguide import create
from fieldguide.objectives.ctc import CTC

VOCAB, BANDS, LONGEST, BATCH = 32, 80, 800, 8


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, dropout: float):
        super().__init__(
            nn.LayerNorm(dim),
            nn.Linear(dim, 4 * dim),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * dim, dim),
            nn.Dropout(dropout),
        )


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.norm, self.dropout = heads, nn.LayerNorm(dim), nn.Dropout(dropout)
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.pos = nn.Linear(dim, dim, bias=False)
        self.u, self.w = (nn.Parameter(torch.zeros(heads, dim // heads)) for _ in range(2))

    def forward(self, x: Tensor, places: Tensor, padding: Tensor) -> Tensor:  # B S D, 2S-1 D, B S -> B S D
        x = self.norm(x)
        rows, steps, dim = x.shape
        q, k, v = (f(x).view(rows, steps, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        r = self.pos(places).view(2 * steps - 1, self.heads, -1).transpose(0, 1)
        content = (q + self.u[:, None]) @ k.transpose(-1, -2)
        position = (q + self.w[:, None]) @ r.transpose(-1, -2)
        position = F.pad(position, (1, 0)).view(rows, self.heads, 2 * steps, steps)[:, :, 1:].view_as(position)[..., :steps]
        scores = (content + position) / (dim // self.heads) ** 0.5
        y = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(-1) @ v
        return self.dropout(self.out(y.transpose(1, 2).reshape(rows, steps, dim)))


class Convolution(nn.Module):
    def __init__(self, dim: int, kernel: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(
            nn.Conv1d(dim, 2 * dim, 1, bias=False),
            nn.GLU(1),
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim, bias=False),
            nn.BatchNorm1d(dim),
            nn.SiLU(),
            nn.Conv1d(dim, dim, 1, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(x).transpose(1, 2)).transpose(1, 2)


class Plain(nn.Module):
    """The sizes of conformer-s."""

    def __init__(self, dim: int = 144, depth: int = 16, heads: int = 4, kernel: int = 31, dropout: float = 0.1):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, dim, 3, 2, 1), nn.Conv2d(dim, dim, 3, 2, 1)
        self.proj, self.dropout = nn.Linear(dim * BANDS // 4, dim), nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    FeedForward(dim, dropout),
                    Attention(dim, heads, dropout),
                    Convolution(dim, kernel, dropout),
                    FeedForward(dim, dropout),
                    nn.LayerNorm(dim),
                ]
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(dim, VOCAB)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(features[:, None]))))
        x = self.dropout(self.proj(x.transpose(1, 2).flatten(2)))
        steps, dim = x.shape[1:]
        padding = torch.arange(steps) >= ((lengths + 3) // 4)[:, None]
        angle = torch.arange(steps - 1, -steps, -1.0)[:, None] * 10_000 ** -(torch.arange(0, dim, 2) / dim)
        places = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        for first, attention, convolution, second, norm in self.blocks:
            x = x + first(x) / 2
            x = x + attention(x, places, padding)
            x = x + convolution(x)
            x = norm(x + second(x) / 2)
        return self.head(x)


def make_batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy(rng.integers(3 * LONGEST // 4, LONGEST + 1, rows))
    lengths[0] = LONGEST
    features = torch.from_numpy(rng.standard_normal((rows, LONGEST, BANDS)).astype(np.float32))
    target = torch.from_numpy(rng.integers(1, VOCAB, (rows, 60)))
    return {
        "features": features * (torch.arange(LONGEST) < lengths[:, None])[..., None],
        "lengths": lengths,
        "target": target,
        "target_lengths": torch.full((rows,), 60),
    }


def train() -> Run:
    model = create("conformer-s", vocab_size=VOCAB)
    return run_ours(model, (), repeat_batches(make_batch(BATCH)), 1, CTC(model), precision="float32", **LIKE)


def peer() -> Run:
    model = Plain()

    def loss(b: dict[str, Tensor]) -> Tensor:
        logits = model(b["features"], b["lengths"]).log_softmax(-1)
        return F.ctc_loss(logits.transpose(0, 1), b["target"], (b["lengths"] + 3) // 4, b["target_lengths"], zero_infinity=True)

    return run_plain_steps(model, loss, [make_batch(BATCH)], fused=True, **LIKE)


def answer(model: nn.Module) -> Run:
    batch = make_batch(BATCH)
    return run_inference(model, lambda: model(batch["features"], batch["lengths"]))


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2))
    torch.manual_seed(0)
    seconds = float(make_batch(BATCH)["lengths"].sum()) / 100
    compare(
        f"Conformer-CTC, float32, batch {BATCH}, 6 to 8 s a recording",
        "seconds of speech",
        "plain torch",
        [
            Pair("training, like for like", train, peer, seconds),
            Pair("answer", lambda: answer(create("conformer-s", vocab_size=VOCAB)), lambda: answer(Plain()), seconds),
        ],
        options,
        lambda: (
            f"{describe_sizes(create('conformer-s', vocab_size=VOCAB), Plain())} Ours also ignores padding in convolutions and statistics."
        ),
    )


if __name__ == "__main__":
    main()
