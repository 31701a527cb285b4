"""Waiting for an answer: with a time limit, and only as long as the client is there."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest

from fieldguide.serving.errors import RequestError
from fieldguide.serving.metrics import Metrics
from fieldguide.serving.models import Answer, Request, ServedModel
from fieldguide.serving.worker import Job, timeout_error

CLIENT_GONE = 499  # a status that nobody receives; for the counters


async def wait_for_disconnect(http: HttpRequest) -> None:
    """Return when the client is gone. Call it after the body was read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def wait_for_answer(job: Job, http: HttpRequest, seconds: float, metrics: Metrics) -> Any:
    """Return the result of a queued job. Raises `RequestError` after `seconds`; a job is given up if the client leaves."""
    answer = asyncio.wrap_future(job.future)
    gone = asyncio.ensure_future(wait_for_disconnect(http))
    try:
        await asyncio.wait({answer, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            metrics.disconnects += 1
            raise RequestError(CLIENT_GONE, "the client is gone", code="cancelled")
        raise timeout_error()
    finally:
        gone.cancel()
        if not answer.done():
            job.abandon()
            answer.add_done_callback(retrieve)
            answer.cancel()


def retrieve(answer: asyncio.Future[Any] | Future[Any]) -> None:
    """Read the exception of an answer that nobody waits for, so that it is not logged as forgotten."""
    if not answer.cancelled():
        answer.exception()


async def answer_request(served: ServedModel, request: Request, http: HttpRequest, metrics: Metrics) -> Answer:
    """Queue a request that was read and return its answer."""
    job = request.model.make_job(request)
    job.deadline = time.monotonic() + served.settings.timeout
    try:
        served.worker.submit(job)
    except RequestError:
        request.folder.remove()
        raise
    return await wait_for_answer(job, http, served.settings.timeout, metrics)


async def read_in_thread(function: Any, *arguments: Any, heavy: bool = True) -> Any:
    """Call a function that reads a request: in a thread if it decodes or tokenizes much."""
    return await run_in_threadpool(function, *arguments) if heavy else function(*arguments)
