"""Judges of made pictures: a small CNN that this data taught, what it sees in pictures, and distances in what it sees.

These are not the scores that carry the names FID or Inception Score, for which a certain public network is needed; they
compare runs on the same data.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SIDE_PIXELS = 32  # larger pictures are judged at this side
FEATURE_DIM = 64  # features of a picture
BATCH_SIZE = 64
CAPTION_CHOICES = 10  # captions that one is picked from
TOKEN_PAIR_BUCKETS = 2**13  # places that pairs of neighbouring tokens share
MEAN_RESAMPLES, DISTANCE_RESAMPLES, HALF_SPLITS = 1000, 60, 20  # draws for intervals
NEAREST_NEIGHBORS = 3  # neighbours that span a picture's surroundings (Kynkäänniemi et al. 2019, section 3)


class FeatureClassifier(nn.Module):
    """A small CNN: pictures B C S S in -1 .. 1 -> features B 64, and class logits."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width, last in ((24, channels), (48, 24), (FEATURE_DIM, 48)):
            layers += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(FEATURE_DIM, classes)

    def features(self, x: Tensor) -> Tensor:  # B C S S -> B 64
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:  # B C S S -> B classes
        return self.head(self.features(x))


def downscale(x: Tensor) -> Tensor:  # N C S S -> at most 32 pixels a side
    side = min(MAX_SIDE_PIXELS, x.shape[-1])
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="area")


def train_classifier(pictures: Tensor, label: Tensor | None, classes: int, *, steps: int = 400, seed: int = 0) -> FeatureClassifier:
    """A judge that learnt the classes (`label`: N int64); without any, which way up pictures are (Gidaris et al. 2018,
    arXiv:1803.07728)."""
    x = downscale(pictures)
    with torch.random.fork_rng(), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        x = x.clone(memory_format=torch.channels_last)  # half as long again otherwise
        judge = FeatureClassifier(x.shape[1], classes if label is not None else 4).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH_SIZE,))
            shown, wanted = x[rows], label[rows].clone() if label is not None else torch.randint(4, (BATCH_SIZE,))
            if label is None:
                shown = torch.stack([torch.rot90(p, int(k), (1, 2)) for p, k in zip(shown, wanted)])
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(judge(shown.roll(shift, (2, 3))), wanted, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return judge.eval()


class CaptionMatcher(nn.Module):
    """Pictures and captions as vectors of length 1: a CNN that knows where things are, and the captions' tokens and pairs
    of neighbouring tokens, so that it matters what stands beside what. It was never told what a maker of pictures reads in
    a caption."""

    def __init__(self, channels: int, vocab: int):
        super().__init__()
        self.body, self.head = FeatureClassifier(channels, 1).body, nn.Linear(16 * FEATURE_DIM, FEATURE_DIM)
        self.words = nn.EmbeddingBag(vocab + TOKEN_PAIR_BUCKETS, 2 * FEATURE_DIM, mode="mean", padding_idx=0)
        self.said = nn.Sequential(nn.LayerNorm(2 * FEATURE_DIM), nn.Linear(2 * FEATURE_DIM, FEATURE_DIM))
        self.vocab = vocab

    def embed_images(self, x: Tensor) -> Tensor:  # B C S S in -1 .. 1 -> B 64
        return F.normalize(self.head(F.adaptive_avg_pool2d(self.body(x), 4).flatten(1)), dim=1)

    def embed_captions(self, tokens: Tensor) -> Tensor:  # B T, 0 = none -> B 64
        first, second = tokens[:, :-1], tokens[:, 1:]
        pairs = self.vocab + (first * 1_000_003 + second) % TOKEN_PAIR_BUCKETS
        return F.normalize(self.said(self.words(torch.cat([tokens, torch.where(second > 0, pairs, 0)], 1))), dim=1)


def train_caption_matcher(pictures: Tensor, tokens: Tensor, vocab: int, *, steps: int = 400, seed: int = 0) -> CaptionMatcher:
    """A matcher that learnt which caption (`tokens` N T, 0 = none) belongs to which picture, from real pairs: each finds the
    other among those of its batch; equal captions are one (Radford et al. 2021, arXiv:2103.00020, figure 3)."""
    x, same = downscale(pictures), torch.unique(tokens, dim=0, return_inverse=True)[1]
    with torch.random.fork_rng(), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        x, tokens, same = x.clone(), tokens.clone(), same.clone()
        matcher = CaptionMatcher(x.shape[1], vocab)
        optimizer = torch.optim.AdamW(matcher.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(BATCH_SIZE, len(x)),))
            near = 10 * matcher.embed_images(x[rows]) @ matcher.embed_captions(tokens[rows]).T
            target = (same[rows][:, None] == same[rows]).float()
            target /= target.sum(1, keepdim=True)
            loss = F.cross_entropy(near, target) + F.cross_entropy(near.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return matcher.eval()


@torch.no_grad()
def match_captions(matcher: CaptionMatcher, pictures: Tensor, tokens: Tensor, pool: Tensor, seed: int = 0) -> np.ndarray:
    """Of each picture, whether its own caption is nearer than all of nine others drawn from a pool; as good as another is
    not enough. N bool."""
    others = torch.unique(pool, dim=0)
    near = torch.cat([matcher.embed_images(downscale(p)) for p in pictures.split(256)])
    own = (near * matcher.embed_captions(tokens)).sum(1)
    rest = near @ matcher.embed_captions(others).T  # N M
    rng, found = np.random.default_rng(seed), np.empty(len(own), dtype=bool)
    for row in range(len(own)):
        strange = torch.nonzero((others != tokens[row]).any(1))[:, 0].numpy()
        drawn = rng.permutation(strange)[: CAPTION_CHOICES - 1]
        found[row] = bool((own[row] > rest[row, drawn] + 1e-6).all())
    return found


def load_state(tensors: dict[str, Tensor]) -> FeatureClassifier | CaptionMatcher:
    """A judge as it was saved."""
    channels = tensors["body.0.weight"].shape[1]
    judge = (
        CaptionMatcher(channels, len(tensors["words.weight"]) - TOKEN_PAIR_BUCKETS)
        if "words.weight" in tensors
        else FeatureClassifier(channels, len(tensors["head.weight"]))
    )
    judge.load_state_dict(tensors)
    return judge.eval()


@torch.no_grad()
def extract_features(judge: FeatureClassifier, pictures: Tensor, answer: bool = False) -> np.ndarray:
    """Features of pictures, N 64; or the classes that the judge takes them for, N."""
    parts = [(judge(downscale(p)).argmax(1) if answer else judge.features(downscale(p))).numpy() for p in pictures.split(256)]
    return np.concatenate(parts)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two clouds taken for Gaussian: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al. 2017,
    arXiv:1706.08500, equation 6)."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values = np.linalg.eigvals(first @ second)  # of a product of two such: real and not negative
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * root)


def bootstrap_mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean over examples, drawn with replacement (Efron 1979; percentile method)."""
    rows = np.random.default_rng(seed).integers(0, len(values), (MEAN_RESAMPLES, len(values)))
    low, high = np.percentile(values[rows].mean(1), (2.5, 97.5))
    return float(low), float(high)


def bootstrap_distance_interval(real: np.ndarray, made: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a Fréchet distance; of each example a row of numbers, or several (N D, or N F D). Examples are drawn
    with replacement, on either side. What is drawn twice makes clouds narrower and the distance larger, so it is the spread
    of the draws that counts, around the distance itself."""
    flat, rng = (lambda x: x.reshape(-1, x.shape[-1])), np.random.default_rng(seed)
    drawn = [frechet_distance(*(flat(x[rng.integers(0, len(x), len(x))]) for x in (real, made))) for _ in range(DISTANCE_RESAMPLES)]
    middle, wide = frechet_distance(flat(real), flat(made)), 1.96 * float(np.std(drawn, ddof=1))
    return max(0.0, middle - wide), middle + wide


def jackknife_precision_recall_intervals(real: np.ndarray, made: np.ndarray, seed: int = 0) -> list[tuple[float, float]]:
    """95 % intervals, from how scores of halves differ (the jackknife that leaves out half: Shao and Wu 1989): drawing with
    repeats would put copies into every neighbourhood."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(HALF_SPLITS):
        drawn.append(precision_recall(*(x[rng.permutation(len(x))[: max(len(x) // 2, 1)]] for x in (real, made))))
    return [
        (max(0.0, whole - wide), min(1.0, whole + wide))
        for whole, wide in zip(precision_recall(real, made), 1.96 * np.std(drawn, 0))
    ]


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Shares of made pictures that lie in the surroundings of real ones, and of real ones in those of made ones
    (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2)."""
    return fraction_inside(made, real), fraction_inside(real, made)


def fraction_inside(points: np.ndarray, cloud: np.ndarray) -> float:
    """Share of points no farther from some point of a cloud than that point's third neighbour is."""
    own = np.sort(pairwise_distances(cloud, cloud), 1)[:, min(NEAREST_NEIGHBORS, len(cloud) - 1)]
    return float((pairwise_distances(points, cloud) <= own[None]).any(1).mean())


def pairwise_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean, N M."""
    return torch.cdist(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).numpy()
