"""A server on a real socket, in a thread of the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from fieldguide.serving.app import build_app
from fieldguide.serving.models import LoadedModel
from fieldguide.serving.server import open_socket
from fieldguide.serving.settings import ServerSettings


@contextmanager
def live_server(models: list[LoadedModel], settings: ServerSettings) -> Iterator[str]:
    """Serve models, and yield the address."""
    opened = open_socket("127.0.0.1", 0)
    app = build_app(models, settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        opened.close()
        assert not thread.is_alive()
