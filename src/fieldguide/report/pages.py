"""The pages of a finished run, report.html and README.md, from the run folder and the task's report elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fieldguide.core.files import write_atomically
from fieldguide.core.report_elements import Bars, ReportElement, Table
from fieldguide.inference.run import Run
from fieldguide.report import model_card
from fieldguide.report.render import Section, render
from fieldguide.report.training_curves import build_training_section
from fieldguide.report.usage import build_usage
from fieldguide.report.verdict import format_duration, judge, list_facts, summarize_result
from fieldguide.tasks.base import Metric
from fieldguide.tasks.report_builder import ExampleInput

__all__ = ["Extras", "format_duration", "summarize_result", "write"]

SHOWN_OPTIONS = 5  # other architectures that were considered
MAX_SHOWN_REASONS = 2  # of each


@dataclass
class Extras:
    """Elements of the report beside those of the task's test, and an example of an input."""

    explanation: Sequence[ReportElement] = ()
    subgroups: Sequence[ReportElement] = ()
    preview: Sequence[ReportElement] = ()
    example: ExampleInput | None = field(default=None)


def write(run: Run, elements: Mapping[str, Sequence[ReportElement]], extras: Extras | None = None) -> None:
    """Write report.html and README.md to the run folder."""
    record, extras = run.record, extras or Extras()
    metrics = [m for m in run.task.ordered_metrics() if m.name in record["scores"]["test"]]
    title = f"{record['model']['size']} on {record['data']['source']}"
    usage = build_usage(str(run.path.resolve()), extras.example, get_data_path(record))
    sections = [
        build_scores_section(run, metrics),
        *(Section(name, elements=shown) for name, shown in elements.items()),
        Section("What matters", "What the predictions on the test examples depend on.", extras.explanation),
        Section("Subgroups", f"Scores of the groups of {record['settings'].get('subgroup')!r}.", extras.subgroups),
        build_training_section(run, run.task.monitored_metric()),
        Section("Use this model", "", usage),
        build_choice_section(record, run.task.monitored_metric()),
        build_data_section(record, extras.preview),
        build_settings_section(record),
    ]
    footer = (
        f"Created by fieldguide {record['versions']['fieldguide']} with torch {record['versions']['torch']}, "
        f"started {record['started']}."
    )
    page = render(
        title=title,
        verdict=summarize_result(record, metrics[0]),
        badge=judge(record, metrics[0]),
        facts=list_facts(record),
        sections=[section for section in sections if section.elements],
        footer=footer,
    )
    write_atomically(run.path / "report.html", page.encode())
    write_atomically(run.path / "README.md", build_model_card(run, title, metrics).encode())


def get_data_path(record: Mapping[str, Any]) -> str | None:
    """Return the path or sample name of the data of a run; None if it was in memory."""
    data = record["request"]["data"]
    return None if data is None else str(data)


def build_scores_section(run: Run, metrics: Sequence[Metric]) -> Section:
    record = run.record
    scores, main = record["scores"], metrics[0]
    header = ["metric", "better", "this model", "95 % interval", *(b["name"] for b in scores["baselines"]), "meaning"]
    rows = [
        [
            m.title,
            {"max": "higher", "min": "lower"}.get(m.better, m.better),
            m.text(scores["test"][m.name]),
            m.interval_text(*scores["intervals"][m.name]),
            *(m.text(b["scores"].get(m.name)) for b in scores["baselines"]),
            m.words if m.words != m.title else "",
        ]
        for m in metrics
    ]
    factor = 100 if main.percent else 1
    bars = Bars(
        f"{main.heading} compared with the baselines",
        f"{'Higher' if main.better == 'max' else 'Lower'} is better. The line shows the 95 % interval.",
        {
            "this model": factor * scores["test"][main.name],
            **{
                f"{b['name']}: {b['what']}": factor * b["scores"][main.name]
                for b in scores["baselines"]
                if main.name in b["scores"]
            },
        },
        {"this model": tuple(factor * v for v in scores["intervals"][main.name])},
        "%" if main.percent else "",
        highlight=("this model",),
    )
    lead = (
        "Measured on test examples that were not used for training, model selection or early stopping. Intervals are "
        "bootstrap intervals over these examples."
    )
    return Section("Scores", lead, [bars, Table("All scores", "", header, rows)])


def build_choice_section(record: Mapping[str, Any], metric: Metric) -> Section:
    chosen = record["choice"]
    first = chosen.get("first", record["model"]["size"])  # the first choice of the rules
    rows = [[first, "chosen", r] for r in chosen["reasons"]]
    rows += [[first, "against", r] for r in chosen["against"]]
    options = chosen["others"]
    others = [
        [
            o["name"],
            f"{o['parameters']:,}" if o["parameters"] else "–",
            o["rejected"] or f"{o['points']:.1f} points",
            "; ".join([*map(drop_source, o["reasons"]), *(f"but {drop_source(a)}" for a in o["against"])][:MAX_SHOWN_REASONS]),
        ]
        for o in sorted(options, key=lambda o: bool(o["rejected"]))[:SHOWN_OPTIONS]
    ]
    more = f" {len(options) - len(others)} more are in run.json." if len(options) > len(others) else ""
    return Section(
        "Why this model",
        f"Task: {record['task']} ({chosen['why']}).",
        [
            *build_comparison(record, metric),
            Table("Reasons", "Each reason names its source.", ("network", "", "reason"), rows),
            Table("Other options", f"The next best ones.{more}", ("network", "parameters", "status", "reasons"), others),
        ],
    )


def build_comparison(record: Mapping[str, Any], metric: Metric) -> list[ReportElement]:
    """Return tables of the race between networks and of the other models, with scores on validation rows."""
    name = record["model"]["size"]
    found: list[ReportElement] = []
    if contest := record.get("race"):
        rounds = max(len(c["scores"]) for c in contest["contenders"])
        rows = [
            (
                c["name"],
                *(metric.text(c["scores"][i]) if i < len(c["scores"]) else "" for i in range(rounds)),
                f"{c['seconds']:.0f} s",
                f"{c['steps']:,}",
                c["dropped"] or "went on",
            )
            for c in contest["contenders"]
        ]
        found.append(
            Table(
                "Race",
                f"Networks trained for equal time on this data, one after another; {metric.heading} on the same validation rows after "
                "each round. Those that the leader beats with a probability of 95 % or more leave the race, and the winner goes on "
                "from its weights." + "".join(f" {text[:1].upper()}{text[1:]}." for text in contest.get("would_change", ())),
                ("network", *(f"round {i + 1}" for i in range(rounds)), "time", "steps", "result"),
                rows,
            )
        )
    if rivals := record["choice"].get("rivals"):
        own = record["choice"].get("validation")
        rows = [
            (name, "model of this run", metric.text(own), ""),
            *((r["name"], "", metric.text(r["validation"]), r["chosen"]) for r in rivals),
        ]
        found.append(
            Table(
                "Compared models",
                f"{metric.heading} on the validation rows. The best one is the model of this run, unless you asked for another.",
                ("model", "", metric.title, "details"),
                rows,
            )
        )
    return found


def drop_source(reason: str) -> str:
    """Return a reason without its source, which the reasons for the chosen network name."""
    return reason.split(" [")[0]


def build_data_section(record: Mapping[str, Any], preview: Sequence[ReportElement]) -> Section:
    d = record["data"]
    columns = [[c["name"], c["kind"], c["role"], c["distinct"], c["missing"], c["why"]] for c in d["columns"]]
    findings = [[f["severity"], f["what"], f["count"], ", ".join(f["places"]), f["remedy"]] for f in d["findings"]]
    lead = (
        f"{d['files']:,} file{'s' if d['files'] != 1 else ''}, {d['rows']:,} examples used, {d['dropped']:,} dropped. "
        f"Split: {d['split']['how']}. "
        + ("" if findings else "The data checks found no problems. ")
        + " ".join(f"{note[:1].upper()}{note[1:]}." for note in d.get("notes", ()))
    )
    return Section(
        "Data",
        lead,
        [
            *preview,
            Table("Columns", "", ("column", "kind", "role", "distinct", "missing", "reason"), columns),
            *([Table("Data checks", "", ("", "problem", "count", "location", "remedy"), findings)] if findings else []),
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
    """Return the model card. Unlike the report, it holds no examples from the data, since it may be published."""
    record = run.record
    scores, d = record["scores"], record["data"]
    table = Table(
        "",
        header=("metric", "this model", "95 % interval", *(b["name"] for b in scores["baselines"])),
        rows=[
            [
                m.name,
                m.text(scores["test"][m.name]),
                m.interval_text(*scores["intervals"][m.name]),
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
        facts=list_facts(record),
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
