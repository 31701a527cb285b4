"""Samples that a network produces during training, kept in the run folder for the report.

Which evaluations are sampled depends on the step alone, so a resumed run samples the same ones.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fieldguide.core.files import report_write_errors, write_atomically
from fieldguide.core.report_elements import Gallery, Picture, Quote, Quotes, ReportElement
from fieldguide.core.run_record import find_folder
from fieldguide.core.settings import Settings

MAX_SAMPLED_EVALUATIONS = 8  # per run


class EvalSamples:
    """Samples of a run: galleries and quotes, one JSON file per sampled evaluation."""

    def __init__(self, run: Path):
        self.folder = find_folder(run, "eval_samples")

    def sample(self, step: int, settings: Settings, make: Callable[[], list[ReportElement]]) -> None:
        """Store the result of `make` if this evaluation is one of the few to sample."""
        assert settings.eval_steps is not None  # resolved before training
        part = lambda s: s * MAX_SAMPLED_EVALUATIONS // settings.steps
        if part(step) == part(max(step - settings.eval_steps, 0)) and step != settings.steps:
            return
        with torch.random.fork_rng():
            shown = [to_json(e) for e in make()]
        if shown:
            with report_write_errors(self.folder):
                self.folder.mkdir(exist_ok=True)
            write_atomically(self.folder / f"step-{step:08d}.json", json.dumps(shown, ensure_ascii=False).encode())

    def read(self) -> list[tuple[int, list[ReportElement]]]:
        """Return (step, elements) in order of training."""
        return [
            (int(path.stem.removeprefix("step-")), [from_json(e) for e in json.loads(path.read_text(encoding="utf-8"))])
            for path in sorted(self.folder.glob("step-*.json"))
        ]

    def merge(self) -> list[ReportElement]:
        """Return one element for each title over all steps, as the report shows them."""
        joined: dict[str, ReportElement] = {}
        for step, elements in self.read():
            for e in elements:
                before = joined.get(e.title)
                if isinstance(e, Gallery):
                    pictures = [*before.pictures] if isinstance(before, Gallery) else []
                    pictures += [Picture(p.image, add_step(step, p.caption), p.bad) for p in e.pictures]
                    joined[e.title] = Gallery(e.title, e.note, pictures)
                elif isinstance(e, Quotes):
                    quotes = [*before.quotes] if isinstance(before, Quotes) else []
                    quotes += [Quote(q.text, add_step(step, q.caption), q.bad) for q in e.quotes]
                    joined[e.title] = Quotes(e.title, e.note, quotes)
        return list(joined.values())


def add_step(step: int, caption: str) -> str:
    """Return the caption with the training step in front."""
    return f"step {step:,}{': ' + caption if caption else ''}"


def to_json(element: ReportElement) -> dict[str, Any]:
    """Return an element as a JSON-compatible dictionary. Raises TypeError for other types than galleries and quotes."""
    if isinstance(element, Gallery):
        return {
            "title": element.title,
            "note": element.note,
            "pictures": [{"image": base64.b64encode(p.image).decode(), "caption": p.caption} for p in element.pictures],
        }
    if isinstance(element, Quotes):
        return {
            "title": element.title,
            "note": element.note,
            "quotes": [{"text": q.text, "caption": q.caption} for q in element.quotes],
        }
    raise TypeError(f"eval samples must be Gallery or Quotes, not {type(element).__name__}")


def from_json(record: dict[str, Any]) -> ReportElement:
    """Restore an element from `to_json`."""
    if "pictures" in record:
        return Gallery(
            record["title"], record["note"], [Picture(base64.b64decode(p["image"]), p["caption"]) for p in record["pictures"]]
        )
    return Quotes(record["title"], record["note"], [Quote(q["text"], q["caption"]) for q in record["quotes"]])
