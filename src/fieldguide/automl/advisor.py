"""The advisor: ranks networks by rules (rules.toml) about data and machine, and by their cost, with reasons for each option.

An option is a size of an architecture together with an input size, such as the side of its images. Its points are a weighted sum: the
rules that match, minus the time that it lacks, minus its distance from a size in proportion to the data. The weights are in
rules.toml. Time counts twice, on this machine as measured and three times slower, so that an option that only just fits into the
time loses to one with a margin: another program may start while the network trains.
"""

from __future__ import annotations

import fnmatch
import functools
import math
import operator
import statistics
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from fieldguide.automl import profile
from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.models import registry
from fieldguide.models.initialization import make_on_meta

MIN_MEASURED_OPTIONS = 5  # number of the best options whose cost is measured
MAX_SIZES_PER_ARCHITECTURE = 3  # accepted sizes of one architecture
TARGET_EPOCHS = 8  # passes over the data in the given time; an option loses a point for each halving
# Fraction of the machine's matrix-product speed that training reaches; lower if memory bandwidth limits fast products.
EFFICIENCY = {"float32": 0.35, "bfloat16": 0.15}
BYTES_PER_PARAMETER = 16  # in training: weight, gradient and two moments in float32
PARAMETERS_PER_EXAMPLE = 200  # rough target for a network trained from random weights
MIN_EPOCHS = 0.2  # options that cannot make this fraction of a pass in the given time are rejected
SLOWDOWNS = (1, 3)  # factors by which the machine may be slower than measured; the points for time are the mean over them
MAX_ESTIMATE_ERROR = 20  # options with this many times as much time as they need are not measured
MAX_SLOWDOWN = 4  # if time is short for all options, those up to this many times slower than the fastest are considered
COMPARE = {"<": operator.lt, ">": operator.gt, "=": operator.eq}


@dataclass(frozen=True)
class Variant:
    """The data as a network gets it: the input size (0 for the one that the data suggests), facts for the rules, dimensions."""

    input_size: int
    facts: Mapping[str, Any]
    needs: Mapping[str, Any]
    shrinkage: float = 1.0  # factor from the input size that the data suggests to this one


@dataclass
class Option:
    """One size of one architecture for one input size: its points, the reasons for and against it, and why it was rejected
    (empty if not).
    """

    name: str
    architecture: str
    parameters: int = 0
    multiply_adds: int = 0  # of one example
    points: float = 0.0
    input_size: int = 0  # for example pixels per side; 0 for the one that the data suggests
    features: dict[str, float] = field(default_factory=dict)  # that the points are a weighted sum of
    example_seconds: float = math.inf  # of training with one example; estimated, or measured on this machine
    is_measured: bool = False  # whether `example_seconds` was measured
    reasons: list[str] = field(default_factory=list)
    against: list[str] = field(default_factory=list)
    rejected: str = ""
    slow: bool = False  # rejected for time or memory; larger sizes of the architecture are then rejected too
    seconds: float = math.inf  # estimated time of `TARGET_EPOCHS` passes over the data; infinite if impossible


Measure = Callable[[Option, Variant], float | None]


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
def read_rules() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("rules.toml").read_text(encoding="utf-8"))


def load_rules() -> list[dict[str, Any]]:
    return read_rules()["rule"]


def get_cost_weights() -> dict[str, float]:
    """Return the points for each unit of the features "shortage", "size" and "input_size"."""
    return read_rules()["cost"]


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
    if needs.get("embedding") and not (card.accepts("embedding") or adapted):
        raise SettingsError(f"{card.name} reads no embeddings, but task.unclip generates from them")
    needs = {k: v for k, v in needs.items() if card.accepts(k)}
    if "output_type" in needs:
        needs["output_type"] = next(given for given in needs["output_type"] if given in card.output_types)
    return card.resolve_config(size, **needs | dict(adapted) | dict(changes))


def rank_networks(
    *,
    variants: Sequence[Variant],
    input_types: tuple[str, ...],
    output_types: tuple[str, ...],
    minutes: float,
    machine: Mapping[str, Any] | None = None,
    model: str = "auto",
    config: Any = None,
    measure: Measure | None = None,
    counting_seconds: float = math.inf,
) -> Advice:
    """Rank every size of every architecture that takes one of the input types and gives one of the output types.

    Args:
        variants: the data for each input size, the one that the data suggests first. Smaller ones are only considered for networks
            that are short of time.
        minutes: of training.
        model: "auto", or the name of a size, which is then only rejected if it is impossible, or of an architecture, whose sizes
            are then ranked.
        config: that of an existing network of this name.
        measure: returns the seconds of training with one example of the best options, on this machine; None to estimate them from
            multiply-adds.
        counting_seconds: limit for counting the costs of options. When it is over, those that were not counted are not considered.
    """
    machine = machine or profile.measure_machine()
    able = [
        n
        for n in registry.names()
        if registry.card(n).input_type in input_types and set(registry.card(n).output_types) & set(output_types)
    ]
    variants = [replace(v, needs={"output_type": output_types, **v.needs}) for v in variants]
    first = variants[0]
    judge = Judge(variants, get_speed(machine), minutes, machine, time.monotonic() + counting_seconds)
    if config is None and registry.is_architecture(model):
        resolve_size(model, able)
        able = [name for name in able if registry.card(name).name == model]
    elif model == "auto":
        # Baselines are compared with the choice later, unless the task has no other models.
        able = [name for name in able if not registry.card(name).solver] or able
    elif model != "auto":
        option = judge.rate(resolve_size(model, able), first, config)
        if config is not None and option.name != model:
            option.name = model  # the existing network has no published size
        return advise_requested(option)
    seen = judge.rank(able)
    if measure is not None and minutes < math.inf:
        seen = judge.measure(seen, measure)
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


class Judge:
    """Rates options for some data, machine and time.

    `deadline` is the moment on `time.monotonic` at which counting costs stops. `factors` are how much slower than estimated a
    network trains, by name; `factor` holds for all others.
    """

    def __init__(
        self, variants: Sequence[Variant], speed: float, minutes: float, machine: Mapping[str, Any], deadline: float = math.inf
    ):
        self.variants, self.speed, self.minutes, self.machine, self.deadline = variants, speed, minutes, machine, deadline
        self.factors: dict[str, float] = {}
        self.factor = 1.0
        self.configs: dict[tuple[str, int], Any] = {}  # of the options, by name and input size

    def rank(self, names: Sequence[str]) -> list[Option]:
        """Return the options that may be among the best, with their costs.

        Counting the cost of a network is slow. Options are therefore counted in the order of the points that they can reach, and
        counting stops when the remaining ones cannot be ranked before those counted.
        """
        options = [rate_by_rules(name, self.variants[0]) for name in names]
        rows = self.variants[0].facts["rows"]
        most = [o.points - compute_size_penalty(o.parameters, rows) for o in options]  # upper bound for each option
        seen: list[Option] = []
        for option, points in sorted(zip(options, most), key=lambda pair: -pair[1]):
            best = sorted((o.points for o in seen if not o.rejected), reverse=True)
            if len(best) >= MIN_MEASURED_OPTIONS and points <= best[MIN_MEASURED_OPTIONS - 1]:
                break
            if best and self.is_late():
                break
            if sum(o.architecture == option.architecture and not o.rejected for o in seen) >= MAX_SIZES_PER_ARCHITECTURE:
                continue  # better sizes of the architecture are accepted already
            smaller = [
                o for o in seen if o.architecture == option.architecture and o.slow and o.parameters <= option.parameters
            ]
            if smaller:
                option.rejected, option.slow = f"larger than {smaller[0].name}: {smaller[0].rejected}", True
            elif not option.rejected:
                option = self.choose_input(option.name)
                twins = [o.name for o in seen if self.is_same_network(o, option)]
                if twins:
                    option.rejected = f"the same network as {twins[0]} for this data"
            seen.append(option)
        return seen

    def measure(self, seen: list[Option], measure: Measure) -> list[Option]:
        """Return the options with costs as measured for the best of them; the others get the median factor."""
        able = [o for o in seen if o.multiply_adds and (not o.rejected or o.slow)]
        able = sorted(able, key=lambda o: (bool(o.rejected), -o.points))[:MIN_MEASURED_OPTIONS]
        if all(self.is_certain(option) for option in able):
            return seen
        for option in able:
            variant = next(v for v in self.variants if v.input_size == option.input_size)
            if (seconds := measure(option, variant)) is not None:
                self.factors[option.name] = seconds / self.estimate_seconds(option)
        if not self.factors:
            return seen
        self.factor = statistics.median(self.factors.values())
        costly = {o.name for o in seen if o.multiply_adds and (not o.rejected or o.slow)}
        return [self.choose_input(o.name) if o.name in costly else o for o in seen]

    def is_same_network(self, one: Option, other: Option) -> bool:
        """Return whether two options differ in their names only: the data sets all dimensions in which their sizes differ."""
        configs = [self.configs.get((o.name, o.input_size)) for o in (one, other)]
        same_kind = (one.architecture, one.input_size) == (other.architecture, other.input_size)
        return same_kind and None not in configs and configs[0] == configs[1]

    def is_late(self) -> bool:
        """Return whether the time for counting costs is over."""
        return time.monotonic() > self.deadline

    def is_certain(self, option: Option) -> bool:
        """Return whether an option has plenty of time, so that its time need not be measured."""
        return option.seconds * MAX_ESTIMATE_ERROR < 60 * self.minutes

    def choose_input(self, name: str) -> Option:
        """Return a network with the input size that gives it the most points: a smaller one only if time is short.

        The cost of smaller inputs is estimated from their area; that of the chosen one is counted.
        """
        whole = self.rate(name, self.variants[0])
        found = [whole]
        for variant in self.variants[1:]:
            if not found[-1].features.get("shortage"):
                break
            costs = whole.parameters, int(whole.multiply_adds * variant.shrinkage**2)
            found.append(self.rate(name, variant, costs=costs))
        best = max(found, key=lambda o: (not o.rejected, o.points))
        if best is whole:
            return whole
        counted = self.rate(name, self.variants[found.index(best)])
        return counted if counted.multiply_adds else whole  # an input can be too small for a network

    def rate(self, name: str, variant: Variant, config: Any = None, costs: tuple[int, int] | None = None) -> Option:
        """Return an option with the parameters and multiply-adds of the network as it is (`config`), or as built for this data,
        and the points for its size and cost. `costs` are estimated parameters and multiply-adds.
        """
        option, facts = rate_by_rules(name, variant), variant.facts
        card, size = registry.find(name)
        option.parameters, option.rejected = 0, ""
        try:
            config = build_config(card, size, variant.needs) if config is None else config
            self.configs[name, variant.input_size] = config
            if costs is not None:
                option.parameters, option.multiply_adds = costs
            elif card.solver:  # those are cheap, and their lookups and sums are not counted
                option.parameters = count_parameters(card, config)
            else:
                option.parameters, option.multiply_adds = profile.count_costs(
                    card.name, config, length=facts.get("tokens", 64), side=facts.get("side", 224)
                )
        except (DataError, SettingsError, ValueError) as error:  # for example, images too small for its pooling
            option.rejected = str(error)
            return option
        option.is_measured = name in self.factors
        option.example_seconds = self.estimate_seconds(option) * self.factors.get(name, self.factor)
        self.rate_cost(option, facts)
        return option

    def estimate_seconds(self, option: Option) -> float:
        """Return the seconds of training with one example, from its multiply-adds; a backward pass is two forward passes."""
        return 6 * option.multiply_adds / self.speed

    def rate_cost(self, option: Option, facts: Mapping[str, Any]) -> None:
        """Reject what cannot fit or finish, and prefer sizes in proportion to the data."""
        minutes, memory = self.minutes, self.machine["memory"]
        epoch = facts["rows"] * option.example_seconds
        option.seconds = seconds = TARGET_EPOCHS * epoch
        shortage = compute_shortage(seconds, 60 * minutes)
        if option.parameters * BYTES_PER_PARAMETER > 0.8 * memory:
            option.seconds, option.slow = math.inf, True
            option.rejected = (
                f"training needs {option.parameters * BYTES_PER_PARAMETER / 2**30:.1f} GiB for weights and optimizer, the "
                f"machine has {memory / 2**30:.1f} GiB"
            )
        elif epoch > 60 * minutes / MIN_EPOCHS:
            option.slow = True
            option.rejected = f"one pass over the data would take about {epoch / 60:.2g} minutes of the {minutes:.2g} given"
        elif seconds > 60 * minutes:
            option.against.append(f"{minutes:.2g} minutes allow only about {60 * minutes / epoch:.1f} passes over the data")
        elif shortage:
            option.against.append(
                f"{60 * minutes / epoch:.0f} passes over the data fit into the time, but only {20 * minutes / epoch:.1f} if the "
                "machine is three times slower than measured"
            )
        add_points(option, "shortage", shortage)
        add_points(option, "size", compute_size_distance(option.parameters, facts["rows"]))
        if option.parameters > 10 * get_target_parameters(facts["rows"]):
            option.against.append(
                f"{option.parameters:,} parameters are many for {facts['rows']:,} examples "
                "[guide, FAQ 'How do I choose the right model size': start small]"
            )


def rate_by_rules(name: str, variant: Variant) -> Option:
    """Return an option with the points of the rules and its published parameter count, without counting its cost."""
    card, size = registry.find(name)
    option = Option(name, card.name, input_size=variant.input_size)
    try:
        config = build_config(card, size, variant.needs)
        option.parameters = card.sizes[size].params or count_parameters(card, config)
    except (DataError, SettingsError, TypeError, ValueError) as error:  # for example, a network that reads no text
        option.rejected = str(error)
        return option
    for rule in load_rules():
        if match_facts(rule["when"], variant.facts) and match_card(rule, card):
            option.points += rule["points"]
            option.features[rule["id"]] = 1.0
            (option.reasons if rule["points"] > 0 else option.against).append(f"{rule['because']} [{rule['source']}]")
    if variant.shrinkage < 1:
        add_points(option, "input_size", -math.log2(variant.shrinkage))
        option.reasons.append(f"a smaller input ({variant.input_size}) leaves time for more passes over the data")
    return option


def add_points(option: Option, feature: str, value: float) -> None:
    """Add a feature of the cost to an option, with its weight."""
    option.features[feature] = value
    option.points += get_cost_weights()[feature] * value


def count_parameters(card: Card, config: Any) -> int:
    return profile.count_parameters(make_on_meta(card, config))


def compute_shortage(seconds: float, limit: float) -> float:
    """Return how often the time must be doubled for `TARGET_EPOCHS` passes, the mean over `SLOWDOWNS`."""
    if limit == math.inf:
        return 0.0
    return statistics.mean(max(0.0, math.log2(slowdown * max(seconds, 1e-9) / limit)) for slowdown in SLOWDOWNS)


def compute_size_distance(parameters: int, rows: int) -> float:
    """Return the factors of ten between the size of the network and the size in proportion to the data."""
    return abs(math.log10(max(parameters, 1) / get_target_parameters(rows)))


def compute_size_penalty(parameters: int, rows: int) -> float:
    """Return the points lost for the size of the network."""
    return -get_cost_weights()["size"] * compute_size_distance(parameters, rows)


def get_target_parameters(rows: int) -> float:
    """Return the number of parameters in proportion to the data."""
    return min(max(PARAMETERS_PER_EXAMPLE * rows, 1e5), 1e8)


def accept_fastest(options: list[Option], minutes: float) -> None:
    """Accept the best of the fastest options if all were rejected for time or memory."""
    quickest = min(o.seconds for o in options)
    if quickest < math.inf:
        best = max((o for o in options if o.seconds <= MAX_SLOWDOWN * quickest), key=lambda o: o.points)
        best.against.insert(
            0, f"{minutes:.2g} minutes are too few for this much data: {best.rejected}. A larger --minutes gives better scores"
        )
        best.rejected = ""


def resolve_size(model: str, able: list[str]) -> str:
    """Return the size that the user named. Raises `SettingsError` if it cannot do this task."""
    card, size = registry.find(model)
    others = sorted({registry.card(n).name for n in able})
    if size not in able and (size != card.tiny or card.name not in others):
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
