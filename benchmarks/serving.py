"""How much of a model's speed arrives at clients? `fieldguide serve` against offline `predict`, LitServe and transformers' own server.

    python benchmarks/serving.py RUN [--seconds 5] [--clients 1,8,64] [--rows 1] [--litserve PYTHON]
    python benchmarks/serving.py --text CHECKPOINT [--tokens 64] [--clients 1,8,64] [--transformers PYTHON]
    python benchmarks/serving.py RUN --memory 100000
    python benchmarks/serving.py RUN --disconnects 1000 --terminations 50

RUN is a run whose rows are numbers, categories, texts or images, which are made from its signature. For each number of clients:
answers a second, median and 95th percentile of the latency, next to `predict` in this process with 32 rows at once. With one client,
the added latency is the difference of the medians. --litserve and --transformers name a Python that has the package; both serve the same
weights on the same machine, one after the other, never at the same time.

Rows are sent by wrk where it is installed (`apt install wrk`), see `http_load.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from http_load import Connection, make_request, measure

HERE = Path(__file__).resolve()
MIN_ANSWERS = 500  # that are compared while others disconnect, and after
LITSERVE = """
import sys, litserve, torch, fieldguide
class Api(litserve.LitAPI):
    def setup(self, device): self.predictor = fieldguide.pipeline(sys.argv[1])
    def decode_request(self, request): return request["rows"][0]
    def batch(self, inputs): return inputs
    def predict(self, rows): return [dict(r) for r in self.predictor.predict(rows if isinstance(rows, list) else [rows])]
    def unbatch(self, output): return output
    def encode_response(self, output): return {"predictions": [output]}
if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=128, batch_timeout=0.002), accelerator="cpu")
    server.run(port=int(sys.argv[2]), generate_client_file=False, log_level="error")
"""


TRANSFORMERS = f"""
import sys
sys.path.append({str(HERE.parent.parent / "tests")!r})
import tv  # imports torchvision where it lacks its operators
from transformers.cli.transformers import main
main()
"""


# Requests


def make_value(field: Any, number: int) -> Any:
    """Return a value of an input of a signature."""
    if field.kind == "image":
        import numpy as np
        from PIL import Image

        side = field.image.width if field.image else 64
        pixels = np.random.default_rng(number).integers(
            0, 255, (side, side, field.image.channels if field.image else 3), np.uint8
        )
        file = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    if field.kind == "number":
        low, high = (field.low, field.high) if isinstance(field.low, int | float) else (0.0, 1.0)
        return low + (high - low) * random.Random(number).random()
    if field.values:
        return field.values[number % len(field.values)]
    return "2024-03-04" if field.kind == "date" else f"a short text with number {number}"


def make_rows(signature: Any, count: int) -> list[dict[str, Any]]:
    """Return rows for a signature."""
    return [{f.name: make_value(f, i) for f in signature.inputs if f.required} for i in range(count)]


# Servers


@contextlib.contextmanager
def start(command: list[str], port: int, path: str = "/health", seconds: float = 180) -> Iterator[subprocess.Popen]:
    """Start a server and wait until its port answers."""
    said = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe that nobody reads would stop the server when it is full
    process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    end = time.monotonic() + seconds
    try:
        while True:
            if process.poll() is not None or time.monotonic() > end:
                said.seek(0)
                raise RuntimeError(f"{' '.join(command[:4])} did not start: {said.read().decode()[-500:]}")
            with (
                contextlib.suppress(OSError),
                contextlib.closing(__import__("socket").create_connection(("127.0.0.1", port), 1)),
            ):
                break
            time.sleep(0.2)
        time.sleep(1)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # LitServe leaves its workers behind, which would slow down what follows
        said.seek(0)
        if errors := [line for line in said.read().decode().splitlines() if "ERROR" in line or "Traceback" in line]:
            print(f"the server logged {len(errors)} errors, such as {errors[0]}")


def serve_command(source: str, port: int) -> list[str]:
    return [sys.executable, "-m", "fieldguide", "serve", f"model={source}", "--port", str(port)]


def report(name: str, clients: int, found: dict[str, Any], unit: str, per_request: float) -> float:
    """Print a row of the table; return the rate."""
    rate = (found["tokens"] or found["count"] * per_request) / found["seconds"]
    middle, high = found["median"] * 1000, found["high"] * 1000
    print(f"{name:24s} {clients:4d} clients {rate:10.1f} {unit}/s   median {middle:8.2f} ms   95 % {high:8.2f} ms", flush=True)
    return rate


def compare_run(arguments: argparse.Namespace) -> None:
    """Compare answers of a run with `predict` and LitServe."""
    import fieldguide

    predictor = fieldguide.pipeline(arguments.source)
    rows = make_rows(predictor.signature, 64)
    folder = tempfile.TemporaryDirectory()
    offline = [{name: keep_file(value, folder.name, i) for name, value in row.items()} for i, row in enumerate(rows)]
    predictor.predict(offline[:1])
    count = arguments.rows
    once = [time_call(lambda i=i: predictor.predict(offline[i % 64 : i % 64 + 1])) for i in range(60)]
    batch = (offline * 64)[:32]
    rate = max(32 / time_call(lambda: predictor.predict(batch)) for _ in range(20))
    print(f"predict, one row: median {statistics.median(once) * 1000:.2f} ms; 32 rows at once: {rate:.1f} rows/s")
    bodies = [json.dumps({"rows": (rows * (1 + count // 64 + 1))[i : i + count]}).encode() for i in range(64)]
    with start(serve_command(arguments.source, arguments.port), arguments.port):
        measure(arguments.port, "/v1/predict", bodies, 2, 1)
        for clients in arguments.clients:
            found = measure(arguments.port, "/v1/predict", bodies, clients, arguments.seconds)
            got = report("fieldguide serve", clients, found, "rows", count)
            if clients == 1:
                print(f"{'':24s} added latency: {(found['median'] - statistics.median(once)) * 1000:.2f} ms")
            else:
                print(f"{'':24s} {100 * got / rate:.0f} % of predict")
    if arguments.litserve and count == 1 and not any(str(v).startswith("data:") for v in rows[0].values()):
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
            file.write(LITSERVE)
            file.flush()
            with start([arguments.litserve, file.name, arguments.source, str(arguments.port + 1)], arguments.port + 1):
                measure(arguments.port + 1, "/predict", bodies, 2, 1)
                for clients in arguments.clients:
                    report(
                        "LitServe",
                        clients,
                        measure(arguments.port + 1, "/predict", bodies, clients, arguments.seconds),
                        "rows",
                        1,
                    )


def keep_file(value: Any, folder: str, number: int) -> Any:
    """Return a value as `predict` takes it: data URLs become files."""
    if not str(value).startswith("data:"):
        return value
    path = Path(folder) / f"{number}.png"
    path.write_bytes(base64.b64decode(str(value).partition(",")[2]))
    return str(path)


def time_call(function: Any) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def compare_text(arguments: argparse.Namespace) -> None:
    """Compare generated tokens a second with transformers' own server."""
    prompts = [
        f"Write about the number {i}, and then about the sea and the {w}."
        for i in range(16)
        for w in ("sky", "old house", "rain")
    ]
    ask = {"temperature": 0, "max_tokens": arguments.tokens}
    path = "/v1/chat/completions"
    bodies = [json.dumps({"model": "model", "messages": [{"role": "user", "content": p}], **ask}).encode() for p in prompts]
    with start(serve_command(arguments.text, arguments.port), arguments.port):
        measure(arguments.port, path, bodies, 1, 1)
        for clients in arguments.clients:
            report("fieldguide serve", clients, measure(arguments.port, path, bodies, clients, arguments.seconds), "tokens", 1)
    if arguments.transformers:
        bodies = [
            json.dumps({"model": arguments.text, "messages": [{"role": "user", "content": p}], **ask}).encode() for p in prompts
        ]
        command = [
            arguments.transformers,
            "-c",
            TRANSFORMERS,
            "serve",
            arguments.text,
            "--port",
            str(arguments.port + 1),
        ]
        with start(command, arguments.port + 1):
            measure(arguments.port + 1, path, bodies, 1, 1)
            for clients in arguments.clients:
                found = measure(arguments.port + 1, path, bodies, clients, arguments.seconds)
                report("transformers serve", clients, found, "tokens", 1)


# Memory, disconnects, terminations


def read_memory(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1))


def watch_memory(arguments: argparse.Namespace) -> None:
    """Print the memory of the server over many requests."""
    import fieldguide

    rows = make_rows(fieldguide.pipeline(arguments.source).signature, 64)
    bodies = [json.dumps({"rows": [row]}).encode() for row in rows]
    with start(serve_command(arguments.source, arguments.port), arguments.port) as process:
        done, first = 0, 0
        while done < arguments.memory:
            done += measure(arguments.port, "/v1/predict", bodies, 16, 10)["count"]
            now = read_memory(process.pid)
            first = first or now
            print(f"{done:8,} requests: {now / 1024:.1f} MiB ({100 * (now / first - 1):+.2f} % since the first)", flush=True)


async def disturb(port: int, bodies: list[bytes], wanted: list[Any], disconnects: int) -> tuple[int, int]:
    """Close connections at random moments while others ask, and return how many answers were right and wrong."""
    right, wrong, left = 0, 0, 0
    rng = random.Random(0)

    async def leave() -> None:
        nonlocal left
        while left < disconnects:
            left += 1
            connection = Connection(port)
            await connection.open()
            body = rng.choice(bodies)
            sent = make_request("/v1/predict", body)
            connection.writer.write(sent[: rng.randrange(1, len(sent) + 1)] if rng.random() < 0.3 else sent)
            await asyncio.sleep(rng.random() * 0.02)
            connection.writer.transport.abort()

    async def ask() -> None:
        nonlocal right, wrong
        connection = Connection(port)
        await connection.open()
        while left < disconnects or right + wrong < MIN_ANSWERS:
            i = rng.randrange(len(bodies))
            same = is_near(json.loads(await connection.post("/v1/predict", bodies[i]))["predictions"], wanted[i])
            right, wrong = right + same, wrong + (not same)

    await asyncio.gather(*(leave() for _ in range(8)), *(ask() for _ in range(8)))
    return right, wrong


def is_near(one: Any, other: Any) -> bool:
    """Return whether records are equal up to rounding of float32."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_near(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(is_near, one, other))
    return abs(one - other) <= 1e-6 * max(1, abs(other)) if isinstance(one, float) else one == other


def disturb_server(arguments: argparse.Namespace) -> None:
    """Disconnect and terminate under load; every answer must be right, and none may be lost."""
    import fieldguide

    rows = make_rows(fieldguide.pipeline(arguments.source).signature, 32)
    bodies = [json.dumps({"rows": [row]}).encode() for row in rows]

    async def ask_once(port: int) -> list[Any]:
        connection = Connection(port)
        await connection.open()
        return [json.loads(await connection.post("/v1/predict", body))["predictions"] for body in bodies]

    with start(serve_command(arguments.source, arguments.port), arguments.port):
        wanted = asyncio.run(ask_once(arguments.port))
        if arguments.disconnects:
            right, wrong = asyncio.run(disturb(arguments.port, bodies, wanted, arguments.disconnects))
            print(f"{arguments.disconnects:,} disconnects: {right:,} answers right, {wrong:,} wrong", flush=True)
    totals = [0, 0, 0, 0]
    for number in range(arguments.terminations):
        with start(serve_command(arguments.source, arguments.port), arguments.port) as process:
            found = asyncio.run(terminate(arguments.port, bodies, wanted, process, random.Random(number)))
            totals = [a + b for a, b in zip(totals, (*found, int(process.wait(60) != 0)))]
    if arguments.terminations:
        right, wrong, lost, bad = totals
        print(f"{arguments.terminations} x SIGTERM: {right:,} answers right, {wrong:,} wrong, {lost:,} lost; {bad} bad exits")


async def terminate(
    port: int, bodies: list[bytes], wanted: list[Any], process: Any, rng: random.Random
) -> tuple[int, int, int]:
    """Send SIGTERM while clients ask; return right, wrong and lost answers. Lost is a request that was read and not answered."""
    right, wrong, lost = 0, 0, 0

    async def ask() -> None:
        nonlocal right, wrong, lost
        connection = Connection(port)
        await connection.open()
        while True:
            i = rng.randrange(len(bodies))
            try:
                answer = json.loads(await connection.post("/v1/predict", bodies[i]))
            except asyncio.IncompleteReadError as error:
                lost += bool(error.partial)  # an answer that was cut off
                return
            except (ConnectionError, OSError):
                return  # the server had closed the connection before the request
            except RuntimeError as error:
                lost += "stopping" not in str(error)
                return
            same = is_near(answer["predictions"], wanted[i])
            right, wrong = right + same, wrong + (not same)

    asking = [asyncio.ensure_future(ask()) for _ in range(8)]
    await asyncio.sleep(0.2 + rng.random() * 0.5)
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*asking)
    return right, wrong, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a run")
    parser.add_argument("--text", help="a language model with a chat template")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--rows", type=int, default=1, help="rows of a request")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--litserve", help="a Python with LitServe")
    parser.add_argument("--transformers", help="a Python with transformers[serving]")
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--disconnects", type=int, default=0)
    parser.add_argument("--terminations", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if arguments.text:
        compare_text(arguments)
    elif arguments.memory:
        watch_memory(arguments)
    elif arguments.disconnects or arguments.terminations:
        disturb_server(arguments)
    else:
        compare_run(arguments)


if __name__ == "__main__":
    main()
