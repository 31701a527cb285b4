"""Replay policies that choose a network on recorded learning curves: rules alone, the race, and dropping after a number of passes.

    python benchmarks/replay_race.py [--curves FILE]

Each contest is a data set and a number of training rows. The truth is the score of each network after the longest training. A policy
sees scores of that training up to the time that it spends, and picks a network. Printed are, for each policy, how often the pick is
within one standard error of the best network, its mean regret in standard errors, and its cost as a fraction of training all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from fit_rules import CURVES, compute_features, load_curves
from scipy.stats import norm

from fieldguide.automl import advisor, race

CORRELATION = 0.5  # of the errors of two networks on the same rows
EPOCHS = (1, 4)  # passes after which the constant policies drop all but the best


def score_at(line: dict[str, Any], seconds: float) -> float:
    """Return the best skill that validation had shown by then; the first one if none is that early."""
    sign = 1 if line["better"] == "max" else -1
    seen = [value for when, value in line["curve"] if when <= seconds] or [line["curve"][0][1]]
    best = max(seen, key=lambda value: sign * value)
    scale = line["skill"] / (line["score"] - trivial) if (trivial := get_trivial(line)) != line["score"] else 0.0
    return (best - trivial) * scale


def get_trivial(line: dict[str, Any]) -> float:
    sign = 1 if line["better"] == "max" else -1
    return max(line["trivial"].values(), key=lambda value: sign * value)


def pick_by_rules(lines: list[dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """Return the network with the most points, at no cost."""
    return max(lines, key=lambda line: line["points"]), 0.0


def pick_after_epochs(lines: list[dict[str, Any]], epochs: int) -> tuple[dict[str, Any], float]:
    """Return the best network after a constant number of passes over the data, and the cost."""
    passes = {id(line): epochs * line["rows"] * line["seconds"] / (line["steps"] * line["batch"]) for line in lines}
    cost = sum(min(passes[id(line)], line["budget"]) for line in lines)
    return max(lines, key=lambda line: score_at(line, passes[id(line)])), cost


def pick_by_race(lines: list[dict[str, Any]], rules: race.Rules = race.LONG) -> tuple[dict[str, Any], float]:
    """Return the winner of the race as `fit` runs it, and the time that all networks but the winner took."""
    ranked = sorted(lines, key=lambda line: -line["points"])
    alive = [line for line in ranked if line["points"] >= ranked[0]["points"] - rules.points][: rules.contenders]
    spent, cost = {id(line): 0.0 for line in alive}, 0.0
    for fraction in rules.rounds:
        for line in alive:
            spent[id(line)] += fraction * line["budget"]
            cost += fraction * line["budget"]
        scores = {id(line): score_at(line, spent[id(line)]) for line in alive}
        leader = max(alive, key=lambda line: scores[id(line)])
        better = {}
        for line in alive:
            error = np.hypot(line["skill_error"], leader["skill_error"]) * np.sqrt(1 - CORRELATION)
            better[id(line)] = norm.cdf((scores[id(line)] - scores[id(leader)]) / error)
        alive = [line for line in alive if line is leader or better[id(line)] >= race.MIN_PROBABILITY]
        if len(alive) == 1:
            break
    return max(alive, key=lambda line: score_at(line, spent[id(line)])), cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES)
    curves = [line for line in load_curves(parser.parse_args().curves) if not line["solver"] and line["curve"]]
    weights = {rule["id"]: rule["points"] for rule in advisor.load_rules()} | advisor.get_cost_weights()
    for line in curves:
        line["points"] = sum(weights.get(name, 0.0) * value for name, value in compute_features(line).items())
    longest = max(line["budget"] for line in curves)
    contests: dict[tuple, list] = {}
    for line in curves:
        if line["budget"] == longest:
            contests.setdefault((line["data"], line["rows"]), []).append(line)
    contests = {key: lines for key, lines in contests.items() if len(lines) > 1}
    policies: dict[str, Any] = {"rules": pick_by_rules, "race": pick_by_race}
    policies["short race"] = lambda lines: pick_by_race(lines, race.SHORT)
    policies |= {f"after {n} passes": lambda lines, n=n: pick_after_epochs(lines, n) for n in EPOCHS}
    print(f"{len(contests)} contests of {longest:.0f} s")
    for name, policy in policies.items():
        regrets, costs = [], []
        for lines in contests.values():
            pick, cost = policy(lines)
            best = max(lines, key=lambda line: line["skill"])
            regrets.append((best["skill"] - pick["skill"]) / max(best["skill_error"], pick["skill_error"]))
            costs.append(cost / (longest * len(lines)))
        close = np.mean([regret <= 1 for regret in regrets])
        print(
            f"{name:16} within one error {close:4.0%}, regret {np.mean(regrets):.2f} errors, cost {np.mean(costs):.0%} of training all"
        )


if __name__ == "__main__":
    main()
