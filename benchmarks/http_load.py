"""Clients that load a server with JSON requests, each one after another over a connection that stays open.

`measure` uses wrk where it is installed, which takes little of the machine; else, and where tokens are counted, coroutines of another
process.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREDICTIONS = ("/v1/predict", "/predict")  # paths whose answers have no tokens
WRK = """
local requests, turn = {}, 0
function init(args)
  for body in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
  end
end
function request()
  turn = turn %% #requests + 1
  return requests[turn]
end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('\\n{"count": %%d, "seconds": %%f, "median": %%f, "high": %%f, "errors": %%d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(95) / 1e6,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
""".replace("%%", "%")


def make_request(path: str, body: bytes) -> bytes:
    """Return a request as it is sent."""
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "",
        "",
    )
    return "\r\n".join(lines).encode() + body


class Connection:
    """A connection that stays open."""

    def __init__(self, port: int):
        self.port = port

    async def open(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    async def post(self, path: str, body: bytes) -> bytes:
        """Return the body of the answer. Raises `RuntimeError` for another status than 200."""
        self.writer.write(make_request(path, body))
        header = await self.reader.readuntil(b"\r\n\r\n")
        if found := re.search(rb"content-length: *(\d+)", header, re.IGNORECASE):
            content = await self.reader.readexactly(int(found.group(1)))
        else:
            content = b""
            while size := int((await self.reader.readline()).strip(), 16):
                content += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            await self.reader.readexactly(2)
        if header.split(None, 2)[1] != b"200":
            raise RuntimeError(content.decode()[:300])
        return content


async def load(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Send requests from so many clients, each one after another; return latencies and the bytes of answers."""
    times: list[float] = []
    begun, tokens = time.perf_counter(), 0

    async def client(number: int) -> None:
        nonlocal tokens
        connection = Connection(port)
        await connection.open()
        turn = number
        while time.perf_counter() - begun < seconds:
            started = time.perf_counter()
            answer = await connection.post(path, bodies[turn % len(bodies)])
            times.append(time.perf_counter() - started)
            if path != "/v1/predict" and path != "/predict":
                tokens += json.loads(answer)["usage"]["completion_tokens"]
            turn += clients
        connection.writer.close()

    await asyncio.gather(*(client(i) for i in range(clients)))
    return summarize(times, time.perf_counter() - begun, tokens)


def summarize(times: Sequence[float], seconds: float, tokens: int = 0) -> dict[str, Any]:
    """Return the number of answers, the seconds, and the median and 95th percentile of the latency in seconds."""
    ordered = sorted(times)
    high = ordered[int(0.95 * (len(ordered) - 1))]
    return {"count": len(times), "seconds": seconds, "median": statistics.median(times), "high": high, "tokens": tokens}


def measure(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Load a server from another process. Raises `RuntimeError` if an answer is an error."""
    if path in PREDICTIONS and shutil.which("wrk"):
        return run_wrk(port, path, bodies, clients, seconds)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([body.decode() for body in bodies], file)
        file.flush()
        command = [sys.executable, str(Path(__file__).resolve()), file.name, str(port), path, str(clients), str(seconds)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_wrk(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Load a server by wrk."""
    with tempfile.TemporaryDirectory() as folder:
        script, lines = Path(folder) / "load.lua", Path(folder) / "bodies"
        script.write_text(WRK, encoding="utf-8")
        lines.write_bytes(b"\n".join(bodies) + b"\n")
        url = f"http://127.0.0.1:{port}{path}"
        command = [
            "wrk",
            "-t1",
            f"-c{clients}",
            f"-d{seconds:g}s",
            "--timeout",
            "60s",
            "-s",
            str(script),
            url,
            "--",
            str(lines),
        ]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])
    if found["errors"]:
        raise RuntimeError(f"{found['errors']} of {found['count']} answers are errors")
    return found | {"tokens": 0}


if __name__ == "__main__":
    sent = [body.encode() for body in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    print(json.dumps(asyncio.run(load(int(sys.argv[2]), sys.argv[3], sent, int(sys.argv[4]), float(sys.argv[5])))))
