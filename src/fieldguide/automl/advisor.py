"""The advisor: rules held as data (rules.toml), applied to facts about data and machine. Every option gets its
reasons.
"""

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

from fieldguide.automl import profile
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models import registry

LOOKED_AT = 5  # networks whose costs are counted at least, the most promising
SIZES = 3  # of one architecture that are of interest beside each other
EPOCHS = 8  # passes over the data that a network should get in the time given; each halving costs a point
# Of the machine's matrix-product speed that training reaches, about; less where products are so fast that memory waits.
EFFICIENCY = {"float32": 0.35, "bfloat16": 0.15}
BYTES = 16  # a parameter in training: weight, gradient, two moments, in float32
PARAMETERS = 200  # for each training example, that a network trained from nothing should have, about
LEAST = 0.2  # of one pass over the data: what can do less in the time given is ruled out
HURRY = 4  # times the quickest one's time that counts as quick, where time is short for all
COMPARE = {"<": operator.lt, ">": operator.gt, "=": operator.eq}


@dataclass
class Option:
    """One size of one architecture: its points, the reasons for and against it, and why it was rejected (empty if
    not).
    """

    name: str
    architecture: str
    parameters: int = 0
    multiply_adds: int = 0
    points: float = 0.0
    reasons: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    rejected: str = ""
    slow: bool = False  # ruled out for its time or memory, as larger ones of its kind are then, too
    seconds: float = math.inf  # that `EPOCHS` passes over the data would take, roughly; infinite: impossible


@dataclass
class Advice:
    """Options in order of preference, then the rejected ones."""

    options: list[Option]
    rejected: list[Option]

    @property
    def best(self) -> Option:
        if not self.options:
            why = "; ".join(f"{o.name}: {o.rejected}" for o in self.rejected[:5])
            raise SettingsError(
                f"no network suits this data and machine ({why}). Give more --minutes or name one with --model."
            )
        return self.options[0]


@functools.cache
def rules() -> list[dict[str, Any]]:
    return tomllib.loads(files(__package__).joinpath("rules.toml").read_text())["rule"]


def holds(when: Mapping[str, str], facts: Mapping[str, Any]) -> bool:
    """Return whether every condition holds: "<1000" and ">0.5" compare numbers, other text is a glob."""
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
    return any(
        fnmatch.fnmatch(card.family if kind == "family" else card.name, pattern)
        for kind, _, pattern in ((p.partition(":") if ":" in p else ("name", "", p)) for p in rule["for"])
    )


def configured(card: Card, size: str, needs: Mapping[str, Any], changes: Mapping[str, Any] = {}) -> Any:
    """Return the config of a size for the dimensions of the data, then the user's own fields.

    A network with several heads gets the first output type of the task that it supports. Raises `TypeError` for
    unknown fields, and `SettingsError` for a network that reads no text if the data has text.
    """
    if needs.get("vocab_size") and not card.accepts("vocab_size"):
        raise SettingsError(f"{card.name} reads no text, and this data has captions or the like")
    adapted = card.adapt(needs) if card.adapt else {}
    needs = {k: v for k, v in needs.items() if card.accepts(k)}
    if "output_type" in needs:
        needs["output_type"] = next(given for given in needs["output_type"] if given in card.output_types)
    return card.settle(size, **needs | dict(adapted) | dict(changes))


def advise(
    *,
    facts: Mapping[str, Any],
    needs: Mapping[str, Any],
    input_types: tuple[str, ...],
    output_types: tuple[str, ...],
    minutes: float,
    machine: Mapping[str, Any] | None = None,
    model: str = "auto",
    config: Any = None,
) -> Advice:
    """Rank every size of every architecture that takes one of the input types and gives one of the output types.

    `facts` are compared by the rules: task, rows, and the task's data facts. `needs` are the dimensions of the
    data. `model` other than "auto" is one name or glob, and then only what is impossible is rejected. `config`
    is that of an existing network of this name.
    """
    machine = machine or profile.machine()
    speed = max(EFFICIENCY[precision] * flops for precision, flops in machine["flops"].items())
    able = [
        n
        for n in registry.names()
        if registry.card(n).input_type in input_types and set(registry.card(n).output_types) & set(output_types)
    ]
    needs = {"output_type": output_types, **needs}
    if model != "auto":
        option = considered(refuse_unable(model, able), facts, needs)
        if config is not None and option.name != model:
            option.name = model  # of no published size
        look_closer(option, facts, needs, speed, minutes, machine, config)
        return asked_for(option)
    # Counting a network's work takes long. So the most promising are looked at first, by published counts, and no more
    # once the rest could not come before them, whatever they cost.
    options = [considered(name, facts, needs) for name in able]
    most = [o.points - proportion(o.parameters, facts["rows"]) for o in options]  # that each could come to
    seen: list[Option] = []
    for option, points in sorted(zip(options, most), key=lambda pair: -pair[1]):
        best = sorted((o.points for o in seen if not o.rejected), reverse=True)
        if len(best) >= LOOKED_AT and points <= best[LOOKED_AT - 1]:
            break
        if sum(o.architecture == option.architecture and not o.rejected for o in seen) >= SIZES:
            continue  # better sizes of the same are there
        smaller = [o for o in seen if o.architecture == option.architecture and o.slow and o.parameters <= option.parameters]
        if smaller:
            option.rejected, option.slow = f"larger than {smaller[0].name}: {smaller[0].rejected}", True
        elif not option.rejected:
            look_closer(option, facts, needs, speed, minutes, machine)
        seen.append(option)
    if seen and all(o.rejected for o in seen):
        hurried(seen, minutes)
    ranked = sorted(seen, key=lambda o: (-o.points, o.parameters))
    return Advice([o for o in ranked if not o.rejected], [o for o in ranked if o.rejected])


def considered(name: str, facts: Mapping[str, Any], needs: Mapping[str, Any]) -> Option:
    """Return an option with the points of the rules and its published parameter count, without measuring its cost."""
    card, size = registry.find(name)
    option = Option(name, card.name)
    try:
        config = configured(card, size, needs)
        option.parameters = card.sizes[size].params or counted(card, config)
    except (DataError, SettingsError, TypeError, ValueError) as error:  # such as a network that reads no text
        option.rejected = str(error)
        return option
    for rule in rules():
        if holds(rule["when"], facts) and speaks_of(rule, card):
            option.points += rule["points"]
            (option.reasons if rule["points"] > 0 else option.against).append(f"{rule['because']} [{rule['source']}]")
    return option


def look_closer(
    option: Option,
    facts: Mapping[str, Any],
    needs: Mapping[str, Any],
    speed: float,
    minutes: float,
    machine: Mapping[str, Any],
    config: Any = None,
) -> None:
    """Count parameters and multiply-adds of the network as it is (`config`) or would be built for this data, and
    rate them.
    """
    card, size = registry.find(option.name)
    option.parameters, option.rejected = 0, ""
    try:
        config = configured(card, size, needs) if config is None else config
        option.parameters = counted(card, config)
        option.multiply_adds = profile.multiply_adds(
            card.name, config, length=facts.get("tokens", 64), side=facts.get("side", 224)
        )
    except (DataError, SettingsError, ValueError) as error:  # such as pictures too small for its pooling
        option.rejected = str(error)
        return
    size_up(option, facts, speed, minutes, machine)


def counted(card: Card, config: Any) -> int:
    with torch.device("meta"):
        return profile.parameters(card.make(config))


def proportion(parameters: int, rows: int) -> float:
    """Return the points lost for the size of the network: half a point for each factor of ten from the target."""
    return 0.5 * abs(math.log10(max(parameters, 1) / wanted(rows)))


def wanted(rows: int) -> float:
    """Return the number of parameters in proportion to the data."""
    return min(max(PARAMETERS * rows, 1e5), 1e8)


def size_up(option: Option, facts: Mapping[str, Any], speed: float, minutes: float, machine: Mapping[str, Any]) -> None:
    """Reject what cannot fit or finish, and prefer sizes in proportion to the data."""
    option.seconds = seconds = facts["rows"] * EPOCHS * 6 * option.multiply_adds / speed  # backward is twice forward
    if option.parameters * BYTES > 0.8 * machine["memory"]:
        option.seconds, option.slow = math.inf, True
        option.rejected = (
            f"training needs {option.parameters * BYTES / 2**30:.1f} GiB for weights and optimiser, the "
            f"machine has {machine['memory'] / 2**30:.1f} GiB"
        )
    elif seconds > EPOCHS * 60 * minutes / LEAST:
        option.slow = True
        option.rejected = (
            f"one pass over the data would take about {seconds / EPOCHS / 60:.2g} minutes of the {minutes:g} given"
        )
    elif seconds > 60 * minutes:
        option.points -= math.log2(seconds / (60 * minutes))
        option.against.append(f"{minutes:g} minutes are about {60 * minutes * EPOCHS / seconds:.1f} passes over the data: few")
    option.points -= proportion(option.parameters, facts["rows"])
    if option.parameters > 10 * wanted(facts["rows"]):
        option.against.append(
            f"{option.parameters:,} parameters are many for {facts['rows']:,} examples "
            "[guide, FAQ 'How do I choose the right model size': start small]"
        )


def hurried(options: list[Option], minutes: float) -> None:
    """If no network can see even part of the data in the given time, accept the best of the fast ones."""
    quickest = min(o.seconds for o in options)
    if quickest < math.inf:
        best = max((o for o in options if o.seconds <= HURRY * quickest), key=lambda o: o.points)
        best.against.insert(
            0, f"{minutes:g} minutes are short for this much data: {best.rejected}. More --minutes will score better"
        )
        best.rejected = ""


def refuse_unable(model: str, able: list[str]) -> str:
    """Return the option that the user named. Raises `SettingsError` if it cannot do this task."""
    card, size = registry.find(model)
    if size not in [*able, card.tiny]:
        others = sorted({registry.card(n).name for n in able})
        raise SettingsError(
            f"{model} takes {card.input_type} and gives {' or '.join(card.output_types)}, which this task cannot use. "
            f"Networks that can: {', '.join(others)}."
        )
    return size


def asked_for(option: Option) -> Advice:
    """Return the named option, rejected only if it is impossible."""
    option.reasons.insert(0, "you asked for it")
    if not option.parameters:
        raise SettingsError(
            f"{option.name} cannot be made for this data: {option.rejected}. Sizes come from the data; "
            "--set task.NAME=... and model.NAME=... change them."
        )
    if option.rejected:
        option.against.insert(0, option.rejected)
        option.rejected = ""
    return Advice([option], [])
