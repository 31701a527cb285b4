"""Verification of exports: the exported folder, run on held-out raw rows in a fresh process, against the original model.

The process has neither torch nor fieldguide. Records are compared, so that every step counts: decoding, preprocessing, the
network, calibration, the order of classes.
"""

from __future__ import annotations

import base64
import io
import json
import math
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
from PIL import Image

from fieldguide.core.errors import DataError
from fieldguide.core.media import Media
from fieldguide.data.dataset import FILE, LINE
from fieldguide.data.preprocessing.conversations import take_until_answer
from fieldguide.data.read import load
from fieldguide.data.splits import sample_rows
from fieldguide.data.timeseries.cases import CASE
from fieldguide.exporting.graph import ExportError
from fieldguide.exporting.precision import Precision
from fieldguide.objectives.noise import Noise
from fieldguide.tasks.text.text_generation import PROMPT_WORDS
from fieldguide.tasks.vision.object_detection import MAX_DETECTIONS

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

MAX_ROWS = 512  # that are compared
# Precision of the weights -> the tolerance of probabilities, and of other numbers relative to their size; the least fraction of equal rows
ALLOWED = {"float32": (1e-4, 1.0), "float16": (0.01, 0.99), "int8": (0.1, 0.95)}
BATCHES = ((1, 8), (7, 64), (64, MAX_ROWS))  # size of batches, and the number of rows that run in them
TIMEOUT = 1800  # seconds
MAX_TIE_FRACTION = 0.5  # of rows whose answers depend on rounding
PERTURBATIONS = 2  # how often weights are changed to find them
MAX_PROMPTS = 64  # that are answered
MAX_SAMPLES = 64  # that are generated
MAX_STEPS = 2048  # of series, if each step has a record
ROW = "#row"  # a column of row numbers
MAX_EXAMPLES = 5  # of differences that are kept
MAX_SERIES, CUTS = 32, 8  # of a request of series, and how many requests end at different steps
ROUNDED = {"box": 0.101, "x": 0.101, "y": 0.101}  # values that are rounded to one decimal place: pixels
MADE_IMAGE = "image"  # of a record: a pixel may be rounded to one level or the next; pixels of masks are numbers of classes
DERIVED = {"found": "objects", "classes": "shares"}  # texts that sum up another value of the record
PROGRAM = """
import json, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "fieldguide"):
            raise ImportError(f"an export must not import {name}")
sys.meta_path.insert(0, Missing())
sys.path.insert(0, sys.argv[1])
import run
model, found = run.Model(sys.argv[1]), []
for size, count in json.loads(sys.argv[2]):
    found.append([])
    for path in sys.argv[4:]:
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
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-compatible dictionary."""
        return asdict(self)


def choose_requests(predictor: TaskPredictor, source: str) -> tuple[list[pl.DataFrame], Any]:
    """Return tables of raw inputs, each of which is a request, and the data of the first if scores are compared."""
    if predictor.signature.record_for == "sample":
        return [choose_samples(predictor)], None
    if predictor.signature.series is not None:
        return cut_series(predictor, source), None
    if predictor.signature.record_for == "step":
        return [choose_steps(predictor, source)], None
    if (loop := predictor.signature.loop) is not None:
        choose_texts = choose_prompts if loop.kind == "autoregressive" else choose_sources
        return [choose_texts(predictor, source)], None
    choose = choose_cases if predictor.signature.record_for == "series" else choose_rows
    table, data = choose(predictor, source)
    return [table], data


def choose_steps(predictor: TaskPredictor, source: str) -> pl.DataFrame:
    """Return the last raw rows of the first series of a source, `MAX_STEPS` in all."""
    raw, fields = load(source).raw.rows, predictor.signature.inputs
    owners = [field.name for field in fields if field.role == "series"]
    raw = raw.select(field.name for field in fields if field.name in raw.columns)
    if owners:
        raw = raw.join(raw.select(owners).unique(maintain_order=True).head(MAX_SERIES), on=owners, maintain_order="left")
        most = -(-MAX_STEPS // raw.select(owners).n_unique())
        return raw.filter(pl.int_range(pl.len(), 0, -1).over(owners) <= most)
    return raw.tail(MAX_STEPS)


def choose_samples(predictor: TaskPredictor) -> pl.DataFrame:
    """Return classes or captions to generate images of; numbers if there are neither."""
    task: Any = predictor.task
    known = task.captions or task.labels or [str(number) for number in range(MAX_SAMPLES)]
    column = next((field.name for field in predictor.signature.inputs), "class")
    return pl.DataFrame({column: [known[i % len(known)] for i in range(MAX_SAMPLES)]})


def choose_sources(predictor: TaskPredictor, source: str) -> pl.DataFrame:
    """Return held-out inputs of a network that generates."""
    return choose_rows(predictor, source)[0].head(MAX_PROMPTS)


def choose_prompts(predictor: TaskPredictor, source: str) -> pl.DataFrame:
    """Return the first words of held-out texts, or conversations up to the first answer."""
    data, column = choose_held_out(predictor, source), predictor.signature.inputs[0].name
    if data.rows[column].dtype == pl.String:
        return data.rows.head(MAX_PROMPTS).select(pl.col(column).str.split(" ").list.head(PROMPT_WORDS).list.join(" "))
    turns = [[(m["role"], m["content"]) for m in said] for said in data.rows[column].head(MAX_PROMPTS)]
    kept = [[{"role": who, "content": text} for who, text in take_until_answer(row) or []] for row in turns]
    return pl.DataFrame({column: [said for said in kept if said]})


def choose_cases(predictor: TaskPredictor, source: str) -> tuple[pl.DataFrame, Any]:
    """Return the raw rows of labeled series as a table, and their data: held-out series if the run was trained on `source`."""
    data = choose_held_out(predictor, source)
    raw = load(source).raw.rows.with_row_index(ROW)
    rows = [int(data.context.row[case]) for case in data.rows[CASE]]
    owners = [field.name for field in predictor.signature.inputs if field.role == "series"]
    first = raw.filter(pl.col(ROW).is_in(rows))
    if predictor.task.layout == "long":  # type: ignore[attr-defined]
        first = raw.join(first.select(*owners), on=owners, how="semi")
    names = [field.name for field in predictor.signature.inputs if field.name in raw.columns]
    return first.select(names), data


def cut_series(predictor: TaskPredictor, source: str) -> list[pl.DataFrame]:
    """Return requests with the first series of a source, that end at different steps."""
    raw, fields = load(source).raw.rows, predictor.signature.inputs
    raw = raw.select(name for name in raw.columns if name not in (FILE, LINE))
    owners = [field.name for field in fields if field.role == "series"]
    if any(field.name == "*" for field in fields):  # one series per row
        raw = raw.head(MAX_SERIES)
        step = max(1, raw.width // (4 * CUTS))
        return [raw.select(raw.columns[: raw.width - cut * step]) for cut in range(CUTS)]
    if owners:
        raw = raw.join(raw.select(owners).unique(maintain_order=True).head(MAX_SERIES), on=owners, maintain_order="left")
    from_end = pl.int_range(pl.len(), 0, -1)
    from_end = from_end.over(owners) if owners else from_end
    shortest = int(raw.group_by(owners).len()["len"].to_numpy().min()) if owners else raw.height
    step = max(1, shortest // (4 * CUTS))
    return [raw.filter(from_end > cut * step) for cut in range(CUTS)]


def choose_rows(predictor: TaskPredictor, source: str) -> tuple[pl.DataFrame, Any]:
    """Return raw input rows as a table, and their data: held-out rows if the run was trained on `source`."""
    data = choose_held_out(predictor, source)
    if (requests := predictor.task.list_requests(data)) is not None:
        return requests.head(MAX_ROWS), None
    names = [field.name for field in predictor.signature.inputs if field.name in data.rows.columns]
    return join_raw_cells(predictor, predictor.task.read([source]).inputs, data.rows, names), data


def choose_held_out(predictor: TaskPredictor, source: str) -> Any:
    """Return at most `MAX_ROWS` rows of a source, those held out if the run was trained on it. Raises `DataError` if there is none."""
    task = predictor.task.for_request(predictor.task.PredictOptions())
    data = task.read([source], answered=True)
    record = getattr(predictor, "record", None)
    if record and data.manifest.digest == record["data"]["digest"] and len(data) == record["data"]["rows"]:
        splits = predictor.read_splits()  # type: ignore[attr-defined]
        data = data.take(splits.test if len(splits.test) else splits.validation)
    data = data.take(np.sort(sample_rows(np.arange(len(data)), MAX_ROWS, 0)))
    if not len(data):
        raise DataError(f"{source} has no row to verify the export with. Give data with --data.")
    return data


def join_raw_cells(predictor: TaskPredictor, raw: pl.DataFrame | None, rows: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """Return columns of rows, as their cells are written in the file if it is a table; media as absolute paths."""
    found, place = rows.select(names), [FILE, LINE]
    media = [field.name for field in predictor.signature.inputs if field.media_types]
    cells = [name for name in names if name not in media and raw is not None and name in raw.columns]
    if raw is None or not cells or not set(place) <= set(raw.columns) or rows[LINE].null_count():
        return found
    written = rows.select(place).join(raw.select(*place, *cells), on=place, how="left", maintain_order="left")
    return found.with_columns(written[name] for name in cells)


def verify(
    predictor: TaskPredictor,
    folder: Path,
    source: str,
    precision: Precision = "float32",
    chosen: tuple[list[pl.DataFrame], Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Verification:
    """Run an exported folder on raw inputs, by default those of `choose_requests`, and compare its records with the original's.

    `options` are those of the predictions. Answers that a loop generates may differ where they depend on rounding (`find_unstable`). With
    weights in fewer bits, more may differ: see `ALLOWED`. Raises `ExportError` if answers differ because cells were not read.
    """
    tolerance, required = ALLOWED[precision]
    started = time.perf_counter()
    tables, data = chosen or choose_requests(predictor, source)
    batches = BATCHES if predictor.signature.record_for == "row" else [(size, None) for size, _ in BATCHES]
    with tempfile.TemporaryDirectory() as home:
        paths = [Path(home) / f"rows{i}.{'jsonl' if has_lists(table) else 'csv'}" for i, table in enumerate(tables)]
        for path, table in zip(paths, tables):
            (table.write_ndjson if has_lists(table) else table.write_csv)(path)
        given = dict(options or {})
        if predictor.signature.record_for == "sample":
            expected = generate_samples(predictor, tables[0], given)
            given = {"noise": str(write_noise(predictor, Path(home), len(tables[0])))}
        else:
            expected = [record for path in paths for record in predictor.predict(str(path), **given)]
        if not any(field.name == "series" or field.role == "series" for field in predictor.signature.inputs):
            expected = [{name: value for name, value in record.items() if name != "series"} for record in expected]
        is_text = predictor.signature.loop is not None and predictor.signature.loop.kind != "diffusion"
        ties = find_unstable(predictor, paths[0], tolerance, given) if is_text else set()
        found, notes = run_folder(folder, paths, batches, given)
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
        versions=list_versions(),
    )


def generate_samples(predictor: TaskPredictor, table: pl.DataFrame, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the images that the original generates for the classes or captions of a table."""
    if predictor.signature.inputs:
        return list(predictor.predict(table.to_series().to_list(), **options))
    return list(predictor.predict([], **{**options, "count": len(table)}))


def write_noise(predictor: TaskPredictor, home: Path, rows: int) -> Path:
    """Write the noise from which the original generates: rows, draws, then the axes of a sample."""
    objective: Any = predictor.objective
    task: Any = predictor.task
    options, is_gan = task.PredictOptions(), predictor.signature.loop is None
    shape = (objective.noise,) if is_gan else (task.pictures.channels, *(task.pictures.side,) * 2)
    draw = Noise(options.seed, range(rows), shape, torch.empty(()))
    np.save(home / "noise.npy", torch.stack([draw() for _ in range(1 if is_gan else 1 + options.steps)], 1).numpy())
    return home / "noise.npy"


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
    folder: Path, paths: Sequence[Path], batches: Sequence[tuple[int, int | None]], options: Mapping[str, Any]
) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Return the records of each batch size and the printed notes, from a process without torch and fieldguide.

    Raises `ExportError` if it fails.
    """
    command = [
        sys.executable,
        "-I",
        "-c",
        PROGRAM,
        str(folder.resolve()),
        json.dumps(batches),
        json.dumps(dict(options)),
        *map(str, paths),
    ]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT, env=env)
    lines = done.stderr.strip().splitlines()
    if done.returncode:
        raise ExportError(f"{folder}: run.py fails: {lines[-1] if lines else done.returncode}")
    return json.loads(done.stdout), [line for line in lines if line.startswith("column ")]


@dataclass(frozen=True)
class Comparison:
    """The comparison of records.

    Args:
        tolerance: of probabilities, and of other numbers relative to their size.
        threshold: the score from which on objects are part of a record.
        most: objects of a record at most.
    """

    tolerance: float
    threshold: float = 0.0
    most: int = MAX_DETECTIONS

    def compare(self, want: Any, got: Any, rounded: bool = False) -> tuple[float, str]:
        """Return the largest relative difference of numbers, and the first problem, or "". With `rounded`, pixels may differ by 0.1."""
        if isinstance(want, Mapping):
            keys = [key for key, value in want.items() if not is_left_out(key, value, want)]
            if missing := [key for key in keys if not isinstance(got, Mapping) or key not in got]:
                return 0.0, f"{missing[0]!r} is missing"
            pairs = [(key, want[key], got[key]) for key in keys]
            is_tie = is_tied(want, self.tolerance)
        elif isinstance(want, list) and isinstance(got, list) and any(is_scored(one) for one in (*want, *got)):
            return self.compare_objects(want, got)
        elif isinstance(want, list | tuple):
            if not isinstance(got, list | tuple) or len(want) != len(got):
                return 0.0, f"{want!r:.80} against {got!r:.80}"
            pairs, is_tie = [(str(i), a, b) for i, (a, b) in enumerate(zip(want, got))], False
        elif isinstance(want, int | float) and not isinstance(want, bool):
            if not isinstance(got, int | float):
                return 0.0, f"{want!r} against {got!r:.80}"
            if math.isnan(want) and math.isnan(got):
                return 0.0, ""
            difference = abs(want - got) / max(1.0, abs(want))
            return difference, "" if difference <= self.tolerance else f"{want:.6g} against {got:.6g}"
        else:
            return 0.0, "" if want == got else f"{want!r:.80} against {got!r:.80}"
        largest, first = 0.0, ""
        for key, a, b in pairs:
            if rounded and key in ROUNDED and np.allclose(a, b, rtol=0, atol=ROUNDED[key]):
                continue
            if isinstance(a, Media):
                difference, problem = self.compare_images(a, b, 1 if key == MADE_IMAGE else 0)
            else:
                difference, problem = self.compare(a, b, rounded)
            largest = max(largest, difference)
            if problem and not first and not (is_tie and isinstance(a, str)):
                first = f"{key}: {problem}"
        return largest, first

    def compare_images(self, want: Media, got: Any, levels: int) -> tuple[float, str]:
        """Return the fraction of pixels that differ by more than some levels, and the problem if it exceeds the tolerance."""
        a, image = np.asarray(Image.open(io.BytesIO(want.content))), decode_image(got)
        if image is None or np.asarray(image).shape != a.shape:
            return 1.0, "the image has another size or is missing"
        difference = float(np.mean(np.abs(a.astype(int) - np.asarray(image).astype(int)) > levels))
        return difference, "" if difference <= self.tolerance else f"{100 * difference:.2g} % of the pixels differ"

    def compare_objects(self, want: list[Any], got: list[Any]) -> tuple[float, str]:
        """Return what `compare` does for objects in the order of their scores; those of equal score may be in another order.

        An object may be missing on one side if its score is at the threshold, or if the record is full and no score is lower: which
        side of a limit it is on is then decided by rounding.
        """
        left, largest = list(got), 0.0
        for one in want:
            near = [(i, other) for i, other in enumerate(left) if abs(one["score"] - other["score"]) <= self.tolerance]
            compared = [(*self.compare(one, other, True), i) for i, other in near]
            equal = [(difference, i) for difference, problem, i in compared if not problem]
            if equal:
                difference, place = min(equal)
                largest = max(largest, difference)
                left.pop(place)
            elif not self.is_at_limit(one, want, got):
                return largest, f"{one!r:.100} is missing"
        if strange := [one for one in left if not self.is_at_limit(one, want, got)]:
            return largest, f"{strange[0]!r:.100} was not found by the original"
        return largest, ""

    def is_at_limit(self, one: Mapping[str, Any], want: list[Any], got: list[Any]) -> bool:
        """Return whether rounding decides if an object is part of a record."""
        if one["score"] <= self.threshold + self.tolerance:
            return True
        full = [record for record in (want, got) if len(record) >= self.most]
        return any(one["score"] <= min(other["score"] for other in record) + self.tolerance for record in full)


def decode_image(value: Any) -> Image.Image | None:
    """Return a PNG file in a data URL as an image; None for anything else."""
    if not isinstance(value, str) or not value.startswith("data:image/png;base64,"):
        return None
    return Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2])))


def is_left_out(key: str, value: Any, record: Mapping[str, Any]) -> bool:
    """Return whether a value of a record is not compared: the place of a row, a drawing, or the sum of another value."""
    return (
        key == "input"
        or (isinstance(value, Media) and value.suffix == ".jpg")
        or DERIVED.get(key, key) in record.keys() - {key}
    )


def is_scored(value: Any) -> bool:
    return isinstance(value, Mapping) and "score" in value


def is_tied(record: Mapping[str, Any], tolerance: float) -> bool:
    """Return whether the two most probable answers of a record are equally probable, up to the tolerance."""
    p = record.get("probabilities")
    best = sorted(p.values(), reverse=True)[:2] if isinstance(p, Mapping) else []
    return len(best) == 2 and best[0] - best[1] <= 2 * tolerance


def compare_scores(
    predictor: TaskPredictor, data: Any, expected: Sequence[Any], found: Sequence[Any]
) -> dict[str, list[float]]:
    """Return each score of the original and of the export on rows with known targets; empty for other tasks than
    classification and regression.
    """
    task: Any = predictor.task
    if not (hasattr(task, "labels") and all("probabilities" in r for r in expected)) and not hasattr(task, "standard"):
        return {}
    targets = task.targets(data)
    scores = [task.score(collect_outputs(task, records), targets) for records in (expected, found)]
    return {name: [float(score[name]) for score in scores] for name in scores[0]}


def collect_outputs(task: Any, records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return records as the arrays that `Task.score` takes."""
    if hasattr(task, "labels"):
        return {"probabilities": np.array([[r["probabilities"][name] for name in task.labels] for r in records])}
    return {"values": task.standard.apply(np.array([r[task.target.name] for r in records]))[:, None]}


def list_versions() -> dict[str, str]:
    """Return the versions of the packages that ran."""
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "onnxruntime", "torch", "fieldguide")}
