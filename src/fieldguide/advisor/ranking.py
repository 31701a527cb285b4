"""The advisor: rules held as data, applied to facts about data and machine; every option gets its reasons."""

from __future__ import annotations

import fnmatch
import functools
import math
import operator
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch

from fieldguide import measure, registry
from fieldguide.card import Card
from fieldguide.errors import DataError, SettingsError

EPOCHS = 8            # passes over the data that a network should get in the time given; each halving costs a point
# Of the machine's matrix-product speed that training reaches, about; less where products are so fast that memory waits.
EFFICIENCY = {"float32": 0.35, "bfloat16": 0.15}
BYTES = 16            # a parameter in training: weight, gradient, two moments, in float32
PARAMETERS = 200      # for each training example, that a network trained from nothing should have, about
LEAST = 0.2           # of one pass over the data: what can do less in the time given is ruled out
HURRY = 4             # times the quickest one's time that counts as quick, where time is short for all
COMPARE = {"<": operator.lt, ">": operator.gt, "=": operator.eq}


@dataclass
class Option:
    """One size of one architecture: its points, why, and what rules it out (empty where nothing does)."""

    name: str
    architecture: str
    parameters: int = 0
    multiply_adds: int = 0
    points: float = 0.0
    reasons: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    rejected: str = ""
    seconds: float = math.inf        # that `EPOCHS` passes over the data would take, roughly; infinite: impossible


@dataclass
class Advice:
    """Options in order of preference, then those ruled out."""

    options: list[Option]
    rejected: list[Option]

    @property
    def best(self) -> Option:
        if not self.options:
            why = "; ".join(f"{o.name}: {o.rejected}" for o in self.rejected[:5])
            raise SettingsError(f"no network suits this data and machine ({why}). Give more --minutes or name one "
                                "with --model.")
        return self.options[0]


@functools.cache
def rules() -> list[dict[str, Any]]:
    return tomllib.loads(files(__package__).joinpath("rules.toml").read_text())["rule"]


def holds(when: Mapping[str, str], facts: Mapping[str, Any]) -> bool:
    """Whether every condition holds: "<1000" and ">0.5" compare numbers, other text is a glob."""
    for key, wanted in when.items():
        fact = facts.get(key)
        if fact is None:
            return False
        if wanted[0] in COMPARE:
            if not COMPARE[wanted[0]](fact, float(wanted[1:])):
                return False
        elif not fnmatch.fnmatch(str(fact), wanted):
            return False
    return True


def speaks_of(rule: Mapping[str, Any], card: Card) -> bool:
    return any(fnmatch.fnmatch(card.family if kind == "family" else card.name, pattern)
               for kind, _, pattern in ((p.partition(":") if ":" in p else ("name", "", p)) for p in rule["for"]))


def configured(card: Card, size: str, needs: Mapping[str, Any], changes: Mapping[str, Any] = {}) -> Any:
    """The config of a size for data with these needs, then the user's own changes. Of what a task can use (`gives`, names
    in the order of its liking), a network with several heads gets the first that it can give. Raises `TypeError`, and
    `SettingsError` for a network that reads no text where the data has some."""
    if needs.get("vocab") and not card.accepts("vocab"):
        raise SettingsError(f"{card.name} reads no text, and this data has captions or the like")
    adapted = card.adapt(needs) if card.adapt else {}
    needs = {k: v for k, v in needs.items() if card.accepts(k)}
    if "gives" in needs:
        needs["gives"] = next(given for given in needs["gives"] if given in card.answers)
    return card.settle(size, **needs | dict(adapted) | dict(changes))


def advise(*, facts: Mapping[str, Any], needs: Mapping[str, Any], takes: tuple[str, ...], gives: tuple[str, ...],
           minutes: float, machine: Mapping[str, Any] | None = None, model: str = "auto") -> Advice:
    """Ranks every size of every architecture that can be fed (`takes`) and used (`gives`).

    `facts` are what rules compare: task, rows, and the task's profile. `needs` are the sizes that the data demands.
    `model` other than "auto" narrows the choice to one name or glob, and then nothing but impossibility rejects.
    """
    machine = machine or measure.machine()
    speed = max(EFFICIENCY[precision] * flops for precision, flops in machine["flops"].items())
    options: list[Option] = []
    able = [n for n in registry.names() if registry.card(n).takes in takes and set(registry.card(n).answers) & set(gives)]
    if model != "auto":
        able = [refuse_unable(model, able)]
    for name in able:
        card, size = registry.find(name)
        option = Option(size, card.name)
        options.append(option)
        try:
            config = configured(card, size, {"gives": gives, **needs})
            with torch.device("meta"):
                option.parameters = measure.parameters(card.make(config))
            option.multiply_adds = measure.multiply_adds(card.name, config, length=facts.get("tokens", 64),
                                                          side=facts.get("side", 224))
        except (DataError, SettingsError, ValueError) as error:      # such as pictures too small for its pooling
            option.rejected = str(error)
            continue
        for rule in rules():
            if holds(rule["when"], facts) and speaks_of(rule, card):
                option.points += rule["points"]
                (option.reasons if rule["points"] > 0 else option.against).append(f"{rule['because']} [{rule['source']}]")
        size_up(option, facts, speed, minutes, machine)
    if model != "auto":
        return asked_for(options[0])
    if options and not any(not o.rejected for o in options):
        hurried(options, minutes)
    ranked = sorted(options, key=lambda o: (-o.points, o.parameters))
    return Advice([o for o in ranked if not o.rejected], [o for o in ranked if o.rejected])


def size_up(option: Option, facts: Mapping[str, Any], speed: float, minutes: float,
            machine: Mapping[str, Any]) -> None:
    """Rules out what cannot fit or finish, and prefers sizes in proportion to the data."""
    option.seconds = seconds = facts["rows"] * EPOCHS * 6 * option.multiply_adds / speed   # backward is twice forward
    if option.parameters * BYTES > 0.8 * machine["memory"]:
        option.seconds = math.inf
        option.rejected = (f"training needs {option.parameters * BYTES / 2**30:.1f} GiB for weights and optimiser, the "
                           f"machine has {machine['memory'] / 2**30:.1f} GiB")
    elif seconds > EPOCHS * 60 * minutes / LEAST:
        option.rejected = (f"one pass over the data would take about {seconds / EPOCHS / 60:.2g} minutes of the "
                           f"{minutes:g} given")
    elif seconds > 60 * minutes:
        option.points -= math.log2(seconds / (60 * minutes))
        option.against.append(f"{minutes:g} minutes are about {60 * minutes * EPOCHS / seconds:.1f} passes over the data: few")
    # Ten times too large or too small for the data costs half a point.
    wanted = min(max(PARAMETERS * facts["rows"], 1e5), 1e8)
    option.points -= 0.5 * abs(math.log10(option.parameters / wanted))
    if option.parameters > 10 * wanted:
        option.against.append(f"{option.parameters:,} parameters are many for {facts['rows']:,} examples "
                              "[guide, FAQ 'How do I choose the right model size': start small]")


def hurried(options: list[Option], minutes: float) -> None:
    """Where no network can see even a part of the data in the time given, lets the best of the quick ones do what it can."""
    quickest = min(o.seconds for o in options)
    if quickest < math.inf:
        best = max((o for o in options if o.seconds <= HURRY * quickest), key=lambda o: o.points)
        best.against.insert(0, f"{minutes:g} minutes are short for this much data: {best.rejected}. More --minutes will "
                               "score better")
        best.rejected = ""


def refuse_unable(model: str, able: list[str]) -> str:
    """The size that the user asked for. Raises `SettingsError` where it cannot do this task."""
    card, size = registry.find(model)
    if size not in [*able, card.tiny]:
        others = sorted({registry.card(n).name for n in able})
        raise SettingsError(f"{model} takes {card.takes} and gives {' or '.join(card.answers)}, which this task cannot use. "
                            f"Networks that can: {', '.join(others)}.")
    return size


def asked_for(option: Option) -> Advice:
    """The one that the user named: nothing but impossibility rejects it."""
    option.reasons.insert(0, "you asked for it")
    if not option.parameters:
        raise SettingsError(f"{option.name} cannot be made for this data: {option.rejected}. Sizes come from the data; "
                            "--set task.NAME=... and model.NAME=... change them.")
    if option.rejected:
        option.against.insert(0, option.rejected)
        option.rejected = ""
    return Advice([option], [])
