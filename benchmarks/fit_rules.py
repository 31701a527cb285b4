"""Fit the weights of the advisor's rules to recorded learning curves, and write the table that expected scores come from.

    python benchmarks/fit_rules.py [--write]

For each data set, number of rows and budget, two networks make a pair: how probable it is that one has the higher score follows from
their scores and standard errors. The weights maximize the likelihood of these probabilities under a logistic model of the difference
in points, with a penalty for the distance from the prior weights in rules.toml. The strength of the penalty is chosen by leaving
out one data set at a time: the strongest whose loss is within one standard error of the lowest, since losses of few data sets are
noisy. With --write, `points` and [cost] in rules.toml, and evidence.csv, are replaced.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm

from fieldguide.automl import advisor, evidence
from fieldguide.core.errors import SettingsError
from fieldguide.models import registry

HERE = Path(__file__).parent
CURVES = HERE / "learning_curves.jsonl"
RULES = HERE.parent / "src/fieldguide/automl/rules.toml"
EVIDENCE = HERE.parent / "src/fieldguide/automl/evidence.csv"
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # from weak to strong
FIXED = {"input_size"}  # weights without evidence in the curves
MIN_ERROR = 0.002  # standard error of a skill at least, so that ties on few rows do not count as certain


def load_curves(path: Path) -> list[dict[str, Any]]:
    """Return the trainings of networks with a score, with their skill and its standard error."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = []
    for line in lines:
        if line.get("score") is None or not math.isfinite(line["score"]) or not line["trivial"]:
            continue
        sign = 1 if line["better"] == "max" else -1
        trivial = max(line["trivial"].values(), key=lambda s: sign * s)
        perfect = evidence.get_perfect(line["better"], (line["score"], trivial))
        if perfect == trivial:
            continue
        line["skill"] = evidence.to_skill(line["score"], trivial, line["better"])
        line["skill_error"] = max(abs(line["error"] / (perfect - trivial)), MIN_ERROR)
        line["architecture"] = registry.find(line["model"])[0].name
        found.append(line)
    for line in found:
        solved = [other["skill"] for other in found if other["solver"] and make_key(other) == make_key(line)]
        line["baseline"] = round(max(solved), 4) if solved else None
    return found


def make_key(line: dict[str, Any]) -> tuple[str, int]:
    return line["data"], line["rows"]


def compute_features(line: dict[str, Any]) -> dict[str, float]:
    """Return the features of the advisor for a training, with the time that it really took."""
    card, _ = registry.find(line["model"])
    facts = {"task": line["task"], "rows": line["rows"], **line["facts"]}
    found = {
        rule["id"]: 1.0
        for rule in advisor.load_rules()
        if advisor.match_facts(rule["when"], facts) and advisor.match_card(rule, card)
    }
    example = line["seconds"] / (line["steps"] * line["batch"])
    needed = advisor.TARGET_EPOCHS * line["rows"] * example
    found["shortage"] = advisor.compute_shortage(needed, line["budget"])
    found["size"] = advisor.compute_size_distance(line["parameters"], line["rows"])
    return found


def group(curves: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Return the trainings of networks that compete: the same data, rows and budget."""
    groups = defaultdict(list)
    for line in curves:
        if not line["solver"]:
            groups[line["data"], line["rows"], line["budget"]].append(line)
    return {key: lines for key, lines in groups.items() if len(lines) > 1}


def build_pairs(groups: dict[tuple, list], names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return feature differences, probabilities that the first is better, weights, and the data set of each pair."""
    x, p, w, data = [], [], [], []
    for key, lines in groups.items():
        vectors = [np.array([line["features"].get(name, 0.0) for name in names]) for line in lines]
        pairs = list(combinations(range(len(lines)), 2))
        for i, j in pairs:
            a, b = lines[i], lines[j]
            x.append(vectors[i] - vectors[j])
            p.append(norm.cdf((a["skill"] - b["skill"]) / math.hypot(a["skill_error"], b["skill_error"])))
            w.append(1 / len(pairs))
            data.append(key[0])
    return np.array(x), np.array(p), np.array(w), np.array(data)


def fit(x: np.ndarray, p: np.ndarray, w: np.ndarray, prior: np.ndarray, penalty: float, free: np.ndarray) -> np.ndarray:
    def loss(change: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ (prior + change * free)
        value = (w * (np.logaddexp(0, -z) * p + np.logaddexp(0, z) * (1 - p))).sum() + penalty * (change**2).sum()
        gradient = x.T @ (w * (1 / (1 + np.exp(-np.clip(z, -50, 50))) - p)) * free + 2 * penalty * change
        return value, gradient

    return prior + minimize(loss, np.zeros_like(prior), jac=True, method="L-BFGS-B").x * free


def measure_regret(groups: dict[tuple, list], names: list[str], weights: Any) -> tuple[float, float, float]:
    """Return mean regret in skill, the fraction of picks within one standard error of the best, and the mean rank of the pick.

    `weights` returns the weights for a data set.
    """
    regrets, close, ranks = [], [], []
    for key, lines in groups.items():
        w = weights(key[0])
        points = [sum(w[names.index(n)] * v for n, v in line["features"].items() if n in names) for line in lines]
        best, pick = max(line["skill"] for line in lines), lines[int(np.argmax(points))]
        regrets.append(best - pick["skill"])
        close.append(best - pick["skill"] <= pick["skill_error"])
        ranks.append(1 + sum(line["skill"] > pick["skill"] for line in lines))
    return float(np.mean(regrets)), float(np.mean(close)), float(np.mean(ranks))


def measure_expectations(curves: list[dict[str, Any]]) -> tuple[float, float, int]:
    """Return the median error of expected skills for data sets left out, the coverage of the 80 % range, and their number."""
    trainings = [to_training(line) for line in curves if not line["solver"]]
    errors, inside = [], []
    for own in trainings:
        others = [t for t in trainings if t.data != own.data]
        found = evidence.expect(own.task, own.model, own.architecture, own.rows, own.examples, own.baseline, others)
        if found:
            errors.append(abs(found.median - own.skill))
            inside.append(found.low <= own.skill <= found.high)
    return float(np.median(errors)) if errors else math.nan, float(np.mean(inside)) if inside else math.nan, len(errors)


def to_training(line: dict[str, Any]) -> evidence.Training:
    examples = max(line["steps"] * line["batch"], line["rows"] if line["solver"] else 1)
    return evidence.Training(
        line["data"],
        line["task"],
        line["model"],
        line["architecture"],
        line["rows"],
        examples,
        round(line["skill"], 4),
        line["baseline"],
    )


def write_rules(names: list[str], weights: np.ndarray) -> None:
    """Write the weights into rules.toml; the prior of each rule stays."""
    values, text = dict(zip(names, weights.tolist())), RULES.read_text(encoding="utf-8")
    for rule in advisor.load_rules():
        value = f"points = {values.get(rule['id'], rule['points']):.2f}"
        prior = rule.get("prior", rule["points"])
        pattern = rf'(id = "{rule["id"]}"\n(?:(?!\[\[rule\]\]).*\n)*?)points = .*\n(?:prior = .*\n)?'
        text, count = re.subn(pattern, lambda m, v=value, p=prior: f"{m[1]}{v}\nprior = {p}\n", text)
        assert count == 1, rule["id"]
    for name, old in advisor.get_cost_weights().items():
        text = re.sub(rf"^{name} = [-.\d]+", f"{name} = {values.get(name, old):.2f}", text, flags=re.M)
    RULES.write_text(text, encoding="utf-8")


def write_evidence(curves: list[dict[str, Any]]) -> None:
    with open(EVIDENCE, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("data", "task", "model", "architecture", "rows", "examples", "skill", "baseline"))
        for t in (to_training(line) for line in curves if not line["solver"]):
            writer.writerow((t.data, t.task, t.model, t.architecture, t.rows, int(t.examples), t.skill, t.baseline))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--curves", type=Path, default=CURVES)
    arguments = parser.parse_args()
    curves = load_curves(arguments.curves)
    for line in curves:
        if not line["solver"]:
            line["features"] = compute_features(line)
    groups = group(curves)
    rules, cost = advisor.load_rules(), advisor.get_cost_weights()
    names = [rule["id"] for rule in rules] + list(cost)
    # The weights of the cost have no prior other than their first values, which the text of rules.toml names.
    prior = np.array([rule.get("prior", rule["points"]) for rule in rules] + [PRIOR_COST[name] for name in cost], dtype=float)
    free = np.array([name not in FIXED for name in names], dtype=float)
    x, p, w, data = build_pairs(groups, names)
    print(f"{len(curves)} trainings, {len(groups)} contests of {len(set(data))} data sets, {len(p)} pairs")
    losses: dict[float, np.ndarray] = {}  # penalty -> loss of each data set that is left out
    for penalty in PENALTIES:
        left_out = {d: fit(*(v[data != d] for v in (x, p, w)), prior, penalty, free) for d in set(data)}
        z = np.array([row @ left_out[d] for row, d in zip(x, data)])
        each = w * (np.logaddexp(0, -z) * p + np.logaddexp(0, z) * (1 - p))
        losses[penalty] = np.array([each[data == d].sum() / w[data == d].sum() for d in sorted(set(data))])
        loss = losses[penalty].mean()
        regret, close, rank = measure_regret(groups, names, left_out.get)
        print(
            f"penalty {penalty:5}: left-out loss {loss:.3f}, regret {regret:.4f}, within one error {close:.0%}, rank {rank:.2f}"
        )
    regret, close, rank = measure_regret(groups, names, lambda d: prior)
    print(f"prior weights: regret {regret:.4f}, within one error {close:.0%}, rank {rank:.2f}")
    lowest = min(losses.values(), key=lambda values: values.mean())
    limit = lowest.mean() + lowest.std(ddof=1) / math.sqrt(len(lowest))
    penalty = max(penalty for penalty, values in losses.items() if values.mean() <= limit)
    print(f"penalty {penalty}")
    weights = fit(x, p, w, prior, penalty, free)
    for name, old, new in zip(names, prior, weights):
        if abs(new - old) > 0.05:
            print(f"  {name:30} {old:6.2f} -> {new:6.2f}")
    error, coverage, count = measure_expectations(curves)
    print(f"expected skill, data set left out: median error {error:.3f}, 80 % range covers {coverage:.0%} of {count}")
    if arguments.write:
        write_rules(names, weights)
        write_evidence(curves)


PRIOR_COST = {"shortage": -1.0, "size": -0.5, "input_size": -1.5}

if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        raise SystemExit(str(error)) from None
