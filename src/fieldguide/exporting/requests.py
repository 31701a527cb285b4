"""Raw inputs with which exports are verified: held-out rows, as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from PIL import Image

from fieldguide.core.errors import DataError
from fieldguide.data.dataset import FILE, LINE
from fieldguide.data.preprocessing.conversations import take_until_answer
from fieldguide.data.read import load
from fieldguide.data.splits import sample_rows
from fieldguide.data.timeseries.cases import CASE
from fieldguide.tasks.text.text_generation import PROMPT_WORDS

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

MAX_ROWS = 512  # that are compared
MAX_PROMPTS = 64  # that are answered
MAX_SAMPLES = 64  # that are generated
MAX_IMAGES = 4  # different ones, in requests for samples
MAX_STEPS = 2048  # of series, if each step has a record
ROW = "#row"  # a column of row numbers
MAX_SERIES, CUTS = 32, 8  # of a request of series, and how many requests end at different steps


def choose_requests(predictor: TaskPredictor, source: str) -> tuple[list[pl.DataFrame], Any]:
    """Return tables of raw inputs, each of which is a request, and the data of the first if scores are compared."""
    if predictor.signature.record_for == "sample":
        return [choose_samples(predictor)], None
    if predictor.signature.series is not None:
        return cut_series(predictor, source), None
    if predictor.signature.record_for == "step":
        return [choose_steps(predictor, source)], None
    if predictor.signature.record_for == "user":
        return [choose_events(predictor, source)], None
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


def choose_events(predictor: TaskPredictor, source: str) -> pl.DataFrame:
    """Return the raw events of users whose last item is held out."""
    fields, raw = predictor.signature.inputs, load(source).raw.rows
    user = next(field.name for field in fields if field.role == "user")
    chosen = choose_held_out(predictor, source).rows[user]
    raw = raw.filter(pl.col(user).cast(pl.String).str.strip_chars().is_in(chosen.to_list()))
    return raw.select(field.name for field in fields if field.name in raw.columns)


def choose_samples(predictor: TaskPredictor) -> pl.DataFrame:
    """Return classes or captions to generate samples of; numbers if there are neither."""
    task: Any = predictor.task
    known = task.captions or task.labels or [str(number) for number in range(MAX_SAMPLES)]
    column = next((field.name for field in predictor.signature.inputs if not field.media_types), "class")
    return pl.DataFrame({column: [known[i % len(known)] for i in range(MAX_SAMPLES)]})


def add_images(predictor: TaskPredictor, table: pl.DataFrame, home: Path) -> pl.DataFrame:
    """Return requests for samples with an image in every second row, if they may have one, of several sizes, written to a folder."""
    names = [field.name for field in predictor.signature.inputs if field.media_types]
    if not names:
        return table
    random, paths = np.random.default_rng(0), [home / f"image{number}.png" for number in range(MAX_IMAGES)]
    for number, path in enumerate(paths):
        Image.fromarray(random.integers(0, 256, (20 + 9 * number, 40, 3), dtype=np.uint8)).save(path)
    used = [str(paths[row // 2 % len(paths)]) if row % 2 else None for row in range(len(table))]
    return table.with_columns(pl.Series(name, used, dtype=pl.String) for name in names)


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
    series = predictor.signature.series
    if series is None or all(field.role in ("series", "time", "target") for field in fields):
        return [raw.filter(from_end > cut * step) for cut in range(CUTS)]
    targets = [field.name for field in fields if field.role == "target"]  # empty in steps whose covariates are given
    blank = lambda cut: [pl.when(from_end > cut * step).then(pl.col(name)).alias(name) for name in targets]
    return [raw.with_columns(blank(cut)).filter(from_end > cut * step - series.horizon) for cut in range(CUTS)]


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
    if is_training_data(predictor, data):
        splits = predictor.read_splits()  # type: ignore[attr-defined]
        data = data.take(splits.test if len(splits.test) else splits.validation)
    data = data.take(np.sort(sample_rows(np.arange(len(data)), MAX_ROWS, 0)))
    if not len(data):
        raise DataError(f"{source} has no row to verify the export with. Give data with --data.")
    return data


def is_training_data(predictor: TaskPredictor, data: Any) -> bool:
    """Return whether data is what a run was trained on."""
    record: dict[str, Any] = getattr(predictor, "record", None) or {}
    return bool(record) and data.manifest.digest == record["data"]["digest"] and len(data) == record["data"]["rows"]


def choose_training_rows(predictor: TaskPredictor, most: int) -> pl.DataFrame | None:
    """Return some raw rows of the training part of a run, `most` at most; None for networks that are no run, or whose data has changed."""
    if (record := getattr(predictor, "record", None)) is None:
        return None
    data = predictor.task.for_request(predictor.task.PredictOptions()).read([record["data"]["source"]], answered=True)
    if not is_training_data(predictor, data):
        return None
    data = data.take(np.sort(sample_rows(predictor.read_splits().train, most, 0)))  # type: ignore[attr-defined]
    return data.rows.select(field.name for field in predictor.signature.inputs if field.name in data.rows.columns)


def join_raw_cells(predictor: TaskPredictor, raw: pl.DataFrame | None, rows: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """Return columns of rows, as their cells are written in the file if it is a table; media as absolute paths."""
    found, place = rows.select(names), [FILE, LINE]
    media = [field.name for field in predictor.signature.inputs if field.media_types]
    cells = [name for name in names if name not in media and raw is not None and name in raw.columns]
    if raw is None or not cells or not set(place) <= set(raw.columns) or rows[LINE].null_count():
        return found
    written = rows.select(place).join(raw.select(*place, *cells), on=place, how="left", maintain_order="left")
    return found.with_columns(written[name] for name in cells)
