"""Planned memory and time: lifetimes of storages, models of allocators, sharing, machines, and a real process."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fieldguide.core.errors import SettingsError
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.objectives import Classification, Supervised
from fieldguide.planning import errors
from fieldguide.planning.allocator import CudaCache, Glibc, replay
from fieldguide.planning.distribution import Sharing, share_parts
from fieldguide.planning.estimate import estimate, from_example
from fieldguide.planning.machines import Machine, from_dict, get_machine, interpolate, list_machines
from fieldguide.planning.stepping import trace_prediction, trace_training
from fieldguide.planning.timing import plan_seconds
from fieldguide.planning.trace import Trace, Work
from fieldguide.planning.workload import Shape, Workload, build_workload

MIB = 2**20
ARCHITECTURES = [name for name, card in registry.cards().items() if not card.solver]
SMALL_MACHINE = Machine(
    name="small",
    title="a machine of round numbers",
    kind="cpu",
    memory=4 << 30,
    rates={"matmul/float32": ((1.0, 1e9),)},
    bandwidth=((1.0, 1e8),),
    op_seconds=1e-3,
    view_seconds=0.0,
    source="test",
)


def settings(**changes) -> Settings:
    return Settings().with_({"batch_size": 8, "steps": 2, "precision": "float32", "grad_clip": 0, **changes})


def linear(inputs: int = 300, outputs: int = 200, rows: int = 8) -> Workload:
    objective = Supervised(nn.Linear(inputs, outputs, device="meta"), ("x",), Classification())
    return Workload(objective, {"x": torch.empty(rows, inputs, device="meta"), "target": torch.zeros(rows, dtype=torch.int64)})


def tiny(name: str, rows: int = 2) -> Workload:
    card = registry.card(name)
    return build_workload(card, card.resolve_config(card.tiny), Shape(rows, 9, 33))


def bytes_of(trace: Trace, part: str) -> int:
    """Return the bytes of all storages of a part that the step makes."""
    return sum(size for key, size in trace.events if size > 0 and trace.parts.get(key) == part)


# Lifetimes


def test_state_of_a_linear_layer_is_exact():
    trace = trace_training(linear(), settings())
    weights = 4 * (300 * 200 + 200)
    assert sum(trace.initial.values()) == weights
    assert bytes_of(trace, "gradients") == weights
    assert sum(trace.lasting.values()) == bytes_of(trace, "optimizer") == 2 * weights + 2 * 4  # moments, and two step counts
    assert bytes_of(trace, "data") == 4 * 8 * 300 + 8 * 8
    assert trace.later_steps().find_peak()[1]["optimizer"] == 2 * weights + 8


@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 1), ("muon", 1), ("adamw", 2)])
def test_optimizers_keep_their_moments(optimizer, states):
    objective = Supervised(nn.Linear(64, 32, bias=False, device="meta"), ("x",), Classification())
    batch = {"x": torch.empty(4, 64, device="meta"), "target": torch.zeros(4, dtype=torch.int64)}
    trace = trace_training(Workload(objective, batch), settings(optimizer=optimizer))
    assert sum(trace.lasting.values()) // (4 * 64 * 32) == states


def test_average_of_the_weights_exists_before_the_first_step():
    trace = trace_training(linear(), settings(ema=0.9))
    assert trace.find_peak()[1]["average"] == trace.find_peak()[1]["weights"] == 4 * (300 * 200 + 200)


def test_activations_are_what_the_backward_pass_needs():
    """Of linear, relu, linear: the output of relu, the logits, and their log-softmax, saved by the loss."""
    layers = nn.Sequential(nn.Linear(10, 5000), nn.ReLU(), nn.Linear(5000, 7)).to("meta")
    batch = {"x": torch.empty(64, 10, device="meta"), "target": torch.zeros(64, dtype=torch.int64)}
    trace = trace_training(Workload(Supervised(layers, ("x",), Classification()), batch), settings())
    assert 0 <= bytes_of(trace, "activations") - 4 * 64 * (5000 + 7) <= 4 * 64 * 7 + 1024


def test_prediction_keeps_no_activations():
    depth, width, rows = 10, 1000, 64
    layers = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).to("meta")
    batch = {"x": torch.empty(rows, width, device="meta"), "target": torch.zeros(rows, dtype=torch.int64)}
    workload = Workload(Supervised(layers, ("x",), Classification()), batch, labels=("target",))
    peak, parts = trace_prediction(workload).find_peak()
    assert parts["weights"] == 4 * depth * width**2
    assert peak - parts["weights"] - parts["data"] <= 3 * 4 * rows * width


def list_kinds() -> list:
    """Return all architectures; of those with the same family, inputs and outputs, all but the first are slow tests."""
    seen, listed = set(), []
    for name in ARCHITECTURES:
        card = registry.card(name)
        kind = (card.family, card.input_type, card.output_types)
        listed.append(pytest.param(name, marks=[pytest.mark.slow] if kind in seen else []))
        seen.add(kind)
    return listed


def check_balance(trace: Trace, workload: Workload) -> None:
    """Check that all weights are there, and that everything is released but what lasts."""
    assert sum(trace.initial.values()) >= sum(p.nbytes for p in workload.objective.parameters())
    assert sum(size for _, size in trace.events) == sum(trace.lasting.values())
    assert sum(work.flops for work in trace.work) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prediction_of_every_architecture_is_traced(name):
    workload = tiny(name)
    trace = trace_prediction(workload)
    check_balance(trace, workload)
    assert not trace.lasting


@pytest.mark.slow
@pytest.mark.parametrize("name", list_kinds())
def test_training_of_every_architecture_is_traced(name):
    workload = tiny(name)
    trace = trace_training(workload, settings())
    check_balance(trace, workload)
    weights = sum(p.nbytes for p in workload.objective.model.parameters())
    assert bytes_of(trace, "gradients") >= 0.7 * weights  # some parts have no influence on the loss
    assert bytes_of(trace, "optimizer") >= 1.4 * weights


@pytest.mark.slow
def test_tracing_allocates_nothing():
    code = """
from fieldguide.models import registry
from fieldguide.core.settings import Settings
from fieldguide.planning.stepping import trace_training
from fieldguide.planning.workload import Shape, build_workload
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
def trace(size, rows):
    card = registry.card(size)
    workload = build_workload(card, card.resolve_config(size), Shape(rows, 16, 64))
    return trace_training(workload, Settings().with_({"batch_size": rows, "precision": "float32"})).later_steps().find_peak()[0]
trace("resnet-test", 2)
before = peak()
assert trace("vgg16", 64) > 2 << 30
print(peak() - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 100 << 10  # KiB


def test_the_workspace_of_a_fused_lstm_is_counted():
    zeros = torch.zeros
    for rows, steps, width, hidden in ((4, 16, 64, 32), (2, 8, 32, 256), (3, 20, 128, 128)):
        weights = (zeros(4 * hidden, width), zeros(4 * hidden, hidden), zeros(4 * hidden), zeros(4 * hidden))
        states = (zeros(rows, hidden), zeros(rows, hidden))
        arguments = (False, [], 2, hidden, 1, True, False, True, True)
        real = torch.ops.aten.mkldnn_rnn_layer(zeros(steps, rows, width), *weights, *states, *arguments)[3].nbytes
        from fieldguide.planning.kernels import WRITTEN_SHARE, recurrent_workspace

        assert recurrent_workspace(rows, steps, width, hidden, 4) / WRITTEN_SHARE == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_recurrent_activations_grow_with_the_length(name):
    card = registry.card(name)
    config = card.resolve_config(card.tiny)
    at = [bytes_of(trace_training(build_workload(card, config, Shape(4, n)), settings()), "activations") for n in (8, 16)]
    assert 1.7 < at[1] / at[0] < 2.1


def test_masks_decide_how_much_is_computed():
    """The head of a masked language model is applied to the masked tokens only."""
    workload = tiny("bert", 8)
    few = workload.batch["target"].clone()
    few[:, 1:] = -1
    at = []
    for target in (few, workload.batch["tokens"]):
        trace = trace_training(Workload(workload.objective, {**workload.batch, "target": target}), settings())
        at.append(sum(work.flops for work in trace.work))
    assert at[1] > 1.05 * at[0]


# Allocators


@pytest.mark.parametrize(
    ("size", "segment"), [(1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB, 10 * MIB), (11 * MIB + 1, 12 * MIB)]
)
def test_cuda_segments(size, segment):
    cache = CudaCache()
    cache.allocate(1, size)
    assert cache.peak == segment


def test_cuda_blocks_are_rounded_to_512_bytes():
    cache = CudaCache()
    for key in range(4096):
        cache.allocate(key, 511)
    assert cache.peak == 2 * MIB
    cache.allocate(4096, 1)
    assert cache.peak == 4 * MIB


@pytest.mark.parametrize("make", [CudaCache, lambda: Glibc(keep=True)], ids=["cuda", "glibc"])
def test_freed_blocks_are_used_again(make):
    allocator = make()
    for key, size in enumerate((64 * MIB, 32 * MIB)):
        allocator.allocate(key, size)
    before = allocator.peak
    allocator.release(0)
    for key in range(2, 5):
        allocator.allocate(key, 20 * MIB)
    assert allocator.peak == before
    allocator.release(1)
    for key in range(2, 5):
        allocator.release(key)
    allocator.allocate(9, 90 * MIB if make is not CudaCache else 60 * MIB)
    assert allocator.peak <= before * 1.001


def test_a_kept_heap_is_fragmented():
    """A larger block does not fit into the hole that smaller ones left, between others."""
    heap = Glibc(keep=True)
    for key in range(10):
        heap.allocate(key, 10 * MIB)
    for key in range(0, 10, 2):
        heap.release(key)
    heap.allocate(10, 15 * MIB)
    assert heap.peak >= 115 * MIB


def test_large_blocks_are_given_back_if_memory_is_not_kept():
    heap = Glibc(keep=False)
    for key in range(10):
        heap.allocate(key, 100 * MIB)
        heap.release(key)
    assert heap.peak < 101 * MIB


def test_replayed_steps_share_what_lasts():
    trace = Trace(events=[(1, 10 * MIB), (2, 20 * MIB), (1, -10 * MIB)], initial={9: 5 * MIB})
    assert trace.lasting == {2: 20 * MIB}
    assert trace.find_peak()[0] == 35 * MIB
    assert trace.later_steps().find_peak()[0] == 35 * MIB
    assert replay(trace, CudaCache(), initial=True) == 40 * MIB  # 5 and 10 MiB share a segment of 20


# Several devices


def test_ddp_replicates_and_fsdp_shards():
    parts = {"weights": 1200, "gradients": 1200, "optimizer": 2400, "average": 0, "activations": 500, "best": 0}
    assert share_parts(parts, Sharing())["communication"] == 0
    ddp, fsdp = share_parts(parts, Sharing(4)), share_parts(parts, Sharing(4, "fsdp"))
    assert {name: ddp[name] for name in parts} == parts
    assert ddp["communication"] == 1200
    assert (fsdp["weights"], fsdp["gradients"], fsdp["optimizer"], fsdp["activations"]) == (300, 300, 600, 500)
    assert fsdp["communication"] == 300
    assert Sharing(2).count_seconds(10**9) < Sharing(8).count_seconds(10**9) < Sharing(8, "fsdp").count_seconds(10**9)
    with pytest.raises(SettingsError, match="zero"):
        Sharing(2, "zero")


# Machines and time


def test_machines_have_sources_and_names():
    for name in list_machines()[:-1]:
        machine = get_machine(name)
        assert machine.source and machine.memory > 10**10 and machine.get_flops("matmul", "float32", 1e9) > 1e12
    assert (
        get_machine("h200").get_bandwidth(1e6)
        > get_machine("h100-80g").get_bandwidth(1e6)
        > get_machine("t4").get_bandwidth(1e6)
    )
    with pytest.raises(SettingsError, match="h100-80g"):
        get_machine("h100")


def test_a_probe_is_read_again(tmp_path):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps(SMALL_MACHINE.to_dict()))
    assert get_machine(path) == SMALL_MACHINE == from_dict(SMALL_MACHINE.to_dict())
    path.write_text('{"name": 3}')
    with pytest.raises(SettingsError, match=r"probe\.json"):
        get_machine(path)


def test_rates_are_interpolated():
    table = ((1e3, 1e9), (1e6, 4e9))
    assert [interpolate(table, size) for size in (1, 1e3, 1e6, 1e9)] == pytest.approx([1e9, 1e9, 4e9, 4e9])
    assert interpolate(table, math.sqrt(1e9)) == pytest.approx(2e9)


def test_time_is_the_slower_of_computing_and_moving():
    compute, move = Work("mm", "matmul", "float32", 1e9, 1e6), Work("add", "other", "float32", 0.0, 1e8)
    view = Work("view", "view", "", 0.0, 0.0)
    assert plan_seconds([compute, move, view], SMALL_MACHINE) == pytest.approx(1.001 + 1.001)


# Estimates


def test_estimates_grow_with_the_batch_and_have_parts():
    found = [estimate("fnn", batch=n, machine=SMALL_MACHINE, search=False) for n in (64, 128, 1024)]
    for a, b in pairwise(found):
        assert a.allocated < b.allocated and a.peak < b.peak and a.step_seconds < b.step_seconds
    for each in found:
        assert sum(each.parts.values()) == each.peak <= each.upper
        assert json.loads(json.dumps(each.to_dict()))["parts"]["weights"] == 4 * 269_322


def test_the_largest_batch_fits_and_a_larger_one_does_not():
    machine = replace(SMALL_MACHINE, memory=1 << 30)
    plan = lambda n, search=False: estimate("fnn", batch=n, machine=machine, search=search)
    largest = plan(32, True).largest_batch
    assert largest > 1000
    assert plan(largest).fits and not plan(int(1.1 * largest)).fits


def test_nothing_fits_into_a_tiny_machine():
    found = estimate("fnn", batch=4, machine=replace(SMALL_MACHINE, memory=1 << 20))
    assert not found.fits and found.largest_batch == 0


def test_the_cache_of_a_generator_is_exact():
    found = estimate("gpt2-nano", mode="predict", batch=3, length=16, new_tokens=48, machine="t4", search=False)
    config = registry.card("gpt2").resolve_config("gpt2-nano")
    assert found.parts["cache"] == 2 * config.depth * 3 * 64 * config.dim * 4


def test_sixteen_bit_weights_take_two_bytes():
    whole, half = (
        estimate("gpt2-nano", mode="predict", batch=1, machine="t4", dtype=d, search=False) for d in ("float32", "bfloat16")
    )
    assert half.parts["weights"] < 0.55 * whole.parts["weights"]


def test_an_existing_objective_is_resized_and_left_alone():
    workload = linear()
    objective = Supervised(nn.Linear(300, 200), ("x",), Classification())
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    state = torch.get_rng_state()
    make = from_example(objective, {"x": torch.randn(8, 300), "target": torch.zeros(8, dtype=torch.int64)})
    found = estimate(make, batch=8, machine=SMALL_MACHINE, search=False, settings=settings())
    assert found.allocated == max(t.find_peak()[0] for t in [trace_training(workload, settings()).later_steps()])
    assert len(make(Shape(20)).batch["x"]) == len(make(Shape(20)).batch["target"]) == 20
    assert all(torch.equal(tensor, objective.state_dict()[name]) for name, tensor in before.items())
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in objective.parameters())
    assert objective.training and torch.equal(torch.get_rng_state()[:8], state[:8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "rent"}, "rent"),
        ({"devices": 0}, "devices"),
        ({"dtype": "int8"}, "int8"),
        ({"strategy": "tensor"}, "tensor for serving"),
        ({"strategy": "fsdp", "mode": "serve"}, "fsdp is for training"),
    ],
)
def test_unknown_options_are_named(arguments, message):
    with pytest.raises(SettingsError, match=message):
        estimate("fnn", machine="t4", **arguments)


# Measured errors


def write_cells(path, factor: float, extra: int, architectures: int = 3) -> None:
    rows = []
    for number in range(architectures):
        for cell in range(8):
            resident = (cell + 1) * 50 * MIB + number * MIB
            rows.append(
                {
                    "architecture": f"net{number}",
                    "family": "nets",
                    "size": "s",
                    "mode": "train",
                    "batch": cell,
                    "base": 300 * MIB,
                }
                | {
                    "measured": int(factor * resident) + extra,
                    "allocated": resident,
                    "resident": resident,
                    "best": 0.2,
                    "median": 0.2,
                }
                | {"fixed": 0}
                | {"ops": 1, "flops": 1, "moved": 1, "terms": '{"matmul": 0.1}', "plan_seconds": 1, "idle": 1}
            )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_corrections_are_learnt_from_cells(tmp_path):
    write_cells(path := tmp_path / "errors.csv", 1.1, 20 * MIB)
    rule = errors.get_correction("nets", "train", path)
    assert rule.memory == pytest.approx(1.1, abs=1e-3) and rule.extra == pytest.approx(20 * MIB, rel=0.02)
    assert rule.factors["matmul"] == pytest.approx(2.0, rel=0.02) and rule.memory_p95 < 1e-3 and rule.cells == 24
    assert errors.get_process_bytes("train", path) == 300 * MIB
    judged = errors.judge(path)
    assert max(abs(row["net"]) for row in judged) < 1e-3 and not any(row["over"] for row in judged)
    assert "nets" in errors.describe(path)


def test_a_family_without_cells_says_so(tmp_path):
    rule = errors.get_correction("nets", "train", tmp_path / "missing.csv")
    assert rule.cells == 0 and rule.memory == 1.0 and rule.upper == errors.DEFAULT_UPPER


def test_bounds_cover_weights_once(tmp_path):
    """What is known exactly, such as the weights, is not multiplied."""
    write_cells(path := tmp_path / "errors.csv", 1.1, 20 * MIB)
    rule = errors.get_correction("nets", "train", path)
    weights, rest = 50 << 30, 100 * MIB
    assert rule.correct(weights + rest, weights) - weights == pytest.approx(1.1 * rest + 20 * MIB, rel=0.02)
    assert rule.correct(weights + rest, weights) <= rule.bound(weights + rest, weights) < 1.01 * weights


# A real process

REAL = """
import torch
from torch import nn
from fieldguide.core.hardware import keep_memory
from fieldguide.core.settings import Settings
from fieldguide.objectives import Classification, Supervised
from fieldguide.planning.stepping import Silent
from fieldguide.training.trainer import Trainer
torch.set_num_threads(1)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
def train(width, rows):
    objective = Supervised(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)), ("x",), Classification())
    made = Settings().with_({"batch_size": rows, "steps": 9, "eval_steps": 9, "precision": "float32"})
    trainer = Trainer(objective, None, made, device=torch.device("cpu"), callback=Silent())
    trainer.set_train_mode()
    keep_memory()
    def stream():
        while True:
            yield 0, {"x": torch.randn(rows, width), "target": torch.zeros(rows, dtype=torch.int64)}
    for _ in range(3):
        trainer.train_step(stream())
train(8, 8)
base = status("VmRSS")
train(2048, 512)
print(status("VmHWM") - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_the_planned_memory_is_that_of_a_real_process():
    measured = int(subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=True).stdout)
    layers = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)).to("meta")
    batch = {"x": torch.empty(512, 2048, device="meta"), "target": torch.zeros(512, dtype=torch.int64)}
    trace = trace_training(Workload(Supervised(layers, ("x",), Classification()), batch), settings(grad_clip=1.0))
    planned = sum(trace.initial.values()) + replay(trace, Glibc(keep=True))
    assert planned == pytest.approx(measured, rel=0.2)


def test_weights_of_another_dtype():
    made = estimate("vit-test", mode="predict", dtype="bfloat16", batch=2, search=False)
    assert (
        made.dtype == "bfloat16"
        and made.parts["weights"] < estimate("vit-test", mode="predict", batch=2, search=False).parts["weights"]
    )
    with pytest.raises(SettingsError, match="cannot compute with bfloat16 weights"):
        estimate("conformer-test", mode="predict", dtype="bfloat16", batch=2, search=False)


def test_batches_with_several_rows_for_an_example():
    """Two rows and five ids for each of four examples grow in proportion to the examples."""
    batch = {"x": torch.randn(8, 3), "ids": torch.arange(20), "none": torch.zeros(0, dtype=torch.int64)}
    make = from_example(nn.Identity(), batch, examples=4)
    sizes = {name: len(t) for name, t in make(Shape(10)).batch.items()}
    assert sizes == {"x": 20, "ids": 50, "none": 0}
