"""One thread for each model: a bounded queue, batches of requests that belong together, and texts generated in slots."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fieldguide.core.errors import FieldguideError
from fieldguide.models.generation.slots import SlotEngine, SlotRow
from fieldguide.serving.errors import RETRY_SECONDS, RequestError
from fieldguide.serving.settings import ServerSettings

LOG = logging.getLogger("fieldguide.serving")
SMOOTHING = 0.1  # of the mean time of a request
WAIT_FRACTION = 0.2  # of the seconds of the last batch, for which a smaller one waits for the clients that were just answered
MAX_WAIT_SECONDS = 0.01


@dataclass(eq=False)
class Job:
    """A request that waits for a model.

    `compute` answers a list of jobs with the same `key` at once, and returns one answer or exception for each. A job without a key is
    computed alone. `rows` counts towards the size of a batch. `texts` are generated in slots instead, by the given `engine`; whoever
    made the job then sets the result.
    """

    compute: Callable[[Sequence[Job]], Sequence[Any]] | None
    payload: Any = None
    key: Hashable = None
    rows: int = 1
    texts: Sequence[SlotRow] = ()
    engine: SlotEngine | None = None
    future: Future[Any] = field(default_factory=Future)
    deadline: float = float("inf")
    abandoned: bool = False  # nobody waits for the answer any more

    def abandon(self) -> None:
        """Give up a job: it leaves the queue, or the slots at the next step."""
        self.abandoned = True
        self.future.cancel()


class Worker:
    """Computes the jobs of one model in one thread, in the order in which they came."""

    def __init__(self, name: str, settings: ServerSettings):
        self.name, self.settings = name, settings
        self.waiting: deque[Job] = deque()
        self.texts: deque[tuple[SlotRow, SlotEngine]] = deque()  # of jobs that have been started
        self.engines: list[SlotEngine] = []
        self.changed = threading.Condition()
        self.stopping = False
        self.seconds = 0.0  # mean time of a job, from start to end
        self.batches, self.batched, self.busy = 0, 0, 0.0
        self.last_jobs, self.last_seconds = 0, 0.0  # of the last batch
        self.thread = threading.Thread(target=self.run, name=f"model-{name}", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Finish what is queued, then end the thread."""
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join(timeout)

    def submit(self, job: Job) -> Future[Any]:
        """Queue a job. Raises `RequestError` (429) if too many wait, and (503) if the server is stopping."""
        with self.changed:
            if self.stopping:
                raise RequestError(503, "the server is stopping", remedy="Send the request to another one.", code="stopping")
            if len(self.waiting) + len(self.texts) >= self.settings.queue:
                seconds = max(RETRY_SECONDS, round(self.seconds * len(self.waiting)))
                raise RequestError(
                    429,
                    f"{len(self.waiting):,} requests wait for {self.name} already",
                    remedy=f"Try again in {seconds} s.",
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self.waiting.append(job)
            self.changed.notify()
        return job.future

    @property
    def depth(self) -> int:
        """The number of requests that wait."""
        return len(self.waiting) + len(self.texts)

    def run(self) -> None:
        """Compute jobs until `stop`."""
        while True:
            batch = self.take_batch()
            if batch is None:
                return
            started = time.monotonic()
            if batch and batch[0].texts:
                for job in batch:
                    self.start_texts(job)
            elif batch:
                self.compute(batch)
            self.step_engines()
            taken = time.monotonic() - started
            self.busy += taken
            if batch and not batch[0].texts:
                self.seconds += SMOOTHING * (taken / len(batch) - self.seconds)

    def take_batch(self) -> list[Job] | None:
        """Return the next jobs that are computed together: none while texts are generated and nothing waits, None at the end."""
        with self.changed:
            while not self.waiting and not self.is_generating:
                if self.stopping:
                    return None
                self.changed.wait()
            batch: list[Job] = []
            while self.waiting and not batch:
                self.take_first(batch)
            if not batch or batch[0].key is None:
                return batch
            if not self.is_generating:
                self.wait_for_others(batch[0])
            self.take_matching(batch)
            return batch

    def wait_for_others(self, first: Job) -> None:
        """Wait for jobs that can join one: `max_wait_ms` for a full batch, or a moment for as many jobs as the last batch had.

        Clients that were just answered often ask again at once. Without this wait, batches of 1 and of all other clients take turns.
        """
        seconds, jobs = self.settings.max_wait_ms / 1000, self.settings.max_batch
        if not seconds:
            seconds, jobs = min(WAIT_FRACTION * self.last_seconds, MAX_WAIT_SECONDS), self.last_jobs
        end = time.monotonic() + seconds
        while not self.stopping:
            rows = [first.rows, *(job.rows for job in self.waiting if job.key == first.key)]
            left = end - time.monotonic()
            if len(rows) >= jobs or sum(rows) >= self.settings.max_batch or left <= 0:
                return
            self.changed.wait(left)

    @property
    def is_generating(self) -> bool:
        """Whether there are texts to generate."""
        return bool(self.texts) or any(engine.is_active for engine in self.engines)

    def take_first(self, batch: list[Job]) -> None:
        """Move the first job into the batch, or reject it if its time is over."""
        job = self.waiting.popleft()
        if start_job(job):
            batch.append(job)

    def take_matching(self, batch: list[Job]) -> None:
        """Move the jobs that can join the first one of the batch, in order, up to the largest batch."""
        first, rows = batch[0], batch[0].rows
        kept: list[Job] = []
        while self.waiting and rows < self.settings.max_batch:
            job = self.waiting.popleft()
            if job.key != first.key or rows + job.rows > self.settings.max_batch:
                kept.append(job)
            elif start_job(job):
                batch.append(job)
                rows += job.rows
        self.waiting.extendleft(reversed(kept))

    def compute(self, batch: Sequence[Job]) -> None:
        """Answer a batch."""
        self.batches += 1
        self.batched += sum(job.rows for job in batch)
        self.last_jobs, started = len(batch), time.monotonic()
        compute = batch[0].compute
        assert compute is not None
        try:
            answers = compute(batch)
        except Exception as error:  # noqa: BLE001  # whatever a model raises is answered
            answers = [error] * len(batch)
        self.last_seconds = time.monotonic() - started
        for job, answer in zip(batch, answers):
            if isinstance(answer, BaseException):
                if not isinstance(answer, FieldguideError | RequestError):
                    LOG.error("%s failed", self.name, exc_info=answer)
                job.future.set_exception(answer)
            else:
                job.future.set_result(answer)

    def start_texts(self, job: Job) -> None:
        """Queue the texts of a job for the slots."""
        assert job.engine is not None
        if job.engine not in self.engines:
            self.engines = [engine for engine in self.engines if engine.is_active] + [job.engine]
        self.texts.extend((text, job.engine) for text in job.texts)

    def step_engines(self) -> None:
        """Let texts join free slots, and generate one token of each text."""
        later: list[tuple[SlotRow, SlotEngine]] = []
        while self.texts:
            text, engine = self.texts.popleft()
            if text.is_cancelled():
                text.on_end("cancelled")
            elif not engine.has_room:
                later.append((text, engine))
            else:
                self.attempt(engine, lambda engine=engine, text=text: engine.admit(text), text)  # type: ignore[misc]
        self.texts.extend(later)
        for engine in self.engines:
            if engine.is_active:
                self.attempt(engine, engine.step)

    def attempt(self, engine: SlotEngine, action: Callable[[], None], text: SlotRow | None = None) -> None:
        """Do something with an engine; if it fails, the texts concerned end with the error, and the thread goes on."""
        try:
            action()
        except Exception as error:  # whatever a model raises is answered
            LOG.error("%s failed", self.name, exc_info=error)
            if text is not None and text not in engine.rows:
                text.on_end(error)
            else:
                engine.drop(list(engine.rows), error)
                engine.cache = None


def start_job(job: Job) -> bool:
    """Mark a job as running; return whether anyone still waits for it."""
    if time.monotonic() > job.deadline and job.future.set_running_or_notify_cancel():
        job.future.set_exception(timeout_error())
        return False
    return not job.future.done() and job.future.set_running_or_notify_cancel()


def timeout_error() -> RequestError:
    """Return the error for a request that took too long."""
    return RequestError(504, "the answer took too long", remedy="Send fewer rows, or try again later.", code="timeout")
