"""The pages of a finished run, report.html and README.md, from the run folder and the task's report elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fieldguide.core.files import write_atomically
from fieldguide.core.report_elements import Bars, Exhibit, Lines, Table
from fieldguide.inference.run import Run
from fieldguide.report import model_card
from fieldguide.report.eval_samples import Glimpses
from fieldguide.report.render import Section, render
from fieldguide.tasks.base import Metric


def write(run: Run, exhibits: Mapping[str, Sequence[Exhibit]]) -> None:
    """Write report.html and README.md to the run folder."""
    record = run.record
    metrics = [m for m in run.task.metrics if m.name in record["scores"]["test"]]
    title = f"{record['model']['size']} on {record['data']['source']}"
    sections = [
        results(run, metrics),
        *(Section(name, exhibits=shown) for name, shown in exhibits.items()),
        training(run, run.task.monitored_metric()),
        choice(record),
        data(record),
        settings(record),
    ]
    footer = (
        f"Made by fieldguide {record['versions']['fieldguide']} with torch {record['versions']['torch']}, "
        f"started {record['started']}."
    )
    page = render(title=title, verdict=verdict(record, metrics[0]), facts=facts(run), sections=sections, footer=footer)
    write_atomically(run.path / "report.html", page.encode())
    write_atomically(run.path / "README.md", words(run, title, metrics).encode())


def verdict(record: Mapping[str, Any], metric: Metric) -> str:
    """Return the result in one sentence, next to the baselines."""
    scores = record["scores"]
    low, high = (metric.text(v) for v in scores["intervals"][metric.name])
    beaten, bounds = ([b for b in scores["baselines"] if bool(b.get("bound")) == bound] for bound in (False, True))
    listed = lambda some: "; ".join(
        f"{b['name']} {metric.text(b['scores'][metric.name])}" for b in some if metric.name in b["scores"]
    )
    value = metric.text(scores["test"][metric.name])
    said = (
        f"{value} of the held-out examples {metric.words}"
        if metric.words == "correct"
        else f"{value} {metric.words} on held-out examples"
    )
    sign = 1 if metric.better == "max" else -1
    better = [
        b["name"]
        for b in beaten
        if metric.name in b["scores"] and sign * b["scores"][metric.name] > sign * scores["test"][metric.name]
    ]
    best = f" At best: {listed(bounds)}." if bounds else ""
    advice = (
        f" The network does not beat {' and '.join(better)}: prefer that, or give it more minutes or data." if better else ""
    )
    return f"{said} (95 % interval {low} to {high}). To beat: {listed(beaten)}.{best}{advice}"


def facts(run: Run) -> list[tuple[str, str]]:
    record, cost = run.record, run.record["cost"]
    split = record["data"]["split"]
    tested = record["scores"].get("tested", split["test"])
    return [
        ("network", record["model"]["size"]),
        ("parameters", f"{cost['parameters']:,}"),
        ("multiply-adds", f"{cost['multiply_adds']:,}"),
        ("trained on", f"{split['train']:,} examples"),
        ("tested on", f"{tested:,} examples"),
        ("training", f"{clock(cost['seconds'])}, {record['settings']['precision']}"),
        ("peak memory", f"{cost['peak_memory'] / 2**20:,.0f} MiB"),
        ("machine", f"{record['machine']['cores']} cores, {record['machine']['device']}"),
    ]


def results(run: Run, metrics: Sequence[Metric]) -> Section:
    record = run.record
    scores, main = record["scores"], metrics[0]
    header = ["metric", "better", "this network", "95 % interval", *(b["name"] for b in scores["baselines"])]
    rows = [
        [
            f"{m.name.replace('_', ' ')} ({m.words})",
            {"max": "higher", "min": "lower"}.get(m.better, m.better),
            m.text(scores["test"][m.name]),
            " to ".join(m.text(v) for v in scores["intervals"][m.name]),
            *(m.text(b["scores"].get(m.name)) for b in scores["baselines"]),
        ]
        for m in metrics
    ]
    factor = 100 if main.percent else 1
    bars = Bars(
        f"{main.name.replace('_', ' ').capitalize()} beside the baselines",
        "The whisker is the 95 % interval.",
        {
            "this network": factor * scores["test"][main.name],
            **{
                f"{b['name']}: {b['what']}": factor * b["scores"][main.name]
                for b in scores["baselines"]
                if main.name in b["scores"]
            },
        },
        {"this network": tuple(factor * v for v in scores["intervals"][main.name])},
        "%" if main.percent else "",
    )
    lead = (
        "Measured on examples that no step of training, choosing or stopping has seen; intervals by bootstrap over "
        "those examples."
    )
    return Section("Scores", lead, [bars, Table("All scores", "", header, rows)])


def training(run: Run, metric: Metric) -> Section:
    lines = run.losses()
    losses, rates = curves(lines, "loss"), curves(lines, "lr")
    scored = [(r["step"], r["scores"]) for r in lines if "scores" in r]
    exhibits: list[Exhibit] = []
    if losses:
        exhibits.append(Lines("Training loss", "", x="step", y="loss", lines=losses))
    if scored:
        exhibits.append(
            Lines(
                f"Validation {metric.name.replace('_', ' ')}",
                "On the validation part, which chose the weights that are kept.",
                x="step",
                y=metric.name,
                lines={"validation": ([s for s, _ in scored], [v[metric.name] for _, v in scored])},
                marks={"kept": run.record["cost"]["best_step"]},
            )
        )
    if rates:
        exhibits.append(Lines("Learning rate", "", x="step", y="rate", lines=rates))
    exhibits += Glimpses(run.path).together()
    cost = run.record["cost"]
    lead = f"{cost['steps']:,} steps in {clock(cost['seconds'])}; the weights of step {cost['best_step']:,} are kept."
    return Section("Training", lead + (f" Stopped early: {cost['stopped']}." if cost["stopped"] else ""), exhibits)


def curves(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, tuple]:
    """Return the logged values called `name` of every phase: phase -> (steps, values)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key == name or key.endswith("." + name):
                found.setdefault(key, []).append((line["step"], value))
    return {key: tuple(zip(*points)) for key, points in found.items()}


def choice(record: Mapping[str, Any]) -> Section:
    chosen = record["choice"]
    rows = [[record["model"]["size"], "chosen", r] for r in chosen["reasons"]]
    rows += [[record["model"]["size"], "against", r] for r in chosen["against"]]
    others = [
        [
            o["name"],
            f"{o['parameters']:,}",
            o["rejected"] or f"{o['points']:.1f} points",
            "; ".join(o["reasons"] + [f"but {a}" for a in o["against"]]),
        ]
        for o in chosen["others"]
    ]
    return Section(
        "Why this network",
        f"Task: {record['task']}, because of {chosen['why']}.",
        [
            Table("Reasons", "Each rule names where it is written.", ("network", "", "reason"), rows),
            Table("Other options", "", ("network", "parameters", "standing", "reasons"), others),
        ],
    )


def data(record: Mapping[str, Any]) -> Section:
    d = record["data"]
    columns = [[c["name"], c["kind"], c["role"], c["distinct"], c["missing"], c["why"]] for c in d["columns"]]
    findings = [[f["severity"], f["what"], f["count"], ", ".join(f["places"]), f["remedy"]] for f in d["findings"]]
    lead = (
        f"{d['files']:,} file{'s' if d['files'] != 1 else ''}, {d['rows']:,} examples used, {d['dropped']:,} dropped. "
        f"Split: {d['split']['how']}. " + " ".join(f"{note[:1].upper()}{note[1:]}." for note in d.get("notes", ()))
    )
    return Section(
        "Data",
        lead,
        [
            Table("Columns", "", ("column", "kind", "role", "distinct", "missing", "how that was decided"), columns),
            Table(
                "What the doctor found",
                "" if findings else "Nothing to complain of.",
                ("", "what", "count", "where", "remedy"),
                findings,
            ),
        ],
    )


def settings(record: Mapping[str, Any]) -> Section:
    model = [[k, str(v)] for k, v in record["model"]["config"].items()]
    return Section(
        "Settings",
        "Every number that this run followed.",
        [
            Table("Training", "", ("setting", "value"), [[k, str(v)] for k, v in record["settings"].items()]),
            Table("Network", record["model"]["architecture"], ("field", "value"), model),
        ],
    )


def words(run: Run, title: str, metrics: Sequence[Metric]) -> str:
    record = run.record
    scores, d = record["scores"], record["data"]
    table = Table(
        "",
        header=("metric", "this network", "95 % interval", *(b["name"] for b in scores["baselines"])),
        rows=[
            [
                m.name,
                m.text(scores["test"][m.name]),
                " to ".join(m.text(v) for v in scores["intervals"][m.name]),
                *(m.text(b["scores"].get(m.name)) for b in scores["baselines"]),
            ]
            for m in metrics
        ],
    )
    front = {
        "library_name": "fieldguide",
        "pipeline_tag": record["task"],
        "tags": ["fieldguide", run.card.name],
        "model-index": [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": record["task"]},
                        "dataset": {"name": d["source"], "type": "local"},
                        "metrics": [{"type": m.name, "value": scores["test"][m.name]} for m in metrics],
                    }
                ],
            }
        ],
    }
    return model_card.card(
        title=title,
        verdict=verdict(record, metrics[0]),
        facts=facts(run),
        front=front,
        sections=[
            ("Scores", table),
            (
                "How to use",
                f"```\nfieldguide predict {run.path} INPUT...\n```\n\nor in Python:\n\n```python\n"
                f"fieldguide.open_run({str(run.path)!r}).predict([...])\n```",
            ),
            ("Network", f"{run.card.summary}\n\n" + "\n".join(f"- {r}" for r in record["choice"]["reasons"])),
            (
                "Data",
                f"{d['rows']:,} examples of {d['source']}; split: {d['split']['how']}. "
                f"{len(d['findings'])} findings of the doctor stand in report.html.",
            ),
            (
                "Limits",
                "The scores hold for data like the test part. Inputs of another kind, another camera or "
                "another year are outside what was measured.",
            ),
        ],
    )


def clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
