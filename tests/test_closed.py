"""Closed systems, whose weights are not available, are described wherever a user requests one."""

from __future__ import annotations

import json

import pytest

import fieldguide
from fieldguide.cli import console
from fieldguide.core.errors import SettingsError
from fieldguide.models import registry
from fieldguide.tasks import tasks

SYSTEMS = list(dict.fromkeys(registry.closed_systems().values()))


def test_closed_systems_of_the_guide_are_listed():
    assert {system.name for system in SYSTEMS} == {
        "gpt-3",
        "gpt-4",
        "gpt-4v",
        "claude",
        "gemini",
        "midjourney",
        "dall-e-3",
        "sora",
        "gen-3",
        "kling",
    }
    assert (
        registry.closed_systems()["gpt4v"].stand_in == "llava-1.5-7b"
        and registry.closed_systems()["gpt-3"].stand_in == "gpt3-175b"
    )
    names = [name for system in SYSTEMS for name in system.names]
    assert len(names) == len(set(names)) == len(registry.closed_systems()) and not set(names) & set(registry.names(tests=True))
    assert not set(names) & set(registry.cards())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_stand_ins_support_the_tasks(system):
    card, size = registry.find(system.stand_in)
    fits = {
        name
        for name, task in tasks().items()
        if card.input_type in task.input_types and set(card.output_types) & set(task.output_types)
    }
    assert size == system.stand_in and set(system.tasks) <= fits and bool(system.tasks) == bool(fits)
    assert system.published.endswith(".") and system.source and not system.source.endswith(".") and system.why


@pytest.mark.parametrize("name", ["gpt-4", "GPT-4", "dall_e_3", "Claude", "sora"])
def test_creating_a_closed_system_describes_it(name):
    with pytest.raises(SettingsError, match=r"(?s)is a closed system by .*Published is .*Source: .*Most similar model here: "):
        fieldguide.create(name)
    with pytest.raises(SettingsError, match="unknown model 'gpt-4x'"):
        fieldguide.create("gpt-4x")


def test_command_line_lists_closed_systems_separately(capsys):
    console.print_models("g*", None, "text-generation", False)
    lines = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("closed"))
    assert any(line.startswith("gpt2") for line in lines[:head]) and not any(line.startswith("gpt-4 ") for line in lines[:head])
    assert [line.split()[0] for line in lines[head + 1 :]] == ["gpt-4", "gpt-3", "gemini"]
    console.print_models("sora", None, None, True)
    row = json.loads(capsys.readouterr().out)
    assert row["closed"] and row["name"] == "sora" and row["stand_in"] == "latte-xl2"
    console.print_models("*", "recurrent", None, False)
    assert "closed" not in capsys.readouterr().out
    console.print_description(fieldguide.show("GPT-4"), False)
    assert "arXiv:2303.08774" in " ".join(capsys.readouterr().out.split())
    console.print_description(fieldguide.show("kling"), True)
    assert json.loads(capsys.readouterr().out)["maker"] == "Kuaishou"
