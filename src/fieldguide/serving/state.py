"""What all endpoints of a server share."""

from __future__ import annotations

from dataclasses import dataclass, field

from fieldguide.serving.metrics import Metrics
from fieldguide.serving.models import ModelPool
from fieldguide.serving.settings import ServerSettings


@dataclass
class ServerState:
    """The models, settings and counters of a server."""

    pool: ModelPool
    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)
    stopping: bool = False
