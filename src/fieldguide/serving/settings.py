"""Settings of the server: where it listens, who may call it, and the largest requests."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from fieldguide.core.errors import SettingsError

MIN_KEY_CHARACTERS = 8


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server. Limits apply before anything is decoded.

    `max_batch` rows of several requests share a batch; `max_wait_ms` is how long an idle model waits for more of them, 0 for a fraction
    of the time of the last batch, if that had more. `queue` requests may wait for a model, more are rejected (429).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()  # names, in addition to localhost and IP addresses
    max_batch: int = 128
    max_wait_ms: float = 0.0
    queue: int = 256
    timeout: float = 120.0  # seconds until a request gets 504
    slots: int = 16  # texts that a language model generates at the same time
    reload_seconds: float = 5.0  # between looks for a newer run; 0: never
    max_body_bytes: int = 64 << 20
    max_file_bytes: int = 32 << 20
    max_rows: int = 10_000
    max_pixels: int = 50_000_000
    max_samples: int = 60_000_000  # of a recording: an hour at 16 kHz
    max_text_characters: int = 1_000_000  # of a request
    max_choices: int = 8  # answers to one prompt
    max_new_tokens: int = 32_768

    def __post_init__(self) -> None:
        for name, least in (("max_batch", 1), ("queue", 1), ("slots", 1), ("max_wait_ms", 0), ("timeout", 0.001)):
            if getattr(self, name) < least:
                raise SettingsError(f"{name.replace('_', '-')}={getattr(self, name)} must be at least {least}.")
        if not 0 <= self.port <= 65_535:
            raise SettingsError(f"port={self.port} must be between 0 and 65535.")
        if self.api_key and len(self.api_key) < MIN_KEY_CHARACTERS:
            raise SettingsError(f"the API key is too short: use at least {MIN_KEY_CHARACTERS} characters.")
        if not self.api_key and not is_loopback(self.host):
            raise SettingsError(
                f"host={self.host} can be reached from other machines, and there is no API key. Set one with --api-key or in "
                "FIELDGUIDE_API_KEY, or listen on 127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
