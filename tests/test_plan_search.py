"""Traces of other sizes from a few, the search for the largest size, and the cache of operations."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.planning.op_cache import OpCache
from fieldguide.planning.records import Trace, Work
from fieldguide.planning.scaling import interpolate, order_releases
from fieldguide.planning.search import find_largest, search
from fieldguide.planning.stepping import trace_prediction, trace_training
from fieldguide.planning.workload import Shape, build_workload


def make_trace(name: str, rows: int, length: int = 8, mode: str = "train", precision: str = "float32") -> Trace:
    card = registry.card(name)
    workload = build_workload(card, card.resolve_config(card.tiny), Shape(rows, length, 33))
    settings = Settings().with_({"batch_size": rows, "steps": 2, "precision": precision})
    return order_releases(trace_training(workload, settings) if mode == "train" else trace_prediction(workload, precision))


@pytest.mark.parametrize("name", ["fnn", "resnet", "gpt2", "lstm", "deepfm"])
@pytest.mark.parametrize("mode", ["train", "predict"])
def test_traces_of_other_batches_are_exact(name, mode):
    made = interpolate({n: make_trace(name, n, mode=mode) for n in (3, 6)}, 1)
    whole, other = make_trace(name, 20, mode=mode), made(20)
    assert other.events == whole.events and other.initial == whole.initial
    assert sum(w.flops for w in other.work) == pytest.approx(sum(w.flops for w in whole.work))
    assert sum(w.bytes for w in other.work) == pytest.approx(sum(w.bytes for w in whole.work), rel=1e-3)


def test_traces_of_other_lengths_are_exact():
    made = interpolate({n: make_trace("gpt2", 2, n) for n in (4, 6, 10)}, 2)
    whole = make_trace("gpt2", 2, 12)
    assert made(12).find_peak() == whole.find_peak()


def test_other_operations_are_noticed():
    """A recurrent network in Python has more operations for longer sequences."""
    assert interpolate({n: make_trace("gru", 2, n) for n in (4, 6, 8)}, 2) is None


def test_repeated_operations_are_the_same(monkeypatch):
    """The cache of operations changes nothing."""
    cached = make_trace("gpt2", 2), make_trace("lstm", 2), make_trace("lenet5-1998", 2, mode="predict")
    monkeypatch.setattr(OpCache, "make_key", lambda *_: None)
    plain = make_trace("gpt2", 2), make_trace("lstm", 2), make_trace("lenet5-1998", 2, mode="predict")
    for a, b in zip(cached, plain):
        assert a.work == b.work and Counter(size for _, size in a.events) == Counter(size for _, size in b.events)


def line(number: int, fixed: int = 1000, each: int = 10) -> Trace:
    work = [Work("mm", "matmul", "float32", float(number), float(number))]
    return Trace([(1, each * number), (1, -each * number)], {}, {9: fixed}, work)


def test_the_largest_size_is_found_and_checked():
    traced = []

    def trace(number: int) -> Trace:
        traced.append(number)
        return line(number)

    bound = lambda trace, _: trace.find_peak()[0]
    found = search(trace, bound, 10**6, 32, 1 << 20, 1, 1 << 20)
    assert 0.97 * (10**6 - 1000) / 10 <= found <= (10**6 - 1000) / 10
    assert traced == [32, 64, found]
    assert search(line, bound, 999, 32, 1 << 20, 1, 1 << 20) == 0
    assert search(line, bound, 1055, 32, 1 << 20, 1, 1 << 20) == 5
    assert search(line, bound, 10**6, 32, 100, 1, 1 << 20) == 100


def test_a_wrong_interpolation_is_corrected():
    """Above 1,000 rows each takes more memory than before."""
    trace = lambda n: line(n, each=10 if n < 1000 else 30)
    found = search(trace, lambda trace, _: trace.find_peak()[0], 10**6, 32, 1 << 20, 1, 1 << 20)
    assert 0.95 * 33_300 <= found <= 33_300


def test_the_search_ends_for_steps_in_the_bound():
    bound = lambda n: 100 * (n // 64 + 1)
    assert 0.9 * 640 <= find_largest(bound, 1000, {1: 100}, 10**6) <= 640


def test_few_values_are_kept_for_masked_tokens():
    """Masked tokens are spread evenly, so that twice the rows have twice as many."""
    card = registry.card("bert")
    counts = [
        int((build_workload(card, card.resolve_config(card.tiny), Shape(n, 40)).batch["target"] >= 0).sum()) for n in (3, 6)
    ]
    assert counts[1] == 2 * counts[0] > 0
    assert torch.is_tensor(make_trace("bert", 2).work[0].flops) is False


def test_rows_computed_in_chunks_are_not_traced_in_large_numbers():
    """Each chunk of 256 rows is an operation: the traces of millions of rows would take hours."""
    traced = []

    def trace(number: int) -> Trace:
        traced.append(number)
        size = 100 * min(number, 256)
        return Trace([(1, size), (1, -size)], {}, {9: 1000 + number}, line(256).work * -(-number // 256))

    bound = lambda trace, _: trace.find_peak()[0]
    found = search(trace, bound, 10**9, 32, 1 << 30, 1, 8192)
    assert found == pytest.approx(10**9, rel=0.02) and max(traced) == 8192


def test_a_repeated_change_of_shape_in_place_is_traced():
    """Chronos-Bolt takes quantiles of each block, for which torch calls `unsqueeze_`."""
    card = registry.card("chronos-bolt")
    workload = build_workload(card, card.resolve_config(card.tiny), Shape(2))
    assert trace_prediction(workload, "float32").work
