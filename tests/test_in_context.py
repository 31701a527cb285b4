"""Networks that predict from labeled rows: the authors' files, the normalization of columns, stored contexts, and runs made of them."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tabicl._model.tabicl import TabICL
from tabicl._sklearn.preprocessing import PreprocessingPipeline
from torch.utils.flop_counter import FlopCounterMode

import fieldguide
from cases import CASES, TABICL_1
from fieldguide.automl import baselines, pretrained
from fieldguide.automl.fit import fit, resume
from fieldguide.checkpoints import load, weights
from fieldguide.checkpoints.public import PublicCheckpoint, list_public_checkpoints
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.data.preprocessing.table import to_standard
from fieldguide.models.registry import create
from fieldguide.models.transformer._shared.table_context import build_tree, split_digits
from fieldguide.training import in_context
from hub_server import Hub
from test_tuning import Says

TINY = {
    "embed_dim": 16,
    "col_num_blocks": 1,
    "col_nhead": 2,
    "col_num_inds": 4,
    "row_num_blocks": 1,
    "row_nhead": 2,
    "row_num_cls": 2,
    "row_rope_base": 100000,
    "icl_num_blocks": 2,
    "icl_nhead": 2,
    "ff_factor": 2,
}
VERSION_2 = {
    "col_affine": False,
    "col_feature_group": "same",
    "col_feature_group_size": 3,
    "col_target_aware": True,
    "col_ssmax": "qassmax-mlp-elementwise",
    "icl_ssmax": "qassmax-mlp-elementwise",
    "row_rope_interleaved": False,
}
KINDS = {
    "tabicl": {"max_classes": 10, **TABICL_1, "row_rope_interleaved": True, "bias_free_ln": False},
    "tabicl-v2": {"max_classes": 10, **VERSION_2, "bias_free_ln": False},
    "tabicl-v2-regressor": {"max_classes": 0, "num_quantiles": 999, **VERSION_2, "bias_free_ln": True},
}
FAST = {"batch": 32, "precision": "float32", "steps": 1}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build_package(kind: str, **more) -> tuple[TabICL, dict]:
    config = {**TINY, **KINDS[kind], **more}
    torch.manual_seed(0)
    network = TabICL(**config, zero_init=False)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return network.eval(), config


def write(kind: str, path: Path, **more) -> Path:
    """Write a checkpoint as the authors do: configuration and tensors in one file."""
    network, config = build_package(kind, **more)
    torch.save({"config": config, "state_dict": network.state_dict()}, path)
    return path


def make_table(path: Path, rows: int = 90, classes: int = 3, target: str = "label", seed: int = 0) -> Path:
    """Write a table with numbers, a category, missing values and a class or a number as target."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 2)) * [1, 1000] + [0, 5000]
    label = np.arange(rows) % classes
    kind = rng.choice(["red", "green", "blue"], rows)
    value = [f"class{y}" for y in label] if target == "label" else [f"{v:.4f}" for v in 3 * x[:, 0] + (kind == "red")]
    lines = [
        f"{a:.4f},{'' if i % 11 == 3 else f'{b:.1f}'},{c},{v}"
        for i, (a, b, c, v) in enumerate(zip(x[:, 0], x[:, 1], kind, value))
    ]
    path.write_text("\n".join([f"a,b,color,{target}", *lines]) + "\n")
    return path


# ------------------------------------------------------------------------------------------------ the authors' files


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_equal_the_package(kind):
    size = "tabicl-v1" if kind == "tabicl" else kind
    heads = {"col_nhead": 4, "icl_nhead": 4} if kind == "tabicl" else {}
    with torch.device("meta"):
        ours, theirs = create(size), TabICL(**KINDS[kind], **heads)
    frequencies = theirs.row_interactor.tf_row.rope.freqs.numel()  # constants, which are parameters there
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - frequencies


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_recognized_and_names_map_both_ways(kind, tmp_path):
    path = write(kind, tmp_path / "model.ckpt")
    found = load.inspect_checkpoint(path)
    assert found.card.name == kind.removesuffix("-regressor") and found.origin == "tabicl"
    assert found.values["max_classes"] == KINDS[kind]["max_classes"] and found.values["heads"] == 2
    ours = fieldguide.load(path)
    state = build_package(kind)[0].state_dict()
    load.save(ours, tmp_path / "again.safetensors", format="tabicl")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_published_shapes_are_recognized_without_a_configuration(tmp_path):
    for size in ("tabicl-v1", "tabicl-v2", "tabicl-v2-regressor"):
        weights.save(create(size), tmp_path / "model.safetensors", "tabicl")
        assert load.inspect_checkpoint(tmp_path / "model.safetensors").size == size


@pytest.mark.parametrize(
    "change, text", [({"norm_first": False}, "norm_first=False"), ({"activation": "relu"}, "activation='relu'")]
)
def test_other_networks_are_rejected(change, text, tmp_path):
    with pytest.raises(WeightsError, match=f"differs from tabicl-v2:\n *{text}"):
        load.inspect_checkpoint(write("tabicl-v2", tmp_path / "model.ckpt", **change))


def test_numbers_equal_the_package(tmp_path):
    """The mean of the quantiles, as in the package."""
    found = load.inspect_checkpoint(write("tabicl-v2-regressor", tmp_path / "model.ckpt"))
    theirs = build_package("tabicl-v2-regressor")[0]
    source = load.build_network(found.card, found.values, found.state, found.origin, "here")
    ours = create("tabicl-v2", **{**found.values, "numbers": 4, "context": 12}).eval()
    ours.load_state_dict(source.state_dict(), strict=False)
    rows, y, x = torch.randn(12, 4), torch.randn(12), torch.randn(5, 4)
    ours.context.rows.copy_(rows)
    ours.context.target.copy_(y)
    with torch.no_grad():
        quantiles = theirs.train()(torch.cat([rows, x])[None] / (1 + 1e-6), y[None])[0, -5:]  # without its batching
        expected = theirs.quantile_dist(quantiles).quantiles.mean(-1)
        got = ours(x, torch.zeros(5, 0, dtype=torch.int64))[:, 0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, most, nodes", [("tabicl-test", 10, 3), ("tabicl-v2-test", 10, 3), ("tabicl-v2-test", 3, 10)])
def test_many_classes_equal_the_package(size, most, nodes, monkeypatch):
    """Groups of classes in two and three levels, and the digits of class numbers in the columns: outputs and gradients."""
    torch.manual_seed(0)
    ours = create(size, num_classes=13, max_classes=most, context=40, categories=()).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours.context.shift.copy_(torch.tensor([0, 6]))
    assert len(ours.context.list_nodes()) == nodes
    theirs, rename = CASES[size.removesuffix("-test")].peer(ours)
    theirs.double().load_state_dict(rename(ours.state_dict()))
    inputs = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 0, dtype=torch.int64)
    monkeypatch.setattr(torch, "zeros", functools.partial(torch.zeros, dtype=torch.float64))  # the package adds up in float32
    got, wanted = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9)
    for outputs in (got, wanted):
        outputs.square().mean().backward()
    grads = rename({name: p.grad for name, p in ours.named_parameters()})
    known = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in grads.items():
        if known.get(name) is not None:
            torch.testing.assert_close(grad, known[name], rtol=1e-7, atol=1e-9)


def test_trees_of_classes():
    """Groups as in the package: as few as possible, of about the same size; each class is a group of one leaf."""
    for classes, most in ((2, 10), (10, 10), (11, 10), (25, 10), (101, 10), (1000, 10), (13, 3), (40, 2)):
        nodes = build_tree(0, classes, most)
        assert all(2 <= len(node) <= most + 1 for node in nodes if node[-1] - node[0] > 1)
        leaves = [node for node in nodes if node[-1] - node[0] == len(node) - 1]
        assert [edge for leaf in leaves for edge in leaf[:-1]] == list(range(classes))
    assert build_tree(0, 25, 10)[0] == (0, 9, 17, 25) and [len(node) - 1 for node in build_tree(0, 101, 10)[:4]] == [
        10,
        2,
        6,
        5,
    ]


def test_digits_of_classes_are_those_of_the_package():
    embedding = build_package("tabicl-v2")[0].col_embedder
    for classes in (3, 10, 11, 25, 100, 101, 1000, 1001):
        y = torch.arange(classes)
        bases = embedding._compute_mixed_radix_bases(classes)
        wanted = [embedding._extract_mixed_radix_digit(y, place, bases) for place in range(len(bases))]
        assert torch.equal(torch.stack(split_digits(y, classes, 10)), torch.stack(wanted))


# ------------------------------------------------------------------------------------------------ columns


def test_columns_are_normalized_as_by_the_authors():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(3, 5, 200), rng.lognormal(0, 2, 200), np.repeat([0.0, 1], 100), -rng.exponential(9, 200)], 1)
    x[7, 0] = 500.0  # an outlier
    other = np.concatenate([x[:20] * 1.5 - 1, [[1e4, 1e5, 7, -1e4]]])
    network = create("tabicl-v2-test", numbers=4, categories=(), context=200, views=2).double()
    for name, values in in_context.fit_columns(x).items():
        getattr(network.context, name).copy_(torch.from_numpy(values))
    network.context.order.copy_(torch.arange(4).expand(2, -1))
    for number, method in enumerate(("none", "power")):
        pipeline = PreprocessingPipeline(method).fit(x)
        for values in (x, other):
            got = network.context.view(torch.from_numpy(values), number).numpy()
            np.testing.assert_allclose(got, pipeline.transform(values), rtol=1e-6, atol=1e-7)


def test_constant_columns_and_single_rows_stay_finite():
    for x in (np.ones((5, 2)), np.zeros((1, 2))):
        assert all(np.isfinite(values).all() for values in in_context.fit_columns(x).values())


def test_views_give_each_column_each_place():
    found = in_context.arrange_views(5, 3, 8, 0)
    assert found["order"].shape == (8, 5) and all(sorted(row) == list(range(5)) for row in found["order"].tolist())
    assert found["order"][0].tolist() == list(range(5)) and found["shift"][0] == 0
    assert all(
        np.array_equal(found["order"][i], found["order"][i + 1]) for i in (0, 2, 4, 6)
    )  # without and with a power transform
    assert len({tuple(row) for row in found["order"].tolist()}) == 4 and set(found["shift"].tolist()) <= {0, 1, 2}


def test_standard_scale_is_linear():
    knots = tuple(np.linspace(10, 20, 50))
    assert to_standard(np.array([15.0]), knots)[0] == pytest.approx(0, abs=1e-12)
    low, high = to_standard(np.array([10.0, 20.0]), knots)
    assert high == -low and high == pytest.approx(math.sqrt(3), rel=0.03)  # of a uniform distribution


# ------------------------------------------------------------------------------------------------ contexts


def test_context_is_encoded_once_until_something_changes(monkeypatch):
    network = create("tabicl-v2-test").eval()
    count, encode = [], type(network).encode_context
    monkeypatch.setattr(type(network), "encode_context", lambda self: (count.append(1), encode(self))[1])
    inputs = torch.randn(4, 3), torch.ones(4, 2, dtype=torch.int64)
    with torch.inference_mode():
        first = network(*inputs)
        assert torch.equal(network(*inputs), first) and len(count) == 1
    with torch.no_grad():
        network.context.target.add_(1)
        assert not torch.equal(network(*inputs), first) and len(count) == 2
        network.learner.blocks[0].up.weight.mul_(2)
        network(*inputs)
        assert len(count) == 3
        network.double()(inputs[0].double(), inputs[1])
        assert len(count) == 4


def test_large_contexts_are_not_kept(monkeypatch):
    network = create("tabicl-v2-test").eval()
    monkeypatch.setattr("fieldguide.models.transformer._shared.table_context.CACHED_BYTES", 10)
    with torch.no_grad():
        network(torch.randn(4, 3), torch.ones(4, 2, dtype=torch.int64))
    assert network.kept is None


def test_order_of_context_rows_does_not_matter():
    network = create("tabicl-v2-test").double().eval()
    inputs = torch.randn(4, 3).double(), torch.ones(4, 2, dtype=torch.int64)
    with torch.no_grad():
        before = network(*inputs)
        order = torch.randperm(9)
        network.context.rows.copy_(network.context.rows[order].clone())
        network.context.target.copy_(network.context.target[order].clone())
        torch.testing.assert_close(network(*inputs), before, rtol=1e-9, atol=1e-11)


def test_impossible_networks_are_rejected():
    with pytest.raises(SettingsError, match=r"target is a number.*regressor"):
        create("tabicl-v2-test", num_classes=1)
    with pytest.raises(SettingsError, match=r"predicts numbers.*3 classes"):
        create("tabicl-v2-test", max_classes=0)
    with pytest.raises(SettingsError, match="no columns"):
        create("tabicl-test", numbers=0, categories=())
    with pytest.raises(SettingsError, match="it has none"):
        create("tabicl-test", context=0)(torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("size", ["tabicl-v1", "tabicl-v2"])
def test_estimated_work_is_close_to_the_operations(size):
    with torch.device("meta"):
        network = create(size, context=600, numbers=12).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(30, 12), torch.zeros(30, 0, dtype=torch.int64))
    assert network.count_work(600, 30) == pytest.approx(counter.get_total_flops() / 2, rel=0.25)


def test_every_class_has_a_row():
    targets = np.array([0] * 500 + [1] * 2 + [2])
    for seed in range(5):
        order = in_context.order_rows(targets, seed)
        assert sorted(order) == list(range(503)) and set(targets[order[:3]]) == {0, 1, 2}
    network = create("tabicl-v2-test", num_classes=200, context=0)
    assert in_context.count_least_rows(network) == 200 and in_context.count_least_rows(create("tabicl-test")) == 64


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write("tabicl-v2", tmp_path_factory.mktemp("weights") / "classifier.ckpt")


@pytest.fixture(scope="module")
def regressor(tmp_path_factory):
    return write("tabicl-v2-regressor", tmp_path_factory.mktemp("weights") / "regressor.ckpt")


def test_run_stores_its_context_and_predicts(classifier, tmp_path):
    table, says = make_table(tmp_path / "table.csv"), Says()
    run = fit(table, target="label", weights=classifier, out=tmp_path / "run", callback=says, settings=FAST)
    state = load_file(run.path / "model.safetensors")
    assert run.card.name == "tabicl-v2" and run.config.context == len(state["context.rows"]) == 54 and run.config.views == 4
    assert any("54 rows as context, 4 views" in text for text in says.said)
    assert not [p for p in run.path.rglob("*") if p.suffix in (".pkl", ".pt", ".ckpt")]
    again = fieldguide.open_run(run.path)
    rows = [{"a": 0.5, "b": 5100, "color": "red"}, {"a": -1, "b": None, "color": "purple"}]
    first, second = (each.predict(rows) for each in (run, again))
    assert [p["label"] for p in first] == [p["label"] for p in second]
    assert again.evaluate(table)["scores"]["accuracy"] >= 0
    assert run.scores["log_loss"] > 0
    network = fieldguide.load(run.path)
    assert torch.equal(network.context.rows, state["context.rows"])


def test_run_tells_many_classes_apart(classifier, tmp_path):
    table = make_table(tmp_path / "table.csv", rows=240, classes=12)
    run = fit(table, target="label", weights=classifier, out=tmp_path / "run", callback=Says(), settings=FAST)
    rows = [{"a": 0.5, "b": 5100, "color": "red"}, {"a": -1, "b": None, "color": "purple"}]
    first, second = (each.predict(rows) for each in (run, fieldguide.open_run(run.path)))
    assert first == second and run.config.num_classes == 12
    for row in first:
        assert len(row["probabilities"]) == 12 and sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_run_predicts_numbers(regressor, tmp_path):
    table = make_table(tmp_path / "table.csv", target="value")
    run = fit(table, target="value", weights=regressor, out=tmp_path / "run", callback=Says(), settings=FAST)
    assert run.task.name == "tabular-regression" and run.config.num_classes == 1
    values = [p["value"] for p in run.predict([{"a": 0.5, "b": 5100, "color": "red"}])]
    assert np.isfinite(values).all()


def test_interrupted_run_is_resumed(classifier, tmp_path, monkeypatch):
    from fieldguide.automl import training

    table = make_table(tmp_path / "table.csv")
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_and_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            fit(table, target="label", weights=classifier, out=tmp_path / "run", callback=Says(), settings=FAST)
    whole = fit(table, target="label", weights=classifier, out=tmp_path / "whole", callback=Says(), settings=FAST)
    run = resume(tmp_path / "run", callback=Says())
    assert run.scores == pytest.approx(whole.scores, nan_ok=True)
    ours, theirs = (load_file(each.path / "model.safetensors") for each in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_unsuitable_data_is_rejected_with_a_remedy(classifier, tmp_path):
    numbers, few = make_table(tmp_path / "numbers.csv", target="value"), make_table(tmp_path / "few.csv")
    with pytest.raises(SettingsError, match="target is a number"):
        fit(numbers, target="value", weights=classifier, out=tmp_path / "b", callback=Says(), settings=FAST)
    with pytest.raises(SettingsError, match=r"only with pretrained weights\. Pass --weights auto"):
        fit(few, target="label", model="tabicl-v2", out=tmp_path / "c", callback=Says(), settings=FAST)


def test_more_rows_than_memory_are_sampled_and_reported(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(in_context, "MAX_CELLS", 0)
    monkeypatch.setattr(in_context, "MIN_CONTEXT", 30)
    says = Says()
    run = fit(
        make_table(tmp_path / "t.csv"), target="label", weights=classifier, out=tmp_path / "run", callback=says, settings=FAST
    )
    assert run.config.context == 30
    assert any("the context holds 30 training rows of 54, drawn at random" in text for text in says.said)


def test_time_limits_context_and_views(classifier, tmp_path):
    """With half a millisecond a row, the context shrinks to the least and there is one view."""
    from fieldguide.training.solvers import Problem

    class Slow:
        def __init__(self, network):
            self.network = network

    network = fieldguide.load(classifier, numbers=4, categories=(), num_classes=3)
    card = load.inspect_checkpoint(classifier).card
    batch = lambda n: fieldguide.data.loader.Batches(
        n,
        lambda index, _: {
            "numbers": torch.randn(len(index), 4),
            "categories": torch.zeros(len(index), 0, dtype=torch.int64),
            "target": torch.from_numpy(index % 3),
        },
    )
    made = lambda deadline: Problem(card, network.config, batch(2000), batch(50), lambda _: 0.5, deadline, network=network)
    import time

    rushed = in_context.fit_context(made(time.monotonic() + 0.001))
    assert rushed.network.config.context == in_context.MIN_CONTEXT and rushed.network.config.views == 1
    relaxed = in_context.fit_context(made(time.monotonic() + 10_000))
    assert relaxed.network.config.context == 2000 and relaxed.network.config.views == 8


# ------------------------------------------------------------------------------------------------ the hub

FILE = "tabicl-classifier-v2-20260212.ckpt"


@pytest.fixture
def hub(classifier, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    content = classifier.read_bytes()
    made = Hub({}, {"org/tables": {FILE: content, "other.ckpt": b"damaged", "README.md": b"tables"}})
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    (known,) = (row for row in list_public_checkpoints() if row.tasks == ("tabular-classification",))
    row = PublicCheckpoint(**{**vars(known), "name": "org/tables", "mb": 0.1, "gmacs": 1e-6})
    monkeypatch.setattr(pretrained, "list_public_checkpoints", lambda: (row,))
    yield made
    made.close()


def test_auto_downloads_one_file_and_shows_the_licence(hub, tmp_path):
    says = Says()
    table = make_table(tmp_path / "table.csv")
    run = fit(table, target="label", weights="auto", out=tmp_path / "run", callback=says, settings=FAST)
    (line,) = (text for text in says.said if text.startswith("pretrained weights"))
    assert f"org/tables/{FILE} (0 MB, BSD-3-Clause), downloading; trained on synthetic tables" in line
    assert run.card.name == "tabicl-v2" and run.record["request"]["weights"] == f"hf:org/tables/{FILE}"
    assert {name for name, _ in hub.downloads()} == {FILE}
    hub.requests.clear()
    assert load.inspect_checkpoint(f"hf:org/tables/{FILE}", download=False).card.name == "tabicl-v2" and not hub.requests
    with pytest.raises(WeightsError, match=r"has no file 'none.ckpt'; it has: README.md, other.ckpt, tabicl"):
        load.inspect_checkpoint("hf:org/tables/none.ckpt")
    with pytest.raises(WeightsError, match=r"Name one of them as hf:org/tables/FILE"):
        load.inspect_checkpoint("hf:org/tables")


def test_hint_names_it_and_earlier_downloads_compete(hub, tmp_path, monkeypatch):
    table, says = make_table(tmp_path / "table.csv"), Says()
    fit(table, target="label", out=tmp_path / "a", callback=says, settings=FAST)
    line = f"pretrained weights: `--weights auto` would start from org/tables/{FILE} (0 MB, BSD-3-Clause)"
    assert line in says.said and not hub.requests
    fieldguide.load(f"hf:org/tables/{FILE}")
    hub.requests.clear()
    monkeypatch.setattr("fieldguide.automl.training.find_ensemble", lambda *_: None)
    monkeypatch.setattr(
        "fieldguide.automl.training.find_better",
        lambda plan, rivals, own: next(r for r in rivals if r.card.name == "tabicl-v2"),
    )
    says = Says()
    run = fit(table, target="label", out=tmp_path / "b", callback=says, settings=FAST)
    assert not hub.requests and run.card.name == "tabicl-v2"
    assert any("with 54 rows as context" in text and "Accuracy" in text for text in says.said)
    names = [rival["name"] for rival in run.record["choice"]["rivals"]]
    assert "gradient-boosting" in names
    assert fieldguide.open_run(run.path).predict([{"a": 0.5, "b": 5100, "color": "red"}])[0]["label"].startswith("class")
    assert resume(run.path, callback=Says()).scores == run.scores


def test_too_many_classes_and_too_little_time_are_reasons():
    (row,) = (row for row in list_public_checkpoints() if row.tasks == ("tabular-classification",))
    facts = pretrained.Facts("tabular-classification", 5000, 10, 16e9, 5e10, classes=3)
    assert pretrained.choose(facts) == row and pretrained.reads_context(row)
    many = pretrained.Facts(**{**vars(facts), "classes": 101})
    assert pretrained.choose(many) is None and "it tells apart 100 classes, and there are 101" in pretrained.explain_none(many)
    assert pretrained.choose(pretrained.Facts(**{**vars(facts), "minutes": 0.01})) is None
    assert baselines.share_batches(create_card("tabicl"), create_card("tabicl-v2"))
    assert not baselines.share_batches(create_card("tabm"), create_card("tabicl-v2"))


def create_card(name: str):
    return fieldguide.models.registry.card(name)


def test_files_without_a_configuration_are_read_by_names(tmp_path):
    network, _ = build_package("tabicl-v2")
    torch.save(network.state_dict(), tmp_path / "bare.ckpt")
    with pytest.raises(WeightsError, match="match no model"):  # its shapes are none of a published size
        load.inspect_checkpoint(tmp_path / "bare.ckpt")
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert weights.read_config(tmp_path / "x.safetensors") == {}
