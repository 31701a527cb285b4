"""Planned serving: the cache, prefill and decode, several devices, and the page on sizing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fieldguide.models import registry
from fieldguide.planning import sizing
from fieldguide.planning.estimate import estimate
from fieldguide.planning.machines import get_machine
from fieldguide.planning.serving import count_windowed_bytes

PAGE = Path(__file__).parents[1] / "docs" / "sizing.md"


def serve(name: str, **changes):
    base = {"mode": "serve", "machine": "t4", "batch": 4, "length": 24, "new_tokens": 8, "search": False}
    return estimate(name, **{**base, **changes})


def test_the_cache_of_a_server_is_exact():
    config = registry.card("gpt2").resolve_config("gpt2-nano")
    found = serve("gpt2-nano")
    assert found.parts["cache"] == 2 * config.depth * 4 * 32 * config.dim * 4
    assert found.serving["cache_per_sequence"] == found.parts["cache"] / 4
    assert found.parts["weights"] == estimate("gpt2-nano", mode="predict", machine="t4", search=False).parts["weights"]
    half = serve("gpt2-nano", dtype="bfloat16")
    assert half.parts["cache"] == found.parts["cache"] / 2


def test_shared_heads_need_a_smaller_cache():
    many, few = (serve("llama-test", fields={"heads": 4, "kv_heads": n, "length": 64}).parts["cache"] for n in (4, 1))
    assert many == 4 * few


@pytest.mark.parametrize("name", ["llama-test", "gemma3-test", "mixtral-test", "t5-test", "bart-test"])
def test_generators_of_all_kinds_are_served(name):
    found = serve(name, length=6, new_tokens=4)
    assert found.parts["cache"] > 0 and found.serving["tokens_per_second"] > 0 and found.serving["prefill_seconds"] > 0
    assert found.serving["tokens_per_second"] <= 1.01 * found.serving["decode_bound"] or found.machine == "cpu"


@pytest.mark.slow
def test_more_sequences_share_the_reading_of_weights():
    one, many = serve("gpt2", batch=1), serve("gpt2", batch=32)
    assert many.serving["tokens_per_second"] > 5 * one.serving["tokens_per_second"]
    assert many.serving["decode_bound"] > 5 * one.serving["decode_bound"]


def test_the_most_sequences_fit_and_more_do_not():
    machine = replace(get_machine("t4"), memory=1 << 30)
    most = serve("gpt2-nano", machine=machine, search=True).largest_batch
    assert serve("gpt2-nano", machine=machine, batch=most).fits
    assert not serve("gpt2-nano", machine=machine, batch=int(1.1 * most)).fits


def test_split_layers_halve_weights_and_cache():
    one, two = serve("gpt2"), serve("gpt2", devices=2, strategy="tensor")
    assert two.parts["weights"] == pytest.approx(one.parts["weights"] / 2, abs=2)
    assert two.parts["cache"] == pytest.approx(one.parts["cache"] / 2, abs=2)
    assert two.serving["decode_bound"] == pytest.approx(2 * one.serving["decode_bound"])
    copies = serve("gpt2", devices=2)
    assert copies.parts["cache"] == one.parts["cache"]
    assert copies.serving["tokens_per_second"] == pytest.approx(2 * one.serving["tokens_per_second"])


def test_windows_limit_the_cache():
    config = registry.card("gemma3").resolve_config("gemma3-1b")
    assert count_windowed_bytes(config, 1000, 256) == 1000
    whole = config.depth // config.every
    expected = (whole + (config.depth - whole) * config.window / 8192) / config.depth
    assert count_windowed_bytes(config, 10**6, 8192) == pytest.approx(1e6 * expected, rel=1e-3)


def test_networks_that_do_not_generate_have_a_latency():
    found = serve("resnet-test", batch=8)
    assert found.serving["rows_per_second"] == pytest.approx(8 / found.serving["latency_seconds"])


# The page on sizing


def test_twenty_tokens_for_each_parameter():
    assert sizing.suggest_parameters(1.4e12) == 7e10  # Chinchilla
    assert sizing.describe_tokens(2_000_000).startswith("your 2,000,000 tokens suit about 100 thousand parameters")


def test_the_tables_of_data_and_weights_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert sizing.fill(page, ("data", "weights")) == page
    assert "14 GB" in page and round(2 * sizing.count_parameters("llama2-7b") / 1e9) in (13, 14)


@pytest.mark.slow
def test_all_tables_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert sizing.fill(page) == page
