"""Models that are fitted without gradient descent: equal to LightGBM and scikit-learn, and the best of the penalties."""

from __future__ import annotations

import dataclasses
import math
import time

import lightgbm
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from fieldguide.data.loader import Batches
from fieldguide.models import registry
from fieldguide.models.feedforward.bag_of_ngrams import BagOfNgrams, Config
from fieldguide.training import solvers, trees

ROWS, TRAIN = 900, 600
CARDINALITIES = (9, 40)


def make_table(classes: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(ROWS, 4)).astype(np.float32)
    categories = np.stack([rng.integers(0, size, ROWS) for size in CARDINALITIES], 1)
    signal = numbers[:, 0] * numbers[:, 1] + np.isin(categories[:, 0], [1, 3, 5]) + 0.1 * (categories[:, 1] % 7)
    target = signal[:, None].astype(np.float32)
    if classes > 1:
        target = np.digitize(signal, np.quantile(signal, np.arange(1, classes) / classes))
    return {name: torch.from_numpy(x) for name, x in (("numbers", numbers), ("categories", categories), ("target", target))}


def make_batches(tensors: dict[str, torch.Tensor], rows: slice) -> Batches:
    part = {name: t[rows] for name, t in tensors.items()}
    return Batches(len(part["target"]), lambda index, generator: {name: t[index] for name, t in part.items()})


def make_problem(name: str, tensors: dict[str, torch.Tensor], **config: object) -> solvers.Problem:
    card = registry.card(name)
    train, validation = make_batches(tensors, slice(0, TRAIN)), make_batches(tensors, slice(TRAIN, ROWS))
    held = validation.make(np.arange(len(validation)), None)

    def score(network: torch.nn.Module) -> float:
        with torch.no_grad():
            output = network(*(held[name] for name in card.inputs))
        if output.shape[1] == 1:
            return -float((output - held["target"]).square().mean())
        return -float(torch.nn.functional.cross_entropy(output, held["target"]))

    return solvers.Problem(card, card.resolve_config(None, **config), train, validation, score)


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_trees_predict_what_lightgbm_predicts(classes, monkeypatch):
    boosters = []
    train = lightgbm.train
    monkeypatch.setattr(lightgbm, "train", lambda *args, **kwargs: boosters.append(train(*args, **kwargs)) or boosters[-1])
    monkeypatch.setattr(solvers, "TREE_SETTINGS", solvers.TREE_SETTINGS[:1])
    tensors = make_table(classes)
    problem = make_problem("gradient-boosting", tensors, numbers=4, categories=CARDINALITIES, num_classes=classes)
    solution = solvers.solve(problem)
    x = torch.cat([tensors["numbers"], tensors["categories"].float()], 1).numpy()
    expected = boosters[0].predict(x, num_iteration=boosters[0].best_iteration)
    with torch.no_grad():
        logits = solution.network(tensors["numbers"], tensors["categories"])
    ours = logits[:, 0] if classes == 1 else logits.softmax(1) if classes > 2 else logits.softmax(1)[:, 1]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert solution.network.config.category_splits > 0 and "rounds" in solution.chosen
    held = make_problem("linear", tensors, numbers=4, categories=CARDINALITIES, num_classes=classes)
    assert solution.score > solvers.solve(held).score + 0.02  # the product of two numbers is not linear


def test_thresholds_are_rounded_down_to_float32():
    for value in (0.1, 1 / 3, -0.7, 1e-35, 16777217.0):
        rounded = trees.round_down(value)
        assert rounded <= value < float(np.nextafter(np.float32(rounded), np.float32(np.inf)))


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("cardinalities", [CARDINALITIES, (9, 1100)], ids=["dense", "sparse"])
def test_linear_models_equal_scikit_learn(classes, cardinalities, monkeypatch):
    """With the penalty that was chosen; that no other penalty scores better is compared, too."""
    monkeypatch.setattr(solvers, "PENALTIES", (1e-3, 1e-2, 1e-1, 1.0))
    tensors = make_table(classes)
    problem = make_problem("linear", tensors, numbers=4, categories=cardinalities, num_classes=classes)
    solution = solvers.solve(problem)
    one_hot = [torch.nn.functional.one_hot(c, size) for c, size in zip(tensors["categories"].T, cardinalities)]
    x = torch.cat([tensors["numbers"], *one_hot], 1).double().numpy()
    if sum(cardinalities) + 4 <= 1000:  # dense features are standardized
        mean, std = x[:TRAIN].mean(0), x[:TRAIN].std(0)
        x = (x - mean) / np.where(std < 1e-6, 1, std)
    y = tensors["target"].numpy()
    value = float(solution.chosen.split("=")[1])
    with torch.no_grad():
        ours = solution.network(tensors["numbers"], tensors["categories"])[TRAIN:]
    if classes == 1:
        expected = Ridge(alpha=value).fit(x[:TRAIN], y[:TRAIN, 0]).predict(x[TRAIN:])
        np.testing.assert_allclose(ours[:, 0].numpy(), expected, rtol=1e-3, atol=1e-3)
        return
    scores = {}
    for c in solvers.PENALTIES:
        p = LogisticRegression(C=c, max_iter=1000, tol=1e-7).fit(x[:TRAIN], y[:TRAIN]).predict_proba(x[TRAIN:])
        scores[c] = np.log(p[np.arange(len(p)), y[TRAIN:]]).mean()
        if c == value:
            np.testing.assert_allclose(ours.softmax(1).numpy(), p, atol=5e-3)
    assert solution.score == pytest.approx(max(scores.values()), abs=2e-3)


def test_fewer_iterations_suffice_for_many_classes():
    """The rule of `MANY_CLASSES`, on texts of 60 classes that share most of their words."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 60, 1200)
    x = np.zeros((1200, 300), np.float32)
    for row, label in enumerate(y):
        x[row, [*rng.integers(0, 300, 4), *(label * 5 + rng.integers(0, 5, 3))]] = 1
    accuracy = []
    for many in (50, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(solvers, "MANY_CLASSES", many)
            ((_, _, weight, bias),) = solvers.fit_logistic(x[:900], y[:900], 60, (1.0,))
        accuracy.append(((x[900:] @ weight.T + bias).argmax(1) == y[900:]).mean())
    assert 0.3 < accuracy[1] < accuracy[0] + 0.02


def test_logistic_regression_ends_at_the_deadline(monkeypatch):
    monkeypatch.setattr(solvers, "TIMED_ITERATIONS", 2)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 30))
    y = (x[:, :5] @ rng.normal(size=(5, 4)) + rng.gumbel(size=(400, 4))).argmax(1)

    def fit(deadline: float) -> np.ndarray:
        ((_, _, weight, bias),) = solvers.fit_logistic(x, y, 4, (10.0,), deadline)
        logits = x @ weight.T + bias
        return np.exp(logits - np.logaddexp.reduce(logits, 1)[:, None])

    free, slow, over = fit(math.inf), fit(time.monotonic() + 60), fit(time.monotonic())
    np.testing.assert_allclose(slow, free, atol=5e-3)
    assert 1e-3 < abs(over - free).max() < 0.5  # stopped after the iterations that are timed, but fitted


def test_bag_of_ngrams_equals_tf_idf_of_scikit_learn():
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 12, rng.integers(1, 15)).tolist() for _ in range(40)]
    longest = max(map(len, texts))
    tokens = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[True] * len(text) + [False] * (longest - len(text)) for text in texts])
    model = BagOfNgrams.from_inputs(Config(vocab_size=12), [(tokens[:25], mask[:25]), (tokens[25:], mask[25:])])
    reference = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\d+", analyzer="word")
    words = [" ".join(map(str, text)) for text in texts]
    counts = (reference.fit_transform(words) > 0).sum(0).A1
    names = reference.get_feature_names_out()
    kept = [i for i, name in enumerate(names) if " " not in name or counts[i] > 1]  # pairs must occur in two texts
    reference.set_params(vocabulary=[names[i] for i in kept])
    expected = reference.fit_transform(words).toarray()
    key = lambda name: sum((int(t) + 1) * 13**i for i, t in enumerate(reversed(name.split())))
    order = [model.keys.tolist().index(key(names[i])) for i in kept]
    assert len(kept) == len(model.keys)
    np.testing.assert_allclose(model.encode(tokens, mask).to_dense().numpy()[:, order], expected, atol=1e-6)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        np.testing.assert_allclose(model(tokens, mask), model.head(model.encode(tokens, mask).to_dense()), atol=1e-5)


def test_a_class_without_training_rows_is_never_predicted():
    tensors = make_table(3)
    tensors["target"][:TRAIN][tensors["target"][:TRAIN] == 2] = 0
    problem = make_problem("linear", tensors, numbers=4, categories=CARDINALITIES, num_classes=3)
    with torch.no_grad():
        p = solvers.solve(problem).network(tensors["numbers"], tensors["categories"]).softmax(1)
    assert (p[:, 2] < 1e-4).all()


def test_hostile_trees_and_sizes_are_rejected(tmp_path):
    import fieldguide
    from fieldguide.core.errors import SettingsError

    sizes = {"numbers": 3, "categories": (3, 5), "num_classes": 2, "trees": 2, "nodes": 3, "depth": 1, "category_splits": 1}
    network = fieldguide.create("gradient-boosting", **sizes)
    for name, value in (("feature", 5), ("child_nodes", 6), ("tree_class", 2), ("split", 1), ("feature", -1)):
        state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        state[name].view(-1)[0] = value
        with pytest.raises(SettingsError, match=f"{name} of the trees holds a number outside"):
            fieldguide.create("gradient-boosting", **sizes).load_state_dict(state)
    network.load_state_dict(network.state_dict())
    with pytest.raises(SettingsError, match="depth=1000000000"):
        fieldguide.create("gradient-boosting", **(sizes | {"depth": 10**9}))
    for changes in (
        {"horizon": 10**9},
        {"values": 10**9},
        {"quantiles": (0.0,)},
        {"quantiles": (float("nan"),)},
        {"length": 0},
    ):
        with pytest.raises(SettingsError):
            fieldguide.create("exponential-smoothing", **changes)


def test_rows_are_left_out_if_reading_them_takes_too_long():
    """Reading 256 rows takes .8 s, and 4.8 of 8 s are for reading."""
    problem = make_problem("linear", make_table(2), numbers=4, categories=CARDINALITIES, num_classes=2)
    make = problem.train.make

    def make_slowly(index, generator):
        time.sleep(0.8)
        return make(index % len(problem.train), generator)

    slow = dataclasses.replace(problem, train=Batches(100_000, make_slowly), deadline=time.monotonic() + 8)
    assert solvers.count_rows_in_time(slow) == solvers.MIN_ROWS
    assert solvers.count_rows_in_time(problem) == len(problem.train)
    fast = dataclasses.replace(problem, deadline=time.monotonic() + 100)
    assert solvers.count_rows_in_time(fast) == len(problem.train)


def test_outputs_are_scored_without_reading_the_rows_again():
    """Each row is read once, and the same penalty is chosen as with a network that reads them again for each score."""
    problem = make_problem("linear", make_table(3), numbers=4, categories=CARDINALITIES, num_classes=3)
    held, read = problem.validation.make(np.arange(len(problem.validation)), None)["target"], []

    def count(index, generator):
        read.extend(index)
        return problem.validation.make(index, generator)

    lengths = np.random.default_rng(0).permutation(len(problem.validation))  # batches are made in the order of length
    counted = dataclasses.replace(
        problem,
        validation=Batches(len(problem.validation), count, lengths),
        score_outputs=lambda outputs: -float(torch.nn.functional.cross_entropy(outputs, held)),
    )
    one, other = solvers.solve(problem), solvers.solve(counted)
    assert sorted(read) == list(range(len(problem.validation)))
    assert one.chosen == other.chosen and one.score == pytest.approx(other.score, abs=1e-5)


def test_neighbors_are_those_of_the_most_similar_users():
    """Counted from histories, by the definition of the cosine; the decay with the best score is kept."""
    rng = np.random.default_rng(0)
    histories = torch.from_numpy(rng.integers(1, 12, (80, 6)))
    card, batches = registry.card("item-neighbors"), Batches(80, lambda index, generator: {"seen": histories[index]})
    config = card.resolve_config(None, items=12, neighbors=4)
    score = lambda network: -abs(network.config.decay - 0.9)
    solution = solvers.solve(solvers.Problem(card, config, batches, batches, score))
    users = [{i for i, h in enumerate(histories.tolist()) if item in h} for item in range(12)]
    for item in range(1, 12):
        cosine = [len(users[item] & u) / max(len(users[item]) * len(u), 1) ** 0.5 for u in users]
        best = sorted((value, other) for other, value in enumerate(cosine) if other != item)[-4:]
        found = dict(zip(solution.network.index[item].tolist(), solution.network.weight[item].tolist()))
        assert sorted(found.values()) == pytest.approx([value for value, _ in best], abs=1e-6)
        assert all(found[other] == pytest.approx(cosine[other], abs=1e-6) for other in found)
    assert solution.network.config.decay == 0.9 and solution.chosen == "decay 0.9"
