"""Fitting of networks that predict from labeled rows: training rows are stored in a pretrained network, and nothing is trained.

How many rows and how many views of the table there are depends on memory and on the time until the deadline: more rows come
first, then more views, as in the authors' code up to eight. Rows that do not fit in are left out at random, which is reported; every
class keeps at least one.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fieldguide.core.errors import TrainingError
from fieldguide.core.hardware import ram

if TYPE_CHECKING:
    from fieldguide.training.solvers import Problem, Solution

MAX_VIEWS = 8
VIEWS_WITHOUT_LIMIT = 4  # of a run whose time is not limited
MIN_CONTEXT = 64
MAX_MEMORY_FRACTION = 0.125  # of the machine's memory, for what is kept of the context
MAX_CELLS = 1_000_000  # context rows times columns, whose tokens are in memory together
TRIAL_ROWS = 256
CONTEXT_TIME_FRACTION = 0.3  # of the time until the deadline, for one view
VIEWS_TIME_FRACTION = 0.6  # of it, for all views; the rest is for the test
TEST_FACTOR = 3  # rows to predict later, as a multiple of the validation rows: test, calibration and analyses
OUTLIER_STDS = 4.0
EPSILON = 1e-6
MAX_SCALED = 100.0  # standardized values are limited to it, by the network too


def fit_context(problem: Problem) -> Solution:
    """Store training rows in the network of the problem. Raises `TrainingError` if it is not pretrained."""
    from fieldguide.training.solvers import Solution

    if problem.network is None:
        raise TrainingError(
            f"{problem.card.name} predicts only with pretrained weights. Pass --weights auto, or name a checkpoint: --weights PATH."
        )
    rows, targets = stack_context(problem)
    order = order_rows(targets, problem.seed)
    if problem.fixed is None:
        count, views = choose_sizes(problem, rows, targets, order)
    else:
        views = int(problem.fixed["views"])
        count = min(len(rows), limit_rows(problem, rows.shape[1], views))
    network = store(problem, rows[order[:count]], targets[order[:count]], views)
    described = f"{views} views of the table" if views > 1 else "one view of the table"
    sampled = "" if count == len(rows) else f" of {len(rows):,}, drawn at random"
    if sampled:
        problem.log(
            f"{problem.card.name}: the context holds {count:,} training rows{sampled}, as many as fit into the time and memory"
        )
    return Solution(network, problem.score(network), f"{count:,} rows{sampled} as context, {described}", {"views": views})


def stack_context(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Return all training rows as the network joins them (N x F), and their targets."""
    from fieldguide.training.solvers import iterate_rows

    network: Any = problem.network
    batches = list(iterate_rows(problem, problem.train))
    rows = torch.cat([network.context.join(batch["numbers"], batch["categories"]) for batch in batches])
    targets = torch.cat([batch["target"] for batch in batches]).flatten()
    known = targets >= 0 if not targets.is_floating_point() else torch.isfinite(targets)
    return rows[known].numpy(), targets[known].numpy()


def order_rows(targets: np.ndarray, seed: int) -> np.ndarray:
    """Return the row numbers in random order, after one row of each class."""
    order = np.random.default_rng(seed).permutation(len(targets))
    if targets.dtype.kind != "i":
        return order
    first = np.unique(targets[order], return_index=True)[1]
    return np.concatenate([order[first], np.delete(order, first)])


def count_least_rows(network: Any) -> int:
    """Return the least number of rows of a context, in which every class has one."""
    return max(MIN_CONTEXT, network.config.num_classes)


def limit_rows(problem: Problem, columns: int, views: int) -> int:
    """Return how many rows of context the memory allows."""
    network: Any = problem.network
    kept = min(MAX_MEMORY_FRACTION * ram(), network.MAX_KEPT_BYTES) / network.estimate_kept_bytes(1, views)
    return max(count_least_rows(network), int(min(kept, MAX_CELLS / columns)))


def choose_sizes(problem: Problem, rows: np.ndarray, targets: np.ndarray, order: np.ndarray) -> tuple[int, int]:
    """Return the number of rows and of views for the time until the deadline, at the speed of a trial."""
    left = problem.deadline - time.monotonic()
    most = min(len(rows), limit_rows(problem, rows.shape[1], 1))
    if math.isinf(left):
        views = VIEWS_WITHOUT_LIMIT
        return min(most, limit_rows(problem, rows.shape[1], views)), views
    least = count_least_rows(problem.network)
    trial = order[: min(max(TRIAL_ROWS, least), most)]
    network: Any = store(problem, rows[trial], targets[trial], 1)
    batch = next(iter_batches(problem))
    started = time.monotonic()
    with torch.inference_mode():
        network(batch["numbers"], batch["categories"])
    speed = network.count_work(len(trial), len(batch["numbers"])) / max(time.monotonic() - started, 1e-6)
    seconds = lambda count: network.count_work(count, TEST_FACTOR * len(problem.validation)) / speed
    left = problem.deadline - time.monotonic()
    count = most
    while count > least and seconds(count) > CONTEXT_TIME_FRACTION * left:
        count = max(least, int(0.7 * count))
    views = max(1, min(MAX_VIEWS, int(VIEWS_TIME_FRACTION * left / max(seconds(count), 1e-6))))
    while views > 1 and count > limit_rows(problem, rows.shape[1], views):
        views -= 1
    return count, views


def iter_batches(problem: Problem) -> Any:
    """Yield batches of validation rows."""
    from fieldguide.training.solvers import iterate_rows

    return iterate_rows(problem, problem.validation)


def store(problem: Problem, rows: np.ndarray, targets: np.ndarray, views: int) -> Any:
    """Return a network with the weights of the problem's and these rows as context."""
    source: Any = problem.network
    config = replace(source.config, context=len(rows), views=views)
    network = problem.card.make(config)
    weights = {name: t for name, t in source.state_dict().items() if not name.startswith("context.")}
    network.load_state_dict({**network.state_dict(), **weights})
    context: dict[str, np.ndarray] = {"rows": rows, "target": targets, **fit_columns(rows.astype(np.float64))}
    context |= arrange_views(rows.shape[1], config.num_classes, views, problem.seed)
    for name, values in context.items():
        buffer = getattr(network.context, name)
        buffer.copy_(torch.from_numpy(np.ascontiguousarray(values)).to(buffer.dtype))
    return network.eval()


def fit_columns(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return how each column is normalized: mean, standard deviation, exponent of the power transform, limits of outliers."""
    from sklearn.preprocessing import PowerTransformer

    mean, std = x.mean(0), x.std(0)
    scaled = np.clip((x - mean) / (std + EPSILON), -MAX_SCALED, MAX_SCALED)
    transformer = PowerTransformer(method="yeo-johnson", standardize=True)
    varies = scaled.std(0) > 0
    powered, power = scaled.copy(), np.ones(x.shape[1])
    power_mean, power_std = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if varies.any():
        with np.errstate(all="ignore"):
            powered[:, varies] = transformer.fit_transform(scaled[:, varies])
        power[varies] = transformer.lambdas_
        power_mean[varies], power_std[varies] = transformer._scaler.mean_, transformer._scaler.scale_
    limits = [find_limits(values) for values in (scaled, powered)]
    return {
        "mean": mean,
        "std": std,
        "power": power,
        "power_mean": power_mean,
        "power_std": power_std,
        "low": np.stack([low for low, _ in limits]),
        "high": np.stack([high for _, high in limits]),
    }


def find_limits(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the values four standard deviations from the mean, both computed without those beyond such limits."""
    degrees = 1 if len(x) > 1 else 0
    spread = np.maximum(x.std(0, ddof=degrees), EPSILON)
    outside = np.abs(x - x.mean(0)) > OUTLIER_STDS * spread
    inside = np.where(outside, np.nan, x)
    center, spread = np.nanmean(inside, 0), np.maximum(np.nanstd(inside, 0, ddof=degrees), EPSILON)
    return center - OUTLIER_STDS * spread, center + OUTLIER_STDS * spread


def arrange_views(columns: int, classes: int, views: int, seed: int) -> dict[str, np.ndarray]:
    """Return the order of columns and the shift of class numbers of each view. Pairs of views share both.

    The orders are rows of a random Latin square: each column has each place equally often.
    """
    rng = np.random.default_rng(seed)
    shifts, places, names = (rng.permutation(columns) for _ in range(3))
    pairs = np.arange(views) // 2
    order = names[(shifts[pairs % columns, None] + places) % columns]
    order[pairs == 0] = np.arange(columns)  # the first view is the table as it is
    return {"order": order, "shift": (rng.permutation(max(classes, 1))[pairs % max(classes, 1)] * (pairs > 0)).astype(np.int64)}
