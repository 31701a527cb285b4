"""Judges of made pictures: a small CNN that this data taught, what it sees in pictures, and distances in what it sees.

These are not the scores that carry the names FID or Inception Score, for which a certain public network is needed; they
compare runs on the same data.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 32  # larger pictures are judged at this side
WIDTH = 64  # features of a picture
BATCH = 64
CHOICES = 10  # captions that one is picked from
PAIRS = 2**13  # places that pairs of neighbouring tokens share
MEANS, DISTANCES, HALVES = 1000, 60, 20  # draws for intervals
NEAREST = 3  # neighbours that span a picture's surroundings (Kynkäänniemi et al. 2019, section 3)


class Judge(nn.Module):
    """A small CNN: pictures B C S S in -1 .. 1 -> features B 64, and class logits."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width, last in ((24, channels), (48, 24), (WIDTH, 48)):
            layers += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, classes)

    def features(self, x: Tensor) -> Tensor:  # B C S S -> B 64
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B classes
        return self.head(self.features(x))


def small(x: Tensor) -> Tensor:  # N C S S -> at most 32 pixels a side
    side = min(SIDE, x.shape[-1])
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="area")


def taught(pictures: Tensor, label: Tensor | None, classes: int, *, steps: int = 400, seed: int = 0) -> Judge:
    """A judge that learnt the classes (`label`: N int64); without any, which way up pictures are (Gidaris et al. 2018,
    arXiv:1803.07728)."""
    x = small(pictures)
    with torch.random.fork_rng(), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        x = x.clone(memory_format=torch.channels_last)  # half as long again otherwise
        judge = Judge(x.shape[1], classes if label is not None else 4).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH,))
            shown, wanted = x[rows], label[rows].clone() if label is not None else torch.randint(4, (BATCH,))
            if label is None:
                shown = torch.stack([torch.rot90(p, int(k), (1, 2)) for p, k in zip(shown, wanted)])
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(judge(shown.roll(shift, (2, 3))), wanted, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


class Matcher(nn.Module):
    """Pictures and captions as vectors of length 1: a CNN that knows where things are, and the captions' tokens and pairs
    of neighbouring tokens, so that it matters what stands beside what. It was never told what a maker of pictures reads in
    a caption."""

    def __init__(self, channels: int, vocab: int):
        super().__init__()
        self.body, self.head = Judge(channels, 1).body, nn.Linear(16 * WIDTH, WIDTH)
        self.words = nn.EmbeddingBag(vocab + PAIRS, 2 * WIDTH, mode="mean", padding_idx=0)
        self.said = nn.Sequential(nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH))
        self.vocab = vocab

    def picture(self, x: Tensor) -> Tensor:  # B C S S in -1 .. 1 -> B 64
        return F.normalize(self.head(F.adaptive_avg_pool2d(self.body(x), 4).flatten(1)), dim=1)

    def caption(self, tokens: Tensor) -> Tensor:  # B T, 0 = none -> B 64
        first, second = tokens[:, :-1], tokens[:, 1:]
        pairs = self.vocab + (first * 1_000_003 + second) % PAIRS
        return F.normalize(self.said(self.words(torch.cat([tokens, torch.where(second > 0, pairs, 0)], 1))), dim=1)


def paired(pictures: Tensor, tokens: Tensor, vocab: int, *, steps: int = 400, seed: int = 0) -> Matcher:
    """A matcher that learnt which caption (`tokens` N T, 0 = none) belongs to which picture, from real pairs: each finds the
    other among those of its batch; equal captions are one (Radford et al. 2021, arXiv:2103.00020, figure 3)."""
    x, same = small(pictures), torch.unique(tokens, dim=0, return_inverse=True)[1]
    with torch.random.fork_rng(), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        x, tokens, same = x.clone(), tokens.clone(), same.clone()
        matcher = Matcher(x.shape[1], vocab)
        optimizer = torch.optim.AdamW(matcher.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(BATCH, len(x)),))
            near = 10 * matcher.picture(x[rows]) @ matcher.caption(tokens[rows]).T
            target = (same[rows][:, None] == same[rows]).float()
            target /= target.sum(1, keepdim=True)
            loss = F.cross_entropy(near, target) + F.cross_entropy(near.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return matcher.eval()


@torch.no_grad()
def picked(matcher: Matcher, pictures: Tensor, tokens: Tensor, pool: Tensor, seed: int = 0) -> np.ndarray:
    """Of each picture, whether its own caption is nearer than all of nine others drawn from a pool; as good as another is
    not enough. N bool."""
    others = torch.unique(pool, dim=0)
    near = torch.cat([matcher.picture(small(p)) for p in pictures.split(256)])
    own = (near * matcher.caption(tokens)).sum(1)
    rest = near @ matcher.caption(others).T  # N M
    rng, found = np.random.default_rng(seed), np.empty(len(own), dtype=bool)
    for row in range(len(own)):
        strange = torch.nonzero((others != tokens[row]).any(1))[:, 0].numpy()
        drawn = rng.permutation(strange)[: CHOICES - 1]
        found[row] = bool((own[row] > rest[row, drawn] + 1e-6).all())
    return found


def restored(tensors: dict[str, Tensor]) -> Judge | Matcher:
    """A judge as it was saved."""
    channels = tensors["body.0.weight"].shape[1]
    judge = (
        Matcher(channels, len(tensors["words.weight"]) - PAIRS)
        if "words.weight" in tensors
        else Judge(channels, len(tensors["head.weight"]))
    )
    judge.load_state_dict(tensors)
    return judge.eval()


@torch.no_grad()
def seen(judge: Judge, pictures: Tensor, answer: bool = False) -> np.ndarray:
    """Features of pictures, N 64; or the classes that the judge takes them for, N."""
    parts = [(judge(small(p)).argmax(1) if answer else judge.features(small(p))).numpy() for p in pictures.split(256)]
    return np.concatenate(parts)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two clouds taken for Gaussian: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017,
    arXiv:1706.08500, equation 6)."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = np.linalg.eigvals(first @ second)  # of a product of two such: real and not negative
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root)


def around_mean(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over examples, drawn with replacement (Efron 1979; percentile method)."""
    rows = np.random.default_rng(seed).integers(0, len(values), (MEANS, len(values)))
    low, high = np.percentile(values[rows].mean(1), (2.5, 97.5))
    return float(low), float(high)


def around_distance(real: np.ndarray, made: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a Fréchet distance; of each example a row of numbers, or several (N D, or N F D). Examples are drawn
    with replacement, on either side. What is drawn twice makes clouds narrower and the distance larger, so it is the spread
    of the draws that counts, around the distance itself."""
    flat, rng = (lambda x: x.reshape(-1, x.shape[-1])), np.random.default_rng(seed)
    drawn = [frechet(*(flat(x[rng.integers(0, len(x), len(x))]) for x in (real, made))) for _ in range(DISTANCES)]
    middle, wide = frechet(flat(real), flat(made)), 1.96 * float(np.std(drawn, ddof=1))
    return max(0.0, middle - wide), middle + wide


def around_precision_recall(real: np.ndarray, made: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """95 % intervals, from how scores of halves differ (the jackknife that leaves out half: Shao and Wu 1989): drawing with
    repeats would put copies into every neighbourhood."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(HALVES):
        drawn.append(precision_recall(*(x[rng.permutation(len(x))[: max(len(x) // 2, 1)]] for x in (real, made))))
    return [
        (max(0.0, whole - wide), min(1.0, whole + wide))
        for whole, wide in zip(precision_recall(real, made), 1.96 * np.std(drawn, 0))
    ]


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Shares of made pictures that lie in the surroundings of real ones, and of real ones in those of made ones
    (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2)."""
    return inside(made, real), inside(real, made)


def inside(points: np.ndarray, cloud: np.ndarray) -> float:
    """Share of points no farther from some point of a cloud than that point's third neighbour is."""
    own = np.sort(distances(cloud, cloud), 1)[:, min(NEAREST, len(cloud) - 1)]
    return float((distances(points, cloud) <= own[None]).any(1).mean())


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean, N M."""
    return torch.cdist(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).numpy()
