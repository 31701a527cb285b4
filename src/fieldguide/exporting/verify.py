"""Verification of exports: the exported folder, run on held-out raw rows in a fresh process, against the original model.

The process has no fieldguide, and no torch if the format needs none. Records are compared, so that every step counts: decoding,
preprocessing, the network, calibration, the order of classes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.graph import ExportError
from fieldguide.exporting.graph_format import GraphFormat
from fieldguide.exporting.image_generation import draw_noise
from fieldguide.exporting.onnx_file import OnnxFormat
from fieldguide.exporting.precision import Precision
from fieldguide.exporting.requests import MAX_ROWS, add_images, choose_requests

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

# Precision of the weights -> the tolerance of probabilities, and of other numbers relative to their size; the least fraction of equal rows
ALLOWED = {"float32": (1e-4, 1.0), "float16": (0.01, 0.99), "int8": (0.1, 0.95)}
BATCHES = ((1, 8), (7, 64), (64, MAX_ROWS))  # size of batches, and the number of rows that run in them
TIMEOUT = 1800  # seconds
MAX_TIE_FRACTION = 0.5  # of rows whose answers depend on rounding
PERTURBATIONS = 2  # how often weights are changed to find them
MAX_EXAMPLES = 5  # of differences that are kept
PROGRAM = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(sys.argv[4]):
            raise ImportError(f"an export must not import {name}")
sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
import run
model, found = run.Model(sys.argv[1]), []
for size, count in json.loads(sys.argv[2]):
    found.append([])
    for path in sys.argv[5:]:
        found[-1] += model.predict(list(run.read(path))[:count], size, **json.loads(sys.argv[3]))
json.dump(found, sys.stdout)
"""


@dataclass
class Verification:
    """The comparison of an export with its original.

    `largest` is the largest difference of a number, relative to its size if that exceeds 1. `agreement` is the fraction of rows
    whose answers are equal, apart from ties.
    """

    passed: bool
    rows: int
    agreement: float
    largest: float
    tolerance: float
    batches: list[int]
    source: str
    seconds: float
    problems: list[str] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)  # metric -> original, export
    quantized: str = ""  # what is stored in fewer bits
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return asdict(self)


def verify(
    predictor: TaskPredictor,
    folder: Path,
    source: str,
    precision: Precision = "float32",
    chosen: tuple[list[pl.DataFrame], Any] | None = None,
    options: Mapping[str, Any] | None = None,
    form: GraphFormat | None = None,
) -> Verification:
    """Run an exported folder on raw inputs, by default those of `choose_requests`, and compare its records with the original's.

    `options` are those of the predictions, `form` is the format of the folder, ONNX by default. Answers that a loop generates may differ
    where they depend on rounding (`find_unstable`). With weights in fewer bits, more may differ: see `ALLOWED`. Raises
    `ExportError` if answers differ because cells were not read.
    """
    form = form or OnnxFormat()
    tolerance, required = ALLOWED[precision]
    started = time.perf_counter()
    tables, data = chosen or choose_requests(predictor, source)
    batches = BATCHES if predictor.signature.record_for == "row" else [(size, None) for size, _ in BATCHES]
    with tempfile.TemporaryDirectory() as home:
        if predictor.signature.record_for == "sample":
            tables = [add_images(predictor, tables[0], Path(home))]
        paths = [Path(home) / f"rows{i}.{'jsonl' if has_lists(table) else 'csv'}" for i, table in enumerate(tables)]
        for path, table in zip(paths, tables):
            (table.write_ndjson if has_lists(table) else table.write_csv)(path)
        given = dict(options or {})
        if predictor.signature.record_for == "sample":
            expected = generate_samples(predictor, tables[0], given)
            given = {"noise": str(Path(home) / "noise.npz")}
            np.savez(given["noise"], **draw_noise(predictor, len(tables[0])))
        else:
            expected = [record for path in paths for record in predictor.predict(str(path), **given)]
        if not any(field.name == "series" or field.role == "series" for field in predictor.signature.inputs):
            expected = [{name: value for name, value in record.items() if name != "series"} for record in expected]
        is_text = predictor.signature.loop is not None and predictor.signature.loop.kind != "diffusion"
        ties = find_unstable(predictor, paths[0], tolerance, given) if is_text else set()
        found, notes = run_folder(folder, paths, batches, given, form.absent)
    comparison = Comparison(tolerance, getattr(predictor.task, "score_threshold", 0.0))
    problems, largest, same = [], 0.0, 0
    for (size, _), records in zip(batches, found):
        for number, (want, got) in enumerate(zip(expected, records)):
            difference, problem = comparison.compare(want, got)
            largest = max(largest, difference)
            if problem and number not in ties:
                problems.append(f"row {number + 1}, batches of {size}: {problem}")
            elif not problem and size == batches[-1][0]:
                same += 1
    rows = len(expected)
    is_complete = all(len(records) == min(rows, count or rows) for (_, count), records in zip(batches, found))
    if not is_complete:
        problems.insert(0, "the export returned another number of records")
    is_decisive = len(ties) <= MAX_TIE_FRACTION * rows
    if not is_decisive:
        problems.insert(0, f"{len(ties)} of {rows} answers depend on rounding; give other rows with --data")
    passed = is_complete and is_decisive and (not problems if required == 1 else same >= required * (rows - len(ties)))
    if notes and not passed:
        raise ExportError(f"run.py does not read the cells as training did: {notes[0]}")
    return Verification(
        passed=passed,
        rows=rows,
        agreement=same / max(rows, 1),
        largest=largest,
        tolerance=tolerance,
        batches=[size for size, _ in batches],
        source=source,
        seconds=round(time.perf_counter() - started, 1),
        problems=problems[:MAX_EXAMPLES]
        + ([f"and {len(problems) - MAX_EXAMPLES} more"] if len(problems) > MAX_EXAMPLES else []),
        scores=compare_scores(predictor, data, expected, found[-1]),
        versions=list_versions(form.packages),
    )


def generate_samples(predictor: TaskPredictor, table: pl.DataFrame, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the images or videos that the original generates for the requests of a table."""
    if predictor.signature.inputs:
        known = [field.name for field in predictor.signature.inputs]
        requests = table.select(name for name in table.columns if name in known)
        return list(predictor.predict(requests if requests.width > 1 else requests.to_series().to_list(), **options))
    return list(predictor.predict([], **{**options, "count": len(table)}))


def find_unstable(predictor: TaskPredictor, path: Path, tolerance: float, options: Mapping[str, Any]) -> set[int]:
    """Return the rows of a file whose answers change if the weights change by noise of a tenth of the tolerance."""
    parameters = list(predictor.objective.model.parameters())
    stored, generator = [p.detach().clone() for p in parameters], torch.Generator().manual_seed(0)
    answers = [predictor.predict(str(path), **options)]
    try:
        for _ in range(PERTURBATIONS):
            for parameter, own in zip(parameters, stored):
                noise = torch.randn(own.shape, generator=generator).to(own)
                parameter.data = own * (1 + 0.1 * tolerance * noise)
            answers.append(predictor.predict(str(path), **options))
    finally:
        for parameter, own in zip(parameters, stored):
            parameter.data = own
    return {row for row, records in enumerate(zip(*answers)) if any(record != records[0] for record in records)}


def has_lists(table: pl.DataFrame) -> bool:
    """Return whether cells of a table hold lists or objects, which CSV cannot."""
    return any(dtype.is_nested() for dtype in table.dtypes)


def run_folder(
    folder: Path,
    paths: Sequence[Path],
    batches: Sequence[tuple[int, int | None]],
    options: Mapping[str, Any],
    absent: Sequence[str],
) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Return the records of each batch size and the printed notes, from a process without the modules `absent`.

    Raises `ExportError` if it fails.
    """
    command = [
        sys.executable,
        "-IB",  # isolated, and no compiled files in the folder
        "-c",
        PROGRAM,
        str(folder.resolve()),
        json.dumps(batches),
        json.dumps(dict(options)),
        json.dumps(absent),
        *map(str, paths),
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT, env=env)
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        raise ExportError(f"{folder}: run.py fails: {lines[-1] if lines else done.returncode}")
    return json.loads(done.stdout), [line for line in lines if line.startswith("column ")]


def compare_scores(
    predictor: TaskPredictor, data: Any, expected: Sequence[Any], found: Sequence[Any]
) -> dict[str, list[float]]:
    """Return each score of the original and of the export on rows with known targets; empty if records do not hold what is scored."""
    task = predictor.task
    outputs = [task.collect_outputs(records) for records in (expected, found)]
    if data is None or any(one is None for one in outputs):
        return {}
    targets = task.targets(data)
    scores = [task.score(one, targets) for one in outputs if one is not None]
    return {name: [float(score[name]) for score in scores] for name in scores[0]}


def list_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that ran."""
    from importlib.metadata import version

    return {name: version(name) for name in dict.fromkeys(("numpy", *packages, "torch", "fieldguide"))}
