"""Fitting without gradient descent: linear models, boosted trees and contexts (see `fieldguide.core.card.SOLVERS`).

Whatever the fit chooses, such as the strength of a penalty, is chosen by the score on the validation rows.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fieldguide.core.card import Card
from fieldguide.core.errors import TrainingError
from fieldguide.data.loader import Batches, iterate_in_order
from fieldguide.training.in_context import fit_context
from fieldguide.training.patch_memory import fit_memory
from fieldguide.training.trees import read_lightgbm

BATCH = 256  # rows whose features are computed at a time
MAX_VALUES = 100_000_000  # features times rows of a dense linear fit; more rows are left out at random
# Inverse strengths of the penalty. If time is short, only the first ones are tried.
PENALTIES = (1.0, 10.0, 1e-1, 100.0, 1e-2, 1000.0, 1e-3)
MANY_CLASSES = 50  # above, an iteration of a logistic regression takes long, and scores hardly change after 30 (docs/log.md)
MAX_ITERATIONS, MAX_ITERATIONS_OF_MANY = 200, 40
TIMED_ITERATIONS = 20
MAX_WORSE = 2  # penalties in a row without improvement after which no more are tried
DECAYS = (1.0, 0.9, 0.7, 0.4)  # factors of older items of a history
UNSEEN_LOGIT = -20.0  # bias of a class that the fitted rows lack
TREE_SETTINGS: tuple[dict[str, Any], ...] = (
    {"learning_rate": 0.1, "num_leaves": 31},
    {"learning_rate": 0.05, "num_leaves": 15, "feature_fraction": 0.6},
    {"learning_rate": 0.05, "num_leaves": 63, "feature_fraction": 0.6, "min_data_in_leaf": 40},
)
READING_FRACTION, MIN_ROWS = 0.6, 2000  # of the time until the deadline, for reading the rows of a linear fit; rows at least
MIN_VALUES_FOR_THREADS = 200_000  # of a table; for fewer, threads of LightGBM wait for each other more than they work
MAX_ROUNDS, PATIENCE = 3000, 50  # trees per class; rounds without improvement after which growing stops


@dataclass(frozen=True)
class Problem:
    """What a solver needs. `score(network)` is the validation score, higher is better; `deadline` is in `time.monotonic`.

    `score_outputs` does the same for raw outputs on the validation rows, without computing them from their inputs.
    """

    card: Card
    config: Any
    train: Batches  # with the tensor "target"
    validation: Batches
    score: Callable[[nn.Module], float]
    deadline: float = math.inf
    seed: int = 0
    network: nn.Module | None = None  # with pretrained weights, for a card that needs them
    score_outputs: Callable[[Tensor], float] | None = None
    fixed: Mapping[str, Any] | None = None  # `Solution.parameters` to use instead of choosing, with all rows for training
    log: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Solution:
    """A fitted network, its validation score, and what was chosen, in words."""

    network: Any
    score: float
    chosen: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # the same for `Problem.fixed`


def solve(problem: Problem) -> Solution:
    """Fit the network of a card. Raises `TrainingError` if the fit gives no finite score."""
    solution = SOLVERS[problem.card.solver](problem)
    if not math.isfinite(solution.score):
        raise TrainingError(f"{problem.card.name}: the validation score is not finite, so nothing was fitted.")
    return solution


def iterate_rows(problem: Problem, batches: Batches, most: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield batches of all rows, or of at most `most` that are drawn at random."""
    rows = None
    if most is not None and most < len(batches):
        rows = np.sort(np.random.default_rng(problem.seed).permutation(len(batches))[:most])
    for _, batch in iterate_in_order(batches, BATCH, rows):
        yield batch


def keep_best(
    problem: Problem,
    candidates: Iterator[tuple[str, nn.Module, Mapping[str, Any]]],
    max_worse: int = MAX_WORSE,
    score: Callable[[Any], float] | None = None,
) -> tuple[Solution, dict[str, Tensor]]:
    """Return the best of several fits of networks, and its weights.

    Stops after `max_worse` fits in a row that are worse than the best, and at the deadline. `score` replaces that of the problem.
    """
    best, weights, worse = None, {}, 0
    for chosen, network, parameters in candidates:
        value = (score or problem.score)(network)
        if best is None or (math.isfinite(value) and (value > best.score or not math.isfinite(best.score))):
            best, worse = Solution(network, value, chosen, parameters), 0
            weights = {name: t.clone() for name, t in network.state_dict().items()}
        else:
            worse += 1
        if worse >= max_worse or time.monotonic() > problem.deadline:
            break
    assert best is not None, "there is always a first candidate"
    return best, weights


def fit_nothing(problem: Problem) -> Solution:
    """Return a model that has no weights to fit."""
    network = problem.card.make(problem.config)
    network.eval()
    return Solution(network, problem.score(network), "nothing is fitted")


# ------------------------------------------------------------------------------------------------- linear


def fit_linear(problem: Problem) -> Solution:
    """Fit `head` on the features of the training rows, with the penalty that scores best on the validation rows."""
    names = problem.card.inputs
    allowed = len(problem.train) if problem.fixed is not None else count_rows_in_time(problem)
    network = build_network(problem, allowed)
    network.eval()
    with torch.inference_mode():
        first = next(iterate_rows(problem, problem.train))
        is_sparse = network.encode(*(first[name] for name in names)).is_sparse
    most = min(allowed, len(problem.train) if is_sparse else MAX_VALUES // network.head.in_features)
    if most < len(problem.train):
        problem.log(f"{problem.card.name}: fitted on {most:,} of {len(problem.train):,} training rows, drawn at random")
    x, y = collect_features(network, iterate_rows(problem, problem.train, most), names)
    penalties = PENALTIES if problem.fixed is None else (problem.fixed["penalty"],)
    candidates = (
        (chosen, network, {"penalty": c}) for chosen, c in iterate_heads(network.head, x, y, penalties, problem.deadline)
    )
    score = None
    if (score_outputs := problem.score_outputs) is not None:
        held = collect_in_row_order(network, problem.validation, names)
        score = lambda network: score_outputs(apply_head(network.head, held))
    best, weights = keep_best(problem, candidates, score=score)
    network.load_state_dict(weights)
    return best


def apply_head(head: nn.Linear, features: Any) -> Tensor:
    """Return the outputs of a linear layer for features, a matrix or a sparse one."""
    weight, bias = head.weight.detach().cpu().numpy(), head.bias.detach().cpu().numpy()
    return torch.from_numpy(np.asarray(features @ weight.T + bias, dtype=np.float32))


@torch.inference_mode()
def count_rows_in_time(problem: Problem) -> int:
    """Return how many training rows can be read in a part of the time, from reading some of them; all without a deadline."""
    total, started = len(problem.train), time.monotonic()
    if math.isinf(problem.deadline):
        return total
    batch = next(iterate_rows(problem, problem.train, BATCH))
    network = build_network(problem, BATCH)
    network.encode(*(batch[name] for name in problem.card.inputs))
    now = time.monotonic()
    # Rows of a network that is built from data are read twice, and so are some of them here.
    seconds = (now - started) / (2 if hasattr(problem.card.model, "from_inputs") else 1)
    passes = 2 if hasattr(problem.card.model, "from_inputs") else 1
    rows = READING_FRACTION * (problem.deadline - now) / max(passes * seconds, 1e-9) * min(BATCH, total)
    return total if rows >= total else int(max(rows, min(MIN_ROWS, total)))


def iterate_heads(
    head: nn.Linear, x: Any, y: np.ndarray, penalties: Sequence[float] = PENALTIES, deadline: float = math.inf
) -> Iterator[tuple[str, float]]:
    """Fit a linear layer to features and targets with one penalty after the other, and yield it in words and as a number.

    Dense features are standardized for that; sparse ones are not, since they would no longer be sparse.
    """
    mean: Any = 0.0
    std: Any = 1.0
    if isinstance(x, np.ndarray):
        mean, std = x.mean(0), x.std(0)
        std = np.where(std < 1e-6, 1.0, std)  # constant features stay 0
        x = (x - mean) / std
    fits = fit_logistic(x, y, head.out_features, penalties, deadline) if y.dtype.kind == "i" else fit_ridge(x, y, penalties)
    for chosen, penalty, weight, bias in fits:
        set_head(head, weight / std, bias - (weight / std) @ np.broadcast_to(mean, weight.shape[1:]))
        yield chosen, penalty


def build_network(problem: Problem, most: int) -> Any:
    """Return a new network; one whose features depend on the data is built from at most `most` training rows."""
    model: Any = problem.card.model
    if hasattr(model, "from_inputs"):
        names = problem.card.inputs
        return model.from_inputs(
            problem.config, (tuple(batch[name] for name in names) for batch in iterate_rows(problem, problem.train, most))
        )
    return problem.card.make(problem.config)


@torch.inference_mode()
def collect_features(network: Any, batches: Iterator[dict[str, Tensor]], names: Sequence[str]) -> tuple[Any, np.ndarray]:
    """Return the features, a matrix or a sparse one, and the targets of all rows."""
    from scipy import sparse

    parts, targets = [], []
    for batch in batches:
        features = network.encode(*(batch[name] for name in names))
        if features.is_sparse:
            features = features.coalesce()
            row, column = features.indices().numpy()
            features = sparse.csr_matrix((features.values().numpy(), (row, column)), shape=tuple(features.shape))
        else:
            features = features.float().numpy()
        parts.append(features)
        targets.append(batch["target"].numpy())
    joined = sparse.vstack(parts, format="csr") if sparse.issparse(parts[0]) else np.concatenate(parts)
    return joined, np.concatenate(targets)


Fit = tuple[str, float, np.ndarray, np.ndarray]  # words, inverse strength of the penalty, weights classes x F, bias


def collect_in_row_order(network: Any, batches: Batches, names: Sequence[str]) -> Any:
    """Return the features of all rows in their order; batches are made in the order of length."""
    places: list[np.ndarray] = []

    def visit() -> Iterator[dict[str, Tensor]]:
        for rows, batch in iterate_in_order(batches, BATCH):
            places.append(rows)
            yield batch

    features, _ = collect_features(network, visit(), names)
    return features[np.argsort(np.concatenate(places))]


def fit_logistic(x: Any, y: np.ndarray, classes: int, penalties: Sequence[float], deadline: float = math.inf) -> Iterator[Fit]:
    """Yield multinomial logistic regressions, one for each penalty, with as many iterations as end before the deadline."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = np.unique(y)
    if len(present) == 1:
        bias = np.where(np.arange(classes) == present[0], 0.0, UNSEEN_LOGIT)
        yield "one class", penalties[0], np.zeros((classes, x.shape[1])), bias
        return
    most = MAX_ITERATIONS if len(present) <= MANY_CLASSES else MAX_ITERATIONS_OF_MANY
    model = LogisticRegression(warm_start=True)
    for c in penalties:
        model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fit_in_time(model, x, y, most, deadline)
        weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, UNSEEN_LOGIT)
        if len(present) == 2:  # one row of weights, for the second class
            weight[present[1]], bias[present] = model.coef_[0], (0.0, model.intercept_[0])
        else:
            weight[present], bias[present] = model.coef_, model.intercept_
        yield f"logistic regression with C={c:g}", c, weight, bias


def fit_in_time(model: Any, x: Any, y: np.ndarray, most: int, deadline: float) -> None:
    """Fit a model with `warm_start` by at most this many iterations: a few are timed, and others follow if there is time."""
    if math.isinf(deadline):
        model.set_params(max_iter=most).fit(x, y)
        return
    first, started = min(most, TIMED_ITERATIONS), time.monotonic()
    model.set_params(max_iter=first).fit(x, y)
    seconds = (time.monotonic() - started) / first
    more = min(most - first, int((deadline - time.monotonic()) / max(seconds, 1e-9)))
    if max(model.n_iter_) >= first and more > 0:
        model.set_params(max_iter=more).fit(x, y)


def fit_ridge(x: Any, y: np.ndarray, penalties: Sequence[float]) -> Iterator[Fit]:
    """Yield ridge regressions, one for each penalty."""
    from sklearn.linear_model import Ridge

    for c in penalties:
        model = Ridge(alpha=1 / c).fit(x, y)
        yield f"ridge regression with alpha={1 / c:g}", c, np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)


@torch.no_grad()
def set_head(head: nn.Linear, weight: np.ndarray, bias: np.ndarray) -> None:
    """Copy weights and bias into a linear layer."""
    head.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    head.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))


# -------------------------------------------------------------------------------------------------- trees


def fit_trees(problem: Problem) -> Solution:
    """Grow boosted trees with several settings, as far as time allows, and keep those that score best on validation rows."""
    x, y = stack_rows(problem, problem.train)
    x_validation, y_validation = stack_rows(problem, problem.validation)
    known = y_validation >= 0 if y.dtype.kind == "i" else np.ones(len(y_validation), dtype=bool)
    data, held = (x, y), (x_validation[known], y_validation[known])

    def candidates() -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
        started = time.monotonic()
        for number, settings in enumerate(TREE_SETTINGS if problem.fixed is None else (problem.fixed["settings"],)):
            if number and 2 * (time.monotonic() - started) / number > problem.deadline - time.monotonic():
                return
            network, rounds = grow(problem, settings, data, held)
            words = ", ".join(f"{key}={value}" for key, value in settings.items())
            yield f"{rounds:,} rounds with {words}", network, {"settings": settings, "rounds": rounds}

    return keep_best(problem, candidates(), max_worse=len(TREE_SETTINGS))[0]


def stack_rows(problem: Problem, batches: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers and categories of all rows side by side, and the targets."""
    rows = list(iterate_rows(problem, batches))
    features = [torch.cat([b["numbers"], b["categories"].float()], 1) for b in rows]
    return torch.cat(features).numpy(), torch.cat([b["target"] for b in rows]).flatten().numpy()


def grow(
    problem: Problem,
    settings: dict[str, Any],
    train: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
) -> tuple[nn.Module, int]:
    """Return a network with trees grown by LightGBM, and the number of rounds. Growing stops early, or at the deadline.

    With `problem.fixed`, the number of rounds is given.
    """
    import lightgbm

    config = problem.config
    classes, is_classification = config.num_classes, train[1].dtype.kind == "i"
    objective = {"objective": "regression"}
    if is_classification:
        objective = {"objective": "multiclass", "num_class": classes} if classes > 2 else {"objective": "binary"}
    params = {
        "verbosity": -1,
        "seed": problem.seed,
        "deterministic": True,
        "force_row_wise": True,
        "num_threads": torch.get_num_threads() if train[0].size > MIN_VALUES_FOR_THREADS else 1,
        "use_missing": False,
        "min_data_in_leaf": min(20, max(1, len(train[0]) // 20)),
        **objective,
        **settings,
    }

    def stop_at_deadline(env: Any) -> None:
        if time.monotonic() > problem.deadline and env.iteration > 0:
            raise lightgbm.callback.EarlyStopException(env.iteration, env.evaluation_result_list)

    categorical = list(range(config.numbers, config.numbers + len(config.categories)))
    data = lightgbm.Dataset(*train, categorical_feature=categorical, params=params)
    callbacks: list[Any] = [lightgbm.early_stopping(PATIENCE, verbose=False), stop_at_deadline]
    if problem.fixed is not None:
        booster = lightgbm.train(params, data, problem.fixed["rounds"])
        dump = booster.dump_model()
    else:
        validation = lightgbm.Dataset(*held, reference=data)
        booster = lightgbm.train(params, data, MAX_ROUNDS, valid_sets=[validation], callbacks=callbacks)
        dump = booster.dump_model(num_iteration=booster.best_iteration)
    trees = [read_lightgbm(tree["tree_structure"]) for tree in dump["tree_info"]]
    each = dump["num_tree_per_iteration"]
    # LightGBM has one score for two classes, that of the second one.
    tree_classes = [1 if is_classification and classes == 2 else number % each for number in range(len(trees))]
    fitted = replace(
        config,
        trees=max(1, len(trees)),
        nodes=max((len(nodes) for nodes, _ in trees), default=1),
        depth=max((depth for _, depth in trees), default=0),
        category_splits=sum("categories" in node for nodes, _ in trees for node in nodes),
    )
    network: Any = problem.card.make(fitted)
    network.set_trees([nodes for nodes, _ in trees], tree_classes, [0.0] * classes)
    return network, len(trees) // each


# ---------------------------------------------------------------------------------------------- neighbors


def fit_neighbors(problem: Problem) -> Solution:
    """Store for each item those with the most similar users, with the decay that scores best on the validation rows."""
    met = count_items(problem)
    similar = compare_columns(met)
    decays = DECAYS if problem.fixed is None else (problem.fixed["decay"],)

    def candidates() -> Iterator[tuple[str, nn.Module, Mapping[str, Any]]]:
        for decay in decays:
            network: Any = problem.card.make(replace(problem.config, decay=decay))
            network.eval()
            network.set_neighbors(*find_neighbors(similar, network.weight.shape[1]))
            yield f"decay {decay:g}", network, {"decay": decay}

    return keep_best(problem, candidates(), max_worse=1)[0]


def count_items(problem: Problem) -> Any:
    """Return the sparse matrix of histories and items: 1 where an item occurs."""
    from scipy import sparse

    rows, columns, count = [], [], 0
    for batch in iterate_rows(problem, problem.train):
        items = batch["seen"]
        row, step = items.nonzero(as_tuple=True)
        rows.append(row.numpy() + count)
        columns.append(items[row, step].numpy())
        count += len(items)
    places = np.concatenate(rows), np.concatenate(columns)
    met = sparse.csr_matrix((np.ones(len(places[0]), np.float32), places), shape=(count, problem.config.items))
    met.data[:] = 1  # an item that occurs twice counts once
    return met


def compare_columns(met: Any) -> Any:
    """Return the cosine of each pair of columns of a sparse matrix of zeros and ones, without the diagonal."""
    from scipy import sparse

    scale = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(met.sum(0)).ravel(), 1)))
    similar = (scale @ (met.T @ met) @ scale).tocsr()
    return (similar - sparse.diags(similar.diagonal())).tocsr()


def find_neighbors(similar: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns and values of the `width` largest entries of each row of a sparse matrix, padded with 0."""
    index = np.zeros((similar.shape[0], width), np.int64)
    value = np.zeros((similar.shape[0], width), np.float32)
    for row in range(similar.shape[0]):
        part = slice(similar.indptr[row], similar.indptr[row + 1])
        order = np.argsort(-similar.data[part], kind="stable")[:width]
        index[row, : len(order)], value[row, : len(order)] = similar.indices[part][order], similar.data[part][order]
    return index, value


SOLVERS: Mapping[str, Callable[[Problem], Solution]] = {
    "linear": fit_linear,
    "trees": fit_trees,
    "none": fit_nothing,
    "context": fit_context,
    "memory": fit_memory,
    "neighbors": fit_neighbors,
}
