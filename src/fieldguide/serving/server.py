"""`fieldguide serve`: models on a port."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
import uvicorn

from fieldguide.core.errors import SettingsError
from fieldguide.serving.app import build_app
from fieldguide.serving.models import LoadedModel, open_models
from fieldguide.serving.settings import ServerSettings

BACKLOG = 2048  # connections that wait to be accepted
SMALL_PARAMETERS = 50_000_000  # up to here, another core for requests brings more than another thread for the network
SWITCH_SECONDS = 5e-4  # after which a thread passes the interpreter on: a request passes through four threads in turn


class Server(uvicorn.Server):
    """A server that says that it is not ready as soon as it is told to stop, finishes what it has begun, and then ends."""

    def __init__(self, config: uvicorn.Config, state: Any):
        super().__init__(config)
        self.server_state_of_app = state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second signal ends the process at once. The signal is not raised again, so that the exit code is 0."""
        self.server_state_of_app.stopping = True
        self.force_exit = self.should_exit
        self.should_exit = True


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that has a port, but does not listen yet, so that clients are refused until the models are loaded.

    Raises `SettingsError` if the port is taken or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only where this is stated
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host.strip("[]"), port))
    except OSError as error:
        opened.close()
        raise SettingsError(
            f"cannot listen on {host}, port {port}: {error.strerror}. Choose another with --host and --port."
        ) from None
    return opened


class ModelServer:
    """Loaded models with a port."""

    def __init__(self, sources: Sequence[str], settings: ServerSettings):
        self.settings = settings
        self.socket = open_socket(settings.host, settings.port)  # first, since loading may take long
        try:
            self.models = open_models(sources, settings)
        except BaseException:
            self.socket.close()
            raise
        self.app = build_app(self.models, settings)
        limit_threads(self.models)

    @property
    def address(self) -> str:
        """The address of the server."""
        host = f"[{self.settings.host.strip('[]')}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.socket.getsockname()[1]}"

    def serve_forever(self) -> None:
        """Serve until the process is told to stop (SIGTERM or SIGINT)."""
        sys.setswitchinterval(SWITCH_SECONDS)
        logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
        config = uvicorn.Config(
            self.app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30, backlog=BACKLOG
        )
        self.socket.listen(BACKLOG)  # before the address is printed: a client that reads it may connect at once
        for model in self.models:
            print(f"{model.name}: {model.signature.task or model.signature.architecture} with {model.predictor.name}")
        print(f"Serving on {self.address}. The form is at /, the schema at /openapi.json. Stop with Ctrl-C.", flush=True)
        try:
            Server(config, self.app.state.server).run(sockets=[self.socket])
        finally:
            self.socket.close()


def limit_threads(models: Sequence[LoadedModel]) -> None:
    """Leave a core to requests if all networks are small: idle threads of OpenMP keep their cores busy between two operators."""
    sizes = [sum(p.numel() for p in model.predictor.model.parameters()) for model in models]
    if "OMP_NUM_THREADS" not in os.environ and max(sizes, default=0) < SMALL_PARAMETERS:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def load_server(sources: Sequence[str], settings: ServerSettings) -> ModelServer:
    """Return a server with its models loaded. Raises `SettingsError` if the port is taken."""
    return ModelServer(sources, settings)
