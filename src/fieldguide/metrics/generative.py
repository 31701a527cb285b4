"""Metrics of generated images: distances in the features of a small CNN that is trained on the same data.

These are not FID or Inception Score, which require a specific public network; they compare runs on the same data.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SIDE_PIXELS = 32  # larger images are downscaled to this side
FEATURE_DIM = 64  # features per image
BATCH_SIZE = 64
TRAINING_STEPS = 400  # of the networks here
TIMED_STEPS = 4
CAPTION_CHOICES = 10  # captions among which the right one must be ranked first
TOKEN_PAIR_BUCKETS = 2**13  # hash buckets of pairs of adjacent tokens
MEAN_RESAMPLES, DISTANCE_RESAMPLES, HALF_SPLITS = 1000, 60, 20  # resamples for intervals
FEW_RESAMPLES = 20  # for distances between many features
DENSITY_NEIGHBORS = 5  # k of density and coverage (Naeem et al. 2020, section 4.3)
NEAREST_NEIGHBORS = 3  # k of the nearest-neighbor radius (Kynkäänniemi et al. 2019, section 3)


class FeatureClassifier(nn.Module):
    """A small CNN: images B C S S in -1 .. 1 -> features B 64, and class logits."""

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


def downscale(x: Tensor) -> Tensor:  # N C S S -> N C s s
    """Downscale images to at most `MAX_SIDE_PIXELS`."""
    side = min(MAX_SIDE_PIXELS, x.shape[-1])
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="area")


def train_classifier(
    images: Tensor, label: Tensor | None, classes: int | Sequence[int], *, steps: int = TRAINING_STEPS, seed: int = 0
) -> FeatureClassifier:
    """Train a feature classifier on the classes (`label`: N int64), or without labels on predicting the rotation of images
    (Gidaris et al. 2018, arXiv:1803.07728). With A numbers of classes, `label` N A holds the class of each of A attributes, and the
    logits of the attributes follow each other."""
    x, groups = downscale(images), [classes] if isinstance(classes, int) else list(classes)
    with torch.random.fork_rng(), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        x = x.clone(memory_format=torch.channels_last)  # 1.5 times as fast
        groups = groups if label is not None else [4]
        classifier = FeatureClassifier(x.shape[1], sum(groups))
        classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH_SIZE,))
            shown, target = x[rows], label[rows].clone() if label is not None else torch.randint(4, (BATCH_SIZE,))
            if label is None:
                shown = torch.stack([torch.rot90(p, int(k), (1, 2)) for p, k in zip(shown, target)])
            shift = torch.randint(-1, 2, (2,)).tolist()
            logits = classifier(shown.roll(shift, (2, 3))).split(groups, 1)
            parts = zip(logits, target.view(len(rows), -1).unbind(1))
            loss = torch.stack([F.cross_entropy(*part, label_smoothing=0.05) for part in parts]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def measure_step_seconds(channels: int, side: int) -> float:
    """Return the seconds of a training step of a feature classifier of images, C S S."""
    images, label = torch.zeros(BATCH_SIZE, channels, side, side), torch.zeros(BATCH_SIZE, dtype=torch.int64)
    train_classifier(images, label, 2, steps=TIMED_STEPS)  # the first steps take longer
    started = time.perf_counter()
    train_classifier(images, label, 2, steps=TIMED_STEPS)
    return (time.perf_counter() - started) / TIMED_STEPS


class CaptionMatcher(nn.Module):
    """Normalized embeddings of images and captions for matching.

    Images are embedded by a CNN with position-dependent features, captions by a bag of tokens and of pairs of adjacent
    tokens, so that word order matters. It is independent of the text encoder of the image generator.
    """

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


def train_caption_matcher(
    images: Tensor, tokens: Tensor, vocab: int, *, steps: int = TRAINING_STEPS, seed: int = 0
) -> CaptionMatcher:
    """Train a caption matcher on real pairs of images and captions (`tokens` N T, 0 = padding).

    The loss is the contrastive loss of Radford et al. 2021, arXiv:2103.00020, figure 3, with equal captions as one.
    """
    x, same = downscale(images), torch.unique(tokens, dim=0, return_inverse=True)[1]
    with torch.random.fork_rng(), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(seed)
        x, tokens, same = x.clone(), tokens.clone(), same.clone()
        matcher = CaptionMatcher(x.shape[1], vocab)
        optimizer = torch.optim.AdamW(matcher.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(BATCH_SIZE, len(x)),))
            logits = 10 * matcher.embed_images(x[rows]) @ matcher.embed_captions(tokens[rows]).T
            target = (same[rows][:, None] == same[rows]).float()
            target /= target.sum(1, keepdim=True)
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return matcher.eval()


@torch.no_grad()
def match_captions(matcher: CaptionMatcher, images: Tensor, tokens: Tensor, pool: Tensor, seed: int = 0) -> np.ndarray:
    """Return for each image whether its own caption scores strictly higher than nine others sampled from a pool: N bool."""
    others = torch.unique(pool, dim=0)
    embedded = torch.cat([matcher.embed_images(downscale(p)) for p in images.split(256)])
    own = (embedded * matcher.embed_captions(tokens)).sum(1)
    rest = embedded @ matcher.embed_captions(others).T  # N M
    rng, found = np.random.default_rng(seed), np.empty(len(own), dtype=bool)
    for row in range(len(own)):
        candidates = torch.nonzero((others != tokens[row]).any(1))[:, 0].numpy()
        sampled = rng.permutation(candidates)[: CAPTION_CHOICES - 1]
        found[row] = bool((own[row] > rest[row, sampled] + 1e-6).all())
    return found


def load_state(tensors: dict[str, Tensor]) -> FeatureClassifier | CaptionMatcher:
    """Restore a feature classifier or caption matcher from its state dict."""
    channels = tensors["body.0.weight"].shape[1]
    model = (
        CaptionMatcher(channels, len(tensors["words.weight"]) - TOKEN_PAIR_BUCKETS)
        if "words.weight" in tensors
        else FeatureClassifier(channels, len(tensors["head.weight"]))
    )
    model.load_state_dict(tensors)
    return model.eval()


@torch.no_grad()
def extract_features(classifier: FeatureClassifier, images: Tensor, return_classes: bool = False) -> np.ndarray:
    """Return the features of images, N 64, or with `return_classes` the predicted classes, N."""
    parts = [
        (classifier(downscale(p)).argmax(1) if return_classes else classifier.features(downscale(p))).numpy()
        for p in images.split(256)
    ]
    return np.concatenate(parts)


@torch.no_grad()
def classify_attributes(classifier: FeatureClassifier, images: Tensor, classes: Sequence[int]) -> np.ndarray:
    """Return the predicted class of each attribute of images, N A, for a classifier of attributes with these numbers of classes."""
    parts = [
        torch.stack([logits.argmax(1) for logits in classifier(downscale(p)).split(list(classes), 1)], 1)
        for p in images.split(256)
    ]
    return torch.cat(parts).numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Fréchet distance of two samples modeled as Gaussian: |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al.
    2017, arXiv:1706.08500, equation 6)."""
    x, y = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (a, b))  # A = x^T x, B = y^T y
    if a.shape[1] <= min(len(a), len(b)):
        values = np.linalg.eigvals((x.T @ x) @ (y.T @ y))  # of a product of covariances: real and nonnegative
        root = np.sqrt(np.maximum(values.real, 0)).sum()
    else:  # A B has the nonzero eigenvalues of (x y^T) (x y^T)^T, which is smaller
        root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * root)


def bootstrap_mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a mean over examples (Efron 1979; percentile method)."""
    rows = np.random.default_rng(seed).integers(0, len(values), (MEAN_RESAMPLES, len(values)))
    low, high = np.percentile(values[rows].mean(1), (2.5, 97.5))
    return float(low), float(high)


def bootstrap_distance_interval(
    real: np.ndarray, made: np.ndarray, seed: int = 0, resamples: int = DISTANCE_RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % interval of a Fréchet distance between samples of N examples, with one or F rows each (N D or N F D).

    Examples of both sides are resampled with replacement. Resampling biases the distance upward, so only the standard
    deviation of the resamples is used, around the distance itself.
    """
    flat, rng = (lambda x: x.reshape(-1, x.shape[-1])), np.random.default_rng(seed)
    resampled = [frechet_distance(*(flat(x[rng.integers(0, len(x), len(x))]) for x in (real, made))) for _ in range(resamples)]
    middle, wide = frechet_distance(flat(real), flat(made)), 1.96 * float(np.std(resampled, ddof=1))
    return max(0.0, middle - wide), middle + wide


def compute_cloud_scores(real: np.ndarray, made: np.ndarray) -> dict[str, float]:  # N D, M D
    """Return the scores that compare generated with real images one by one: kernel_distance, precision, recall, density, coverage."""
    precision, recall = precision_recall(real, made)
    density, coverage = density_coverage(real, made)
    return {
        "kernel_distance": kernel_distance(real, made),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }


def jackknife_cloud_intervals(real: np.ndarray, made: np.ndarray, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of `compute_cloud_scores` by the delete-half jackknife (Shao and Wu 1989).

    The bootstrap is unsuitable, because duplicates would be their own nearest neighbors.
    """
    rng, resampled = np.random.default_rng(seed), []
    for _ in range(HALF_SPLITS):
        halves = (x[rng.permutation(len(x))[: max(len(x) // 2, 1)]] for x in (real, made))
        resampled.append(list(compute_cloud_scores(*halves).values()))
    widths = 1.96 * np.std(resampled, 0)
    whole = compute_cloud_scores(real, made)
    most = {"kernel_distance": np.inf, "density": np.inf}
    return {
        name: (max(0.0, value - wide), float(min(most.get(name, 1.0), value + wide)))
        for (name, value), wide in zip(whole.items(), widths)
    }


def kernel_distance(real: np.ndarray, made: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3 (Bińkowski et al. 2018, arXiv:1801.01401,
    section 4 and equation 4): KID, in other features. It has no bias from the number of images, and may be slightly negative."""
    kernel = lambda a, b: (a.astype(np.float64) @ b.T.astype(np.float64) / a.shape[1] + 1) ** 3
    n, m = len(real), len(made)
    if n < 2 or m < 2:
        return float("nan")
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(real, real), kernel(made, made))]
    return float(own[0] + own[1] - 2 * kernel(real, made).mean())


def density_coverage(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Return density, how many neighborhoods of real images hold a generated one, relative to `DENSITY_NEIGHBORS`, and coverage, the
    fraction of real images whose neighborhood holds one (Naeem et al. 2020, arXiv:2002.09797, equations 3 and 4).

    Unlike precision and recall, both are robust to single outliers among the real and the generated images.
    """
    k = min(DENSITY_NEIGHBORS, len(real) - 1)
    radius = np.sort(pairwise_distances(real, real), 1)[:, k]
    inside = pairwise_distances(made, real) <= radius[None]  # M N
    return float(inside.sum(1).mean() / max(k, 1)), float(inside.any(0).mean())


def precision_recall(real: np.ndarray, made: np.ndarray) -> tuple[float, float]:
    """Return the fraction of generated images within the manifold of real ones (precision), and vice versa (recall)
    (Kynkäänniemi et al. 2019, arXiv:1904.06991, equations 1 and 2)."""
    return fraction_inside(made, real), fraction_inside(real, made)


def fraction_inside(points: np.ndarray, cloud: np.ndarray) -> float:
    """Return the fraction of points that lie within the nearest-neighbor radius of any point of `cloud`."""
    own = np.sort(pairwise_distances(cloud, cloud), 1)[:, min(NEAREST_NEIGHBORS, len(cloud) - 1)]
    return float((pairwise_distances(points, cloud) <= own[None]).any(1).mean())


def pairwise_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the Euclidean distances, N M."""
    return torch.cdist(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).numpy()
