"""How good is the advised model? `fit` against each candidate alone, the baseline and peers, in the same minutes.

    python benchmarks/advice.py --out advice.jsonl [--only iris,adult] [--minutes 1,3] [--candidates 3] [--load] [--table]

For each data set and time: the test score of `fieldguide fit DATA --minutes M`, of the same with `--model` for each of the next best
candidates, of the best baseline, and with --peers, of another library's usual recipe (`peers.py`), which must be installed. With --load,
a second process keeps one core busy. Every run is a process of its own; lines that exist are not run again. --table prints the regret of
the advised model: what the best candidate in hindsight scores more, in standard errors of the test score.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import real_data

SAMPLES = "digits breast-cancer diabetes docstrings clicks demand phrases inked scattered series questions captions".split()
REAL: dict[str, tuple[str, dict[str, str]]] = {
    "adult": ("adult.csv", {"target": "income"}),
    "california": ("california.csv", {"target": "median_house_value"}),
    "trec": ("trec.csv", {"target": "label"}),
    "clinc": ("clinc.csv", {"target": "label"}),
    "imdb": ("imdb.csv", {"target": "sentiment"}),
    "cifar10": ("cifar10/train", {}),
    "etth1": ("etth1.csv", {"task": "time-series-forecasting"}),
    "camvid": ("camvid/train", {"task": "image-segmentation"}),
    "bccd": ("bccd", {"task": "object-detection"}),
    "beauty": ("beauty.csv", {"task": "recommendation"}),
    "daquar": ("daquar.csv", {"task": "visual-question-answering", "target": "answer"}),
}

PEERS = {
    **dict.fromkeys(("adult", "california", "breast-cancer", "diabetes"), "autogluon"),
    **dict.fromkeys(("cifar10", "digits"), "timm"),
    **dict.fromkeys(("trec", "clinc", "imdb", "docstrings"), "transformers"),
    "etth1": "statsforecast",
}


@contextmanager
def keep_busy(wanted: bool) -> Iterator[None]:
    """Run a process inside that uses one core all the time."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(10**6))"])
    try:
        yield
    finally:
        process.kill()


def run_fit(path: str, minutes: float, options: dict[str, str], model: str = "auto") -> dict[str, Any]:
    """Fit in a new process, and return the record of the run with the time that the process took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "fieldguide", "fit", path, "--minutes", f"{minutes:g}", "--out", str(out)]
        command += ["--model", model, *(part for name, value in options.items() for part in (f"--{name}", value))]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.monotonic() - started
        if done.returncode:
            return {"failed": done.stderr.strip()[-300:], "seconds": round(seconds, 1)}
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    metric = next(iter(record["scores"]["test"]))  # the main one comes first
    low, high = record["scores"]["intervals"][metric]
    return {
        "metric": metric,
        "score": record["scores"]["test"][metric],
        "error": (high - low) / 3.92,
        "model": record["model"]["size"],
        "raced": [c["name"] for c in record.get("race", {}).get("contenders", [])],
        "others": [o["name"] for o in record["choice"]["others"] if not o["rejected"]],
        "baselines": {b["name"]: b["scores"].get(metric) for b in record["scores"]["baselines"] if not b.get("bound")},
        "parts": record["cost"].get("parts", {}),
        "seconds": round(seconds, 1),
    }


def run_peer(peer: str, path: str, minutes: float, options: dict[str, str]) -> dict[str, Any]:
    """Return the scores of a peer's recipe on the test rows of the same split, or why there are none."""
    command = [sys.executable, str(Path(__file__).with_name("peers.py")), peer, path, f"{minutes:g}", json.dumps(options)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1][:200]}
    return {"scores": json.loads(done.stdout.strip().splitlines()[-1]), "seconds": round(time.monotonic() - started, 1)}


def list_data(folder: Path) -> dict[str, tuple[str, dict[str, str]]]:
    found: dict[str, tuple[str, dict[str, str]]] = {name: (name, {}) for name in SAMPLES}
    return found | {name: (str(folder / path), options) for name, (path, options) in REAL.items() if (folder / path).exists()}


def measure(arguments: argparse.Namespace) -> None:
    """Run what is missing, and append it to the file."""
    lines = read(arguments.out)
    data = list_data(real_data.prepare())
    for minutes in map(float, arguments.minutes.split(",")):
        for name in arguments.only.split(",") if arguments.only else data:
            path, options = data[name]
            key = {"data": name, "minutes": minutes, "load": arguments.load}

            first = run(lines, arguments, key, "advised", functools.partial(run_fit, path, minutes, options))
            names = list(dict.fromkeys([*first.get("raced", ()), *first.get("others", ())]))[: arguments.candidates]
            for model in names:
                run(lines, arguments, key, model, functools.partial(run_fit, path, minutes, options, model))
            if arguments.peers and name in PEERS:
                run(lines, arguments, key, PEERS[name], functools.partial(run_peer, PEERS[name], path, minutes, options))


def run(
    lines: list[dict[str, Any]],
    arguments: argparse.Namespace,
    key: dict[str, Any],
    who: str,
    call: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Return the line of a run, which is appended to the file if it is new."""
    known = [line for line in lines if line["who"] == who and all(line[name] == value for name, value in key.items())]
    if known:
        return known[0]
    with keep_busy(arguments.load):
        line = key | {"who": who} | call()
    lines.append(line)
    with open(arguments.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    score = line.get("score", next(iter(line.get("scores", {}).values()), math.nan))
    print(f"{key['data']:14} {key['minutes']:4g} min  {who:24} {score:.4f}  {line.get('failed', '')}", flush=True)
    return line


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print scores and regrets."""
    groups: dict[tuple, dict[str, Any]] = defaultdict(dict)
    for line in lines:
        groups[line["data"], line["minutes"], line["load"]][line["who"]] = line
    print("| data | min | load | metric | advised | model | best candidate | baseline | peer | regret (errors) | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    close, above, beaten, over = [], [], [], []
    for (name, minutes, load), runs in groups.items():
        own = runs.get("advised", {})
        if "score" not in own:
            print(f"| {name} | {minutes:g} | {'yes' if load else ''} | failed: {own.get('failed', '')[-80:]} |")
            continue
        sign = -1 if is_error(own["metric"]) else 1
        others = {who: run["score"] for who, run in runs.items() if who != "advised" and "score" in run}
        best = max(others, key=lambda who: sign * others[who], default=None)
        baseline = max(
            (s for s in own["baselines"].values() if s is not None and s == s), key=lambda s: sign * s, default=math.nan
        )
        regret = sign * (others[best] - own["score"]) / max(own["error"], 1e-9) if best else math.nan
        better = max(sign * others[best], sign * own["score"]) if best else sign * own["score"]
        close.append(sign * own["score"] >= better - 0.01 * abs(better))
        above.append(sign * own["score"] >= sign * baseline - own["error"])
        peer = PEERS.get(name, "")
        found = runs.get(peer, {}).get("scores", {}).get(own["metric"])
        if found is not None:
            beaten.append(sign * own["score"] > sign * abs(found))  # AutoGluon's errors are negative
        over.append(own["seconds"] / (60 * minutes) - 1)
        best_text = f"{others[best]:.4g} ({best})" if best else ""
        print(
            f"| {name} | {minutes:g} | {'yes' if load else ''} | {own['metric']} | {own['score']:.4g} | {own['model']} | {best_text} "
            f"| {baseline:.4g} | {f'{abs(found):.4g} ({peer})' if found is not None else ''} | {regret:+.1f} | {own['seconds']:.0f} |"
        )
    if close:
        print(
            f"\nwithin 1 % of the best: {sum(close)} of {len(close)}; at least the baseline (within an error): {sum(above)} of "
            f"{len(above)}; better than the peer: {sum(beaten)} of {len(beaten)}; longest overrun {100 * max(over):+.0f} %"
        )


def is_error(metric: str) -> bool:
    """Return whether lower is better, from the tasks' own metrics."""
    from fieldguide.tasks import tasks

    return any(m.better == "min" for task in tasks().values() for m in task.metrics if m.name == metric)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", default="1")
    parser.add_argument("--candidates", type=int, default=3, help="networks that are trained alone, next to the advised one")
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--peers", action="store_true", help="run peers too, which must be installed")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    print_table(read(arguments.out))


if __name__ == "__main__":
    main()
