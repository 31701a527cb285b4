"""The advisor: ranks architectures by rules (rules.toml) about data and machine, with reasons for each option."""

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

MIN_MEASURED_OPTIONS = 5  # number of the best options whose cost is measured
MAX_SIZES_PER_ARCHITECTURE = 3  # accepted sizes of one architecture
TARGET_EPOCHS = 8  # passes over the data in the given time; an option loses a point for each halving
# Fraction of the machine's matrix-product speed that training reaches; lower if memory bandwidth limits fast products.
EFFICIENCY = {"float32": 0.35, "bfloat16": 0.15}
BYTES_PER_PARAMETER = 16  # in training: weight, gradient and two moments in float32
PARAMETERS_PER_EXAMPLE = 200  # rough target for a network trained from random weights
MIN_EPOCHS = 0.2  # options that cannot make this fraction of a pass in the given time are rejected
MAX_SLOWDOWN = 4  # if time is short for all options, those up to this many times slower than the fastest are considered
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
    slow: bool = False  # rejected for time or memory; larger sizes of the architecture are then rejected too
    seconds: float = math.inf  # estimated time of `TARGET_EPOCHS` passes over the data; infinite if impossible


@dataclass
class Advice:
    """Accepted options in order of preference, and the rejected ones."""

    options: list[Option]
    rejected: list[Option]

    @property
    def best(self) -> Option:
        if not self.options:
            why = "; ".join(f"{o.name}: {o.rejected}" for o in self.rejected[:5])
            raise SettingsError(f"no network suits this data and machine ({why}). Raise --minutes or choose one with --model.")
        return self.options[0]


@functools.cache
def load_rules() -> list[dict[str, Any]]:
    return tomllib.loads(files(__package__).joinpath("rules.toml").read_text(encoding="utf-8"))["rule"]


def match_facts(when: Mapping[str, str], facts: Mapping[str, Any]) -> bool:
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


def match_card(rule: Mapping[str, Any], card: Card) -> bool:
    return any(
        fnmatch.fnmatch(card.family if kind == "family" else card.name, pattern)
        for kind, _, pattern in ((p.partition(":") if ":" in p else ("name", "", p)) for p in rule["for"])
    )


def build_config(card: Card, size: str, needs: Mapping[str, Any], changes: Mapping[str, Any] = {}) -> Any:
    """Return the config of a size for the dimensions of the data, then the user's own fields.

    A network with several heads gets the first output type of the task that it supports. Raises `TypeError` for
    unknown fields, and `SettingsError` for a network that reads no text if the data has text.
    """
    if needs.get("vocab_size") and not card.accepts("vocab_size"):
        raise SettingsError(f"{card.name} reads no text, but this data has texts")
    adapted = card.adapt(needs) if card.adapt else {}
    needs = {k: v for k, v in needs.items() if card.accepts(k)}
    if "output_type" in needs:
        needs["output_type"] = next(given for given in needs["output_type"] if given in card.output_types)
    return card.resolve_config(size, **needs | dict(adapted) | dict(changes))


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
    data. `model` other than "auto" is the name of a size, which is then only rejected if it is impossible, or of an
    architecture, whose sizes are then ranked. `config` is that of an existing network of this name.
    """
    machine = machine or profile.measure_machine()
    speed = get_speed(machine)
    able = [
        n
        for n in registry.names()
        if registry.card(n).input_type in input_types and set(registry.card(n).output_types) & set(output_types)
    ]
    needs = {"output_type": output_types, **needs}
    if config is None and registry.is_architecture(model):
        resolve_size(model, able)
        able = [name for name in able if registry.card(name).name == model]
    elif model == "auto":
        able = [name for name in able if not registry.card(name).solver]  # baselines are compared with the choice later
    elif model != "auto":
        option = rate_by_rules(resolve_size(model, able), facts, needs)
        if config is not None and option.name != model:
            option.name = model  # the existing network has no published size
        measure_cost(option, facts, needs, speed, minutes, machine, config)
        return advise_requested(option)
    # Measuring the cost of a network is slow. Options are therefore measured in the order of the points that they can
    # reach, and measuring stops when the remaining ones cannot be ranked before those measured.
    options = [rate_by_rules(name, facts, needs) for name in able]
    most = [o.points - compute_size_penalty(o.parameters, facts["rows"]) for o in options]  # upper bound for each option
    seen: list[Option] = []
    for option, points in sorted(zip(options, most), key=lambda pair: -pair[1]):
        best = sorted((o.points for o in seen if not o.rejected), reverse=True)
        if len(best) >= MIN_MEASURED_OPTIONS and points <= best[MIN_MEASURED_OPTIONS - 1]:
            break
        if sum(o.architecture == option.architecture and not o.rejected for o in seen) >= MAX_SIZES_PER_ARCHITECTURE:
            continue  # better sizes of the architecture are accepted already
        smaller = [o for o in seen if o.architecture == option.architecture and o.slow and o.parameters <= option.parameters]
        if smaller:
            option.rejected, option.slow = f"larger than {smaller[0].name}: {smaller[0].rejected}", True
        elif not option.rejected:
            measure_cost(option, facts, needs, speed, minutes, machine)
        seen.append(option)
    if seen and all(o.rejected for o in seen):
        accept_fastest(seen, minutes)
    if model != "auto":
        for option in seen:
            option.reasons.insert(0, "architecture requested by the user; the size fits data, machine and time")
    ranked = sorted(seen, key=lambda o: (-o.points, o.parameters))
    return Advice([o for o in ranked if not o.rejected], [o for o in ranked if o.rejected])


def get_speed(machine: Mapping[str, Any]) -> float:
    """Return the floating-point operations per second that training reaches, in the fastest precision."""
    return max(EFFICIENCY[precision] * flops for precision, flops in machine["flops"].items())


def rate_by_rules(name: str, facts: Mapping[str, Any], needs: Mapping[str, Any]) -> Option:
    """Return an option with the points of the rules and its published parameter count, without measuring its cost."""
    card, size = registry.find(name)
    option = Option(name, card.name)
    try:
        config = build_config(card, size, needs)
        option.parameters = card.sizes[size].params or count_parameters(card, config)
    except (DataError, SettingsError, TypeError, ValueError) as error:  # for example, a network that reads no text
        option.rejected = str(error)
        return option
    for rule in load_rules():
        if match_facts(rule["when"], facts) and match_card(rule, card):
            option.points += rule["points"]
            (option.reasons if rule["points"] > 0 else option.against).append(f"{rule['because']} [{rule['source']}]")
    return option


def measure_cost(
    option: Option,
    facts: Mapping[str, Any],
    needs: Mapping[str, Any],
    speed: float,
    minutes: float,
    machine: Mapping[str, Any],
    config: Any = None,
) -> None:
    """Count parameters and multiply-adds of the network as it is (`config`), or as built for this data, and
    add points for its size and cost.
    """
    card, size = registry.find(option.name)
    option.parameters, option.rejected = 0, ""
    try:
        config = build_config(card, size, needs) if config is None else config
        option.parameters = count_parameters(card, config)
        if not card.solver:  # those are cheap, and their lookups and sums are not counted
            option.multiply_adds = profile.count_multiply_adds(
                card.name, config, length=facts.get("tokens", 64), side=facts.get("side", 224)
            )
    except (DataError, SettingsError, ValueError) as error:  # for example, images too small for its pooling
        option.rejected = str(error)
        return
    rate_cost(option, facts, speed, minutes, machine)


def count_parameters(card: Card, config: Any) -> int:
    with torch.device("meta"):
        return profile.count_parameters(card.make(config))


def compute_size_penalty(parameters: int, rows: int) -> float:
    """Return the points lost for the size of the network: half a point for each factor of ten from the target."""
    return 0.5 * abs(math.log10(max(parameters, 1) / get_target_parameters(rows)))


def get_target_parameters(rows: int) -> float:
    """Return the number of parameters in proportion to the data."""
    return min(max(PARAMETERS_PER_EXAMPLE * rows, 1e5), 1e8)


def rate_cost(option: Option, facts: Mapping[str, Any], speed: float, minutes: float, machine: Mapping[str, Any]) -> None:
    """Reject what cannot fit or finish, and prefer sizes in proportion to the data."""
    option.seconds = seconds = facts["rows"] * TARGET_EPOCHS * 6 * option.multiply_adds / speed  # backward is twice forward
    if option.parameters * BYTES_PER_PARAMETER > 0.8 * machine["memory"]:
        option.seconds, option.slow = math.inf, True
        option.rejected = (
            f"training needs {option.parameters * BYTES_PER_PARAMETER / 2**30:.1f} GiB for weights and optimizer, the "
            f"machine has {machine['memory'] / 2**30:.1f} GiB"
        )
    elif seconds > TARGET_EPOCHS * 60 * minutes / MIN_EPOCHS:
        option.slow = True
        option.rejected = (
            f"one pass over the data would take about {seconds / TARGET_EPOCHS / 60:.2g} minutes of the {minutes:g} given"
        )
    elif seconds > 60 * minutes:
        option.points -= math.log2(seconds / (60 * minutes))
        option.against.append(
            f"{minutes:g} minutes allow only about {60 * minutes * TARGET_EPOCHS / seconds:.1f} passes over the data"
        )
    option.points -= compute_size_penalty(option.parameters, facts["rows"])
    if option.parameters > 10 * get_target_parameters(facts["rows"]):
        option.against.append(
            f"{option.parameters:,} parameters are many for {facts['rows']:,} examples "
            "[guide, FAQ 'How do I choose the right model size': start small]"
        )


def accept_fastest(options: list[Option], minutes: float) -> None:
    """Accept the best of the fastest options if all were rejected for time or memory."""
    quickest = min(o.seconds for o in options)
    if quickest < math.inf:
        best = max((o for o in options if o.seconds <= MAX_SLOWDOWN * quickest), key=lambda o: o.points)
        best.against.insert(
            0, f"{minutes:g} minutes are too few for this much data: {best.rejected}. A larger --minutes gives better scores"
        )
        best.rejected = ""


def resolve_size(model: str, able: list[str]) -> str:
    """Return the size that the user named. Raises `SettingsError` if it cannot do this task."""
    card, size = registry.find(model)
    if size not in [*able, card.tiny]:
        others = sorted({registry.card(n).name for n in able})
        raise SettingsError(
            f"{model} takes {card.input_type} and gives {' or '.join(card.output_types)}, which this task cannot use. "
            f"Networks that can: {', '.join(others)}."
        )
    return size


def advise_requested(option: Option) -> Advice:
    """Return the advice for a named option, which is only rejected if it is impossible."""
    option.reasons.insert(0, "requested by the user")
    if not option.parameters:
        raise SettingsError(
            f"{option.name} cannot be built for this data: {option.rejected}. "
            "Change its dimensions with --set task.NAME=... or model.NAME=..."
        )
    if option.rejected:
        option.against.insert(0, option.rejected)
        option.rejected = ""
    return Advice([option], [])
