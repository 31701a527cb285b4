"""The models of a server: each is a predictor with what is needed to read requests, batch them and replace it by a newer run."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fieldguide.core.errors import FieldguideError, RunError, SettingsError, nearest
from fieldguide.core.media import Media
from fieldguide.core.run_record import USABLE_STATUSES, read_record
from fieldguide.core.signature import InputField, Signature
from fieldguide.data.dataset import CellProblems
from fieldguide.inference.pipeline import open_source
from fieldguide.inference.predictor import Predictor, TaskPredictor
from fieldguide.inference.source_kind import detect_kind
from fieldguide.models.generation.slots import SlotEngine, SlotRow
from fieldguide.serving.errors import RequestError, describe_failure, hide_folder
from fieldguide.serving.json_values import to_data_url
from fieldguide.serving.language import LanguageModel, Prompt, build_prompt, find_language_model
from fieldguide.serving.media_files import RequestFolder
from fieldguide.serving.row_types import (
    MEDIA_KINDS,
    Cells,
    RowReader,
    build_frame,
    build_option_type,
    build_row_reader,
    measure,
    message_to_dict,
    to_cells,
)
from fieldguide.serving.settings import ServerSettings
from fieldguide.serving.worker import Job, Worker

LOG = logging.getLogger("fieldguide.serving")
PLACE = "memory:"  # how predictors name rows that are in no file


@dataclass(frozen=True)
class Answer:
    """The records of a request, with notes and the cells that do not fit the training data."""

    records: list[dict[str, Any]]
    notes: tuple[str, ...] = ()
    problems: tuple[dict[str, Any], ...] = ()


@dataclass(eq=False)
class Request:
    """A request that was read: the inputs of a predictor, options, and the names of uploaded files by row.

    `columns` are those of a table; without them, `values` are passed to the predictor as they are.
    """

    model: LoadedModel
    options: dict[str, Any]
    folder: RequestFolder
    columns: dict[str, Cells] | None = None
    values: list[Any] = field(default_factory=list)
    names: Sequence[str] = ()
    prompts: list[Prompt] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)  # inputs as records show them

    @property
    def rows(self) -> int:
        """The number of rows."""
        return max(1, len(self.values)) if self.columns is None else len(next(iter(self.columns.values())).values)


class CompanyCheck:
    """A hook of a network that stops computing, before its next step, if nobody waits for an answer any more."""

    def __init__(self) -> None:
        self.jobs: Sequence[Job] = ()  # those that are computed now

    def __call__(self, *_: Any) -> None:
        if self.jobs and all(job.abandoned for job in self.jobs):
            raise RequestError(499, "nobody waits for the answer", code="cancelled")

    def __deepcopy__(self, memo: dict[int, Any]) -> CompanyCheck:
        return self  # some tasks copy their network, and the copy has to stop, too


class LoadedModel:
    """A predictor that is in memory. A newer run at the same path becomes another one."""

    def __init__(self, name: str, source: str, settings: ServerSettings, predictor: Predictor, stamp: object = None):
        self.name, self.source, self.settings, self.predictor, self.stamp = name, source, settings, predictor, stamp
        self.created = int(time.time())
        self.notes: list[str] = predictor.get_notes()  # loads the weights
        predictor.model.eval()
        self.signature: Signature = predictor.signature
        self.reader: RowReader = build_row_reader(self.signature)
        self.option_type = build_option_type(self.signature)
        self.language: LanguageModel | None = find_language_model(predictor)
        self.company = CompanyCheck()
        predictor.model.register_forward_pre_hook(self.company)

    @cached_property
    def engine(self) -> SlotEngine:
        """The slots in which this language model generates."""
        return SlotEngine(self.predictor.model, self.settings.slots)  # type: ignore[arg-type]  # has `new_cache` and `last`

    @cached_property
    def embeds(self) -> bool:
        """Whether the model has a vector for each text."""
        predictor = self.predictor
        if not isinstance(predictor, TaskPredictor) or "vector" not in predictor.card.output_types:
            return False
        length = getattr(predictor.model.config, "length", 0)
        return bool(length) and predictor.task.encode_texts(["text"], length) is not None

    @cached_property
    def image_field(self) -> str:
        """The value of records that is a generated image; "" for other models."""
        made = (f.name for f in self.signature.record if any(kind.startswith("image/") for kind in f.media_types))
        return next(made, "") if self.signature.record_for == "sample" else ""

    @cached_property
    def can_join(self) -> bool:
        """Whether rows of several requests may share a batch.

        They may if each row is an example of its own, nothing is drawn at random, all cells are read alone (not as a column), and
        every axis that differs between rows is masked, so that padding has no effect.
        """
        s = self.signature
        if s.loop is not None or s.record_for != "row" or s.row_form != "table" or self.reader.others is not None:
            return False
        if any(f.kind in ("date", "boxes", "mask", "messages") and not f.format for f in s.inputs):
            return False
        masked = {axis.name for tensor in s.tensors if tensor.dtype == "bool" for axis in tensor.axes}
        masked |= {tensor.counts for tensor in s.tensors if tensor.counts}
        return all(name == "batch" or name in masked for name in s.dynamic_axes)

    # Reading requests

    @property
    def max_rows(self) -> int:
        """The largest number of rows of a request."""
        return min(self.settings.max_rows, self.signature.limits.rows or self.settings.max_rows)

    def check_count(self, count: int) -> None:
        """Raise `RequestError` for a request without rows or with too many."""
        takes_none = self.signature.row_form == "value" and not any(f.required for f in self.signature.inputs)
        if count == 0 and not takes_none:
            raise RequestError(422, "the request has no rows", place="rows", remedy='Send {"rows": [...]}.', code="no_rows")
        if count > self.max_rows:
            raise RequestError(
                422,
                f"the request has {count:,} rows",
                place="rows",
                remedy=f"Send at most {self.max_rows:,} at once.",
                code="too_many_rows",
            )

    def read_rows(self, rows: Sequence[Any], options: Mapping[str, Any], names: Sequence[str] = ()) -> Request:
        """Return a request from decoded rows. Raises `RequestError` for rows that cannot be read."""
        self.check_count(len(rows))
        folder = RequestFolder(self.settings)
        try:
            if self.signature.row_form == "value":
                return self.read_values(rows, options, folder)
            columns = self.reader.to_columns(rows)
            fields = {f.name: f for f in self.reader.fields}
            if sum(measure(c) for n, cells in columns.items() if not is_media(fields.get(n)) for c in cells) > self.text_limit:
                raise self.text_error()
            for name, cells in columns.items():
                if is_media(known := fields.get(name)) and known is not None:
                    columns[name] = [
                        None if c is None else folder.store_data_url(known, c, f"rows[{i}].{name}") for i, c in enumerate(cells)
                    ]
            if not columns:
                raise RequestError(422, "the rows are empty", place="rows", remedy=f"Columns: {', '.join(fields)}.")
            typed = {name: to_cells(fields.get(name), cells) for name, cells in columns.items()}
            request = Request(self, dict(options), folder, typed, names=names)
            if self.language is not None:
                self.read_prompts(request, self.list_prompts(columns))
            return request
        except BaseException:
            folder.remove()
            raise

    @property
    def text_limit(self) -> int:
        """The largest number of characters of a request."""
        return self.settings.max_text_characters

    def text_error(self) -> RequestError:
        """Return the error for a request with too much text."""
        return RequestError(413, f"the request has more than {self.text_limit:,} characters", code="too_much_text")

    def read_values(self, rows: Sequence[Any], options: Mapping[str, Any], folder: RequestFolder) -> Request:
        """Return a request whose rows are the values of a single input."""
        values = [row if isinstance(row, str | list) or row is None else row.f0 for row in rows]
        if sum(map(measure, values)) > self.text_limit:
            raise self.text_error()
        plain = [[message_to_dict(m) for m in v] if isinstance(v, list) else v for v in values if v is not None]
        request = Request(self, dict(options), folder, None, plain)
        if self.language is not None:
            self.read_prompts(request, plain)
        return request

    def list_prompts(self, columns: Mapping[str, Sequence[Any]]) -> list[Any]:
        """Return the prompts in the only column of a language model."""
        cells = next(iter(columns.values()))
        return [[message_to_dict(m) for m in c] if isinstance(c, list) else c or "" for c in cells]

    def read_prompts(self, request: Request, prompts: Sequence[Any]) -> None:
        """Turn the prompts of a request into tokens."""
        assert self.language is not None
        options = dict(request.options)
        chat = options.pop("chat", None)
        try:
            for prompt in prompts:
                is_text = isinstance(prompt, str)
                if self.signature.row_form == "value" and is_text and self.language.chats and chat is not False:
                    tokens = self.language.encode_messages([{"role": "user", "content": prompt}])
                else:
                    tokens = self.language.encode_text(prompt) if is_text else self.language.encode_messages(prompt)
                request.prompts.append(build_prompt(self.language, tokens, options, self.settings.max_new_tokens))
        except FieldguideError as error:
            raise describe_failure(error) from None
        names = [f"{PLACE}{i + 1}" for i in range(len(prompts))]
        request.shown = list(prompts) if self.signature.row_form == "value" else names

    def read_csv(self, content: bytes, options: Mapping[str, Any]) -> Request:
        """Return a request whose rows are a CSV file."""
        if self.reader.media or self.signature.row_form == "value" or self.language is not None:
            raise RequestError(
                415,
                f"{self.name} is not called with CSV",
                remedy="Send JSON with data URLs, or upload files as multipart/form-data."
                if self.reader.media
                else "Send JSON.",
            )
        lines = content.count(b"\n") + 1
        if lines > self.max_rows + 1:
            self.check_count(lines - 1)
        folder = RequestFolder(self.settings)
        try:
            return Request(self, dict(options), folder, None, [folder.store(content, ".csv", "rows")])
        except BaseException:
            folder.remove()
            raise

    # Computing

    def make_job(self, request: Request) -> Job:
        """Return the job of a request."""
        if request.prompts and all(prompt.config.effective_beams == 1 for prompt in request.prompts):
            return self.make_text_job(request)
        key = None
        if self.can_join and request.columns is not None:  # columns that are left out, or of another type, make another table
            types = tuple((name, str(cells.dtype)) for name, cells in request.columns.items())
            key = (id(self), repr(sorted(request.options.items())), types)
        job = Job(self.compute, request, key, request.rows)
        job.future.add_done_callback(request.folder.remove)
        return job

    def compute(self, jobs: Sequence[Job]) -> list[Any]:
        """Return the answer, or an exception, of each request."""
        self.company.jobs = jobs
        try:
            return self.compute_requests(jobs)
        finally:
            self.company.jobs = ()

    def compute_requests(self, jobs: Sequence[Job]) -> list[Any]:
        """Compute requests together if they may share a batch, else one by one."""
        requests = [job.payload for job in jobs]
        if len(requests) > 1 and (answers := self.compute_together(requests)) is not None:
            return answers
        found: list[Any] = []
        for request in requests:
            try:
                found.append(self.compute_alone(request))
            except Exception as error:  # noqa: BLE001  # of one request; the others are computed all the same
                found.append(error)
        return found

    def compute_together(self, requests: Sequence[Request]) -> list[Answer] | None:
        """Return the answers of several requests that were computed as one, or None if they must be computed alone.

        That is the case if anything is to be said about a row: a note or an error belongs to its request only.
        """
        frame = build_frame([request.columns for request in requests if request.columns is not None])
        try:
            found = self.predictor.predict([frame], **requests[0].options)
        except FieldguideError:
            return None
        if len(found) != frame.height or found.problems or found.notes != self.notes or any("error" in r for r in found):
            return None
        answers, first = [], 0
        for request in requests:
            records = found[first : first + request.rows]
            first += request.rows
            answers.append(Answer(self.name_inputs(request, records), tuple(self.notes)))
        return answers

    def compute_alone(self, request: Request) -> Answer:
        """Return the answer of a request. Raises `RequestError` if none of its rows can be read."""
        path = request.folder.path
        try:
            with torch.inference_mode():
                inputs = request.values if request.columns is None else [build_frame([request.columns])]
                found = self.predictor.predict(inputs, **request.options)
        except FieldguideError as error:
            raise describe_failure(error, path) from None
        records = list(found)
        if records and all("error" in record for record in records):
            text = hide_folder("; ".join(dict.fromkeys(str(record["error"]) for record in records[:3])), path)
            raise RequestError(422, f"no row can be read: {text}", place="rows", code="unusable_input")
        for record in records:
            if "error" in record:
                record["error"] = hide_folder(str(record["error"]), path)
            record["input"] = hide_folder(str(record["input"]), path) if path else record["input"]
        notes = tuple(hide_folder(note, path) for note in found.notes)
        problems = tuple(describe_cells(problem, path) for problem in found.problems)
        return Answer(self.name_inputs(request, records), notes, problems)

    def name_inputs(self, request: Request, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return records whose inputs are named by the rows of the request, or by the files that were uploaded."""
        records = [{name: to_data_url(v) if isinstance(v, Media) else v for name, v in r.items()} for r in records]
        if self.signature.record_for not in ("row", "pair") or len(records) != request.rows or request.columns is None:
            return records
        names = request.names or [f"{PLACE}{i + 1}" for i in range(len(records))]
        return [{**record, "input": name} for record, name in zip(records, names)]

    def make_text_job(self, request: Request) -> Job:
        """Return the job of a request whose answers are generated in slots."""
        assert self.language is not None
        rows = [prompt.make_row(self.language, i) for i, prompt in enumerate(request.prompts)]
        job = Job(None, request, rows=len(rows), texts=rows, engine=self.engine)
        results: list[dict[str, Any] | None] = [None] * len(rows)

        def end(index: int, reason: str | BaseException) -> None:
            if job.future.done():
                return
            if isinstance(reason, BaseException):
                job.future.set_exception(reason)
                return
            if reason == "cancelled":
                if not job.future.cancelled():
                    job.future.set_exception(RequestError(499, "the client is gone", code="cancelled"))
                return
            results[index] = {"input": request.shown[index], "text": self.finish_text(rows[index])}
            if all(result is not None for result in results):
                notes = (*self.notes, *getattr(getattr(self.predictor, "published", None), "notes", ()))
                job.future.set_result(Answer([r for r in results if r is not None], notes))

        for i, row in enumerate(rows):
            row.on_end = lambda reason, i=i: end(i, reason)  # type: ignore[misc]
            row.is_cancelled = lambda: job.abandoned
        return job

    def finish_text(self, row: SlotRow) -> str:
        """Return the text of an answer."""
        return row.decoder.text


def open_model(name: str, source: str, settings: ServerSettings) -> LoadedModel:
    """Return a loaded model. Raises `RunError`, `WeightsError` or `SettingsError`."""
    stamp = read_stamp(source)
    if detect_kind(source) == "run" and (status := read_record(Path(source))["status"]) not in USABLE_STATUSES:
        raise RunError(f"{source} is still {status}. Serve it when it is finished: `fieldguide fit --finish {source}`.")
    predictor, _ = open_source(source, {})
    return LoadedModel(name, source, settings, predictor, stamp)


def read_stamp(source: str) -> object:
    """Return what changes when another run is put in the place of one; None for other sources."""
    if detect_kind(source) != "run":
        return None
    path = Path(source) / "run.json"
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, str(path.resolve())


class ServedModel:
    """A model under a name, with its worker. `current` is replaced when a newer run appears at its path."""

    def __init__(self, current: LoadedModel, settings: ServerSettings):
        self.name, self.settings, self.current = current.name, settings, current
        self.worker = Worker(self.name, self.settings)
        self.reloads = 0
        self.failed: object = None  # the stamp of a run that could not be loaded

    def reload(self) -> bool:
        """Load a newer finished run if there is one; return whether the model was replaced.

        Requests that are queued are answered by the model for which they were read. A run that cannot be loaded is logged once, and
        the present model stays.
        """
        stamp, source = read_stamp(self.current.source), self.current.source
        if stamp is None or stamp in (self.current.stamp, self.failed):
            return False
        try:
            if read_record(Path(source))["status"] not in USABLE_STATUSES:
                return False
            newer = open_model(self.name, source, self.settings)
        except Exception as error:  # noqa: BLE001  # a folder that is being written may be damaged in any way
            self.failed = stamp
            LOG.warning("%s: a newer run cannot be loaded, the present one stays: %s", source, error)
            return False
        self.current = newer
        freeze_objects()
        self.reloads += 1
        LOG.info("%s: the newer run at %s is served", self.name, source)
        return True


def freeze_objects() -> None:
    """Exempt what is in memory now from full garbage collections, each of which would delay all requests by .1 s or more.

    Objects that were exempt before, such as those of a model that was replaced, are collected first.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class ModelPool:
    """The models of a server by name."""

    def __init__(self, models: Sequence[LoadedModel], settings: ServerSettings):
        self.settings = settings
        self.served = {model.name: ServedModel(model, settings) for model in models}
        self.stopped = threading.Event()
        self.watcher = threading.Thread(target=self.watch, name="reload", daemon=True)

    def start(self) -> None:
        """Start the workers, and look for newer runs."""
        freeze_objects()
        for served in self.served.values():
            served.worker.start()
        if self.settings.reload_seconds:
            self.watcher.start()

    def watch(self) -> None:
        """Look for newer runs from time to time."""
        while not self.stopped.wait(self.settings.reload_seconds):
            for served in self.served.values():
                served.reload()

    def stop(self) -> None:
        """Finish what is queued, and end all threads."""
        self.stopped.set()
        for served in self.served.values():
            served.worker.stop()
        gc.unfreeze()

    def get(self, name: str | None) -> ServedModel:
        """Return a model by name; without a name, the only model. Raises `RequestError` (404)."""
        if name is None and len(self.served) == 1:
            return next(iter(self.served.values()))
        if name in self.served:
            return self.served[name]
        known = ", ".join(self.served)
        if name is None:
            raise RequestError(422, "several models are served", place="model", remedy=f"Name one: {known}.", code="no_model")
        text = f"there is no model {name[:80]!r}"
        remedy = f"{nearest(name, self.served)} Served: {known}.".strip()
        raise RequestError(404, text, place="model", remedy=remedy, code="model_not_found")


def open_models(sources: Sequence[str], settings: ServerSettings) -> list[LoadedModel]:
    """Return the models of sources: paths or names, or NAME=PATH. Raises `SettingsError` if two have the same name."""
    named: dict[str, str] = {}
    for text in sources:
        name, mark, source = text.partition("=")
        if not mark or "/" in name or Path(text).exists():
            name, source = Path(text).name or Path(text).resolve().name, text
        if name in named:
            raise SettingsError(
                f"two models are called {name}: {named[name]} and {source}. Give one another name: NAME={source}."
            )
        named[name] = source
    return [open_model(name, source, settings) for name, source in named.items()]


def is_media(known: InputField | None) -> bool:
    """Return whether an input is a file."""
    return known is not None and known.kind in MEDIA_KINDS


def describe_cells(problem: CellProblems, folder: str) -> dict[str, Any]:
    """Return the cells of a column that do not fit the training data."""
    examples = [hide_folder(f"{place}: {value}", folder) for place, value in problem.examples]
    rows = list(problem.rows)
    return {"column": problem.column, "what": problem.what, "detail": problem.detail, "rows": rows, "examples": examples}
