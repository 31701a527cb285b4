"""The pages of a finished run, report.html and README.md, from the run folder and the task's report elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fieldguide.core.files import write_atomically
from fieldguide.core.report_elements import Bars, Lines, Numbers, ReportElement, Table
from fieldguide.inference.run import Run
from fieldguide.report import model_card
from fieldguide.report.eval_samples import EvalSamples
from fieldguide.report.render import Section, render
from fieldguide.tasks.base import Metric


def write(run: Run, elements: Mapping[str, Sequence[ReportElement]]) -> None:
    """Write report.html and README.md to the run folder."""
    record = run.record
    metrics = [m for m in run.task.metrics if m.name in record["scores"]["test"]]
    title = f"{record['model']['size']} on {record['data']['source']}"
    sections = [
        build_scores_section(run, metrics),
        *(Section(name, elements=shown) for name, shown in elements.items()),
        build_training_section(run, run.task.monitored_metric()),
        build_choice_section(record),
        build_data_section(record),
        build_settings_section(record),
    ]
    footer = (
        f"Created by fieldguide {record['versions']['fieldguide']} with torch {record['versions']['torch']}, "
        f"started {record['started']}."
    )
    page = render(
        title=title, verdict=summarize_result(record, metrics[0]), facts=list_facts(run), sections=sections, footer=footer
    )
    write_atomically(run.path / "report.html", page.encode())
    write_atomically(run.path / "README.md", build_model_card(run, title, metrics).encode())


def summarize_result(record: Mapping[str, Any], metric: Metric) -> str:
    """Return the result in one sentence, next to the baselines."""
    scores = record["scores"]
    low, high = (metric.text(v) for v in scores["intervals"][metric.name])
    beaten, bounds = ([b for b in scores["baselines"] if bool(b.get("bound")) == bound] for bound in (False, True))
    listed = lambda some: "; ".join(
        f"{b['name']} {metric.text(b['scores'][metric.name])}" for b in some if metric.name in b["scores"]
    )
    value = metric.text(scores["test"][metric.name])
    result = (
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
    best = f" Upper bound: {listed(bounds)}." if bounds else ""
    advice = (
        f" The network does not beat {' and '.join(better)}: use that, or train with more minutes or data." if better else ""
    )
    return f"{result} (95 % interval {low} to {high}). Baselines: {listed(beaten)}.{best}{advice}"


def list_facts(run: Run) -> list[tuple[str, str]]:
    record, cost = run.record, run.record["cost"]
    split = record["data"]["split"]
    tested = record["scores"].get("tested", split["test"])
    return [
        ("network", record["model"]["size"]),
        ("parameters", f"{cost['parameters']:,}"),
        ("multiply-adds", f"{cost['multiply_adds']:,}"),
        ("trained on", f"{split['train']:,} examples"),
        ("tested on", f"{tested:,} examples"),
        ("training", f"{format_duration(cost['seconds'])}, {record['settings']['precision']}"),
        ("peak memory", f"{cost['peak_memory'] / 2**20:,.0f} MiB"),
        ("machine", f"{record['machine']['cores']} cores, {record['machine']['device']}"),
    ]


def build_scores_section(run: Run, metrics: Sequence[Metric]) -> Section:
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
        f"{main.name.replace('_', ' ').capitalize()} compared with the baselines",
        "The line shows the 95 % interval.",
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
        "Measured on test examples that were not used for training, model selection or early stopping. Intervals are "
        "bootstrap intervals over these examples."
    )
    return Section("Scores", lead, [bars, Table("All scores", "", header, rows)])


def build_training_section(run: Run, metric: Metric) -> Section:
    lines = run.losses()
    losses, rates = collect_curves(lines, "loss"), collect_curves(lines, "lr")
    scored = [(r["step"], r["scores"]) for r in lines if "scores" in r]
    elements: list[ReportElement] = []
    if losses:
        elements.append(Lines("Training loss", "", x="step", y="loss", lines=losses))
    if scored:
        elements.append(
            Lines(
                f"Validation {metric.name.replace('_', ' ')}",
                "Score on the validation examples, which selects the weights that are kept.",
                x="step",
                y=metric.name,
                lines={"validation": ([s for s, _ in scored], [v[metric.name] for _, v in scored])},
                marks={"kept": run.record["cost"]["best_step"]},
            )
        )
    if rates:
        elements.append(Lines("Learning rate", "", x="step", y="rate", lines=rates))
    elements += EvalSamples(run.path).merge()
    cost = run.record["cost"]
    lead = f"{cost['steps']:,} steps in {format_duration(cost['seconds'])}; the weights of step {cost['best_step']:,} are kept."
    return Section("Training", lead + (f" Stopped early: {cost['stopped']}." if cost["stopped"] else ""), elements)


def collect_curves(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, tuple[Numbers, Numbers]]:
    """Return the logged values called `name` of every phase: phase -> (steps, values)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key == name or key.endswith("." + name):
                found.setdefault(key, []).append((line["step"], value))
    return {key: ([step for step, _ in points], [value for _, value in points]) for key, points in found.items()}


def build_choice_section(record: Mapping[str, Any]) -> Section:
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
        f"Task: {record['task']} ({chosen['why']}).",
        [
            Table("Reasons", "Each reason names its source.", ("network", "", "reason"), rows),
            Table("Other options", "", ("network", "parameters", "status", "reasons"), others),
        ],
    )


def build_data_section(record: Mapping[str, Any]) -> Section:
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
            Table("Columns", "", ("column", "kind", "role", "distinct", "missing", "reason"), columns),
            Table(
                "Data checks",
                "" if findings else "No problems found.",
                ("", "problem", "count", "location", "remedy"),
                findings,
            ),
        ],
    )


def build_settings_section(record: Mapping[str, Any]) -> Section:
    model = [[k, str(v)] for k, v in record["model"]["config"].items()]
    return Section(
        "Settings",
        "All settings of this run.",
        [
            Table("Training", "", ("setting", "value"), [[k, str(v)] for k, v in record["settings"].items()]),
            Table("Network", record["model"]["architecture"], ("field", "value"), model),
        ],
    )


def build_model_card(run: Run, title: str, metrics: Sequence[Metric]) -> str:
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
    return model_card.build_card(
        title=title,
        verdict=summarize_result(record, metrics[0]),
        facts=list_facts(run),
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
                f"The {len(d['findings'])} findings of the data checks are listed in report.html.",
            ),
            (
                "Limits",
                "The scores apply to data like the test examples. For other data, such as images from another camera "
                "or records of another year, they may not hold.",
            ),
        ],
    )


def format_duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds) // 60} min {int(seconds) % 60} s"
