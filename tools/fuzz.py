"""Damage valid files of every format that is read, and check that each is loaded or rejected with an error of fieldguide.

    python tools/fuzz.py [--format NAME] [--seed N] [--seconds S] [--count N] [--keep FOLDER]

A traceback of another kind, a crash, more than 10 seconds or more than 2 GiB is a failure. It is reported with the format and
the seed, which reproduce it: `--format NAME --seed N --count 1 --keep FOLDER` also writes the damaged files to a folder. The
formats are in `fuzz_formats.py`. Files are loaded in processes of their own, so that a crash ends only one of them.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import importlib.util
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORMATS_FILE = Path(__file__).with_name("fuzz_formats.py")
TIMEOUT_S = 10.0
MEMORY_BYTES = 2 << 30  # beyond what the process uses after it has loaded the valid file
START_TIMEOUT_S = 180.0  # for a process to import and to load a valid file
JOBS_PER_PROCESS = 2000  # caches and fragments of the heap would add up


@dataclass(frozen=True)
class Format:
    """A format: how to make a small valid example in a folder, which of its files are damaged, and how it is loaded."""

    name: str
    make: Callable[[Path], None]
    load: Callable[[Path], object]
    targets: tuple[str, ...] = ("*",)


@dataclass
class Tally:
    """Counts and failures of one format."""

    counts: Counter[str] = field(default_factory=Counter)
    causes: dict[str, list[int]] = field(default_factory=dict)  # last line of a failure -> seeds
    slowest: float = 0.0

    def add_failure(self, name: str, seed: int, text: str) -> None:
        """Count a failure, and print it unless the same one was seen before."""
        cause = text.strip().splitlines()[-1][:100]
        self.causes.setdefault(cause, []).append(seed)
        if len(self.causes[cause]) == 1:
            print(f"--- failed: --format {name} --seed {seed} --count 1\n{text}", flush=True)


# ------------------------------------------------------------------------------------------------ mutations

INTEGERS = [0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 65536, 10**9, 10**18, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *("", "x", "0", "../../etc/passwd", "a\0b", "\ud800", "\u202e", "x" * 5000, "{{ 9 ** 9 }}", "%s%n", "(a+)+$", [], {}, [[]]),
    *([0], [None], ["x"] * 3, [10**9] * 3, {"a": 1}, {"content": None}, list(range(100)), json.loads("[" * 300 + "]" * 300)),
]
TOKENS = [
    b"0",
    b"-1",
    b"1e999",
    b"nan",
    b"999999999999",
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\n",
    b",",
    b'"',
    b"\t",
    b"'",
    b"{{",
    b"%}",
]


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def write_integer(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 2, 4, 8))
    number = rng.choice(INTEGERS) % (1 << 8 * size)
    start = rng.randrange(len(data))
    content = number.to_bytes(size, rng.choice(("little", "big")))
    data[start : start + size] = content[: len(data) - start]


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def delete(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice((1, 2, 8, rng.randrange(1, 200)))]


def copy_chunk(data: bytearray, rng: random.Random) -> None:
    start, size, place = rng.randrange(len(data)), rng.randrange(1, 100), rng.randrange(len(data))
    data[place : place + rng.choice((0, size))] = data[start : start + size]


def repeat_chunk(data: bytearray, rng: random.Random) -> None:
    start, size = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, rng.randrange(1, 50)))
    data[start:start] = data[start : start + size] * rng.choice((2, 10, 100, 3000))


def insert_token(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data))
    data[place : place + rng.choice((0, 1, 4))] = rng.choice(TOKENS)


def replace_number(data: bytearray, rng: random.Random) -> None:
    """Replace a run of digits, as in text formats."""
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not digits:
        return
    start = end = rng.choice(digits)
    while end < len(data) and 48 <= data[end] <= 57:
        end += 1
    data[start:end] = rng.choice(
        (b"0", b"-1", b"1e9", b"nan", b"1000000000", b"99999999999999999999", b"1.5", b"", b"x", b"1e400")
    )


BYTE_MUTATIONS = (
    flip_bits,
    set_bytes,
    write_integer,
    truncate,
    delete,
    copy_chunk,
    repeat_chunk,
    insert_token,
    replace_number,
)


def list_places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value in a JSON document."""
    stack = [value]
    while stack:
        container = stack.pop()
        for key in list(container) if isinstance(container, dict) else range(len(container)):
            yield container, key
            if isinstance(container[key], dict | list):
                stack.append(container[key])


def mutate_json(content: bytes, rng: random.Random) -> bytes | None:
    """Change the values of a JSON document, or of one line of several; None if it is no JSON."""
    lines = content.split(b"\n") if content.lstrip()[:1] == b"{" and content.count(b"\n{") > 1 else [content]
    number = rng.randrange(len(lines))
    try:
        document = json.loads(lines[number])
    except ValueError:
        return None
    if not isinstance(document, dict | list) or not document:
        return None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not (places := list(list_places(document))):
            break
        container, key = rng.choice(places)
        action = rng.randrange(8)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, list):
            container.extend(container[key : key + 1] * rng.choice((1, 100)))
        elif action == 2 and isinstance(container, dict):
            container[rng.choice(("", "x", "\0", "type", str(key) + "s"))] = container.pop(key)
        elif action == 3:
            other, name = rng.choice(places)
            there = name in other if isinstance(other, dict) else name < len(other)
            container[key] = copy.deepcopy(other[name]) if there else None
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    try:
        lines[number] = json.dumps(document).encode()
    except (ValueError, RecursionError):  # nested too deeply
        return None
    return b"\n".join(lines)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            rng.choice(BYTE_MUTATIONS)(data, rng)
    return bytes(data)


def mutate_archive(content: bytes, rng: random.Random) -> bytes | None:
    """Change one member of a ZIP archive and keep the archive valid; None if it is no archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except (zipfile.BadZipFile, EOFError, ValueError):
        return None
    chosen, out = rng.randrange(len(members)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number, (info, data) in enumerate(members):
            if number == chosen and rng.random() < 0.05:
                continue
            archive.writestr(info, mutate_bytes(data, rng) if number == chosen else data, info.compress_type)
    return out.getvalue()


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy of a file."""
    if content[:2] == b"PK" and rng.random() < 0.6 and (changed := mutate_archive(content, rng)) is not None:
        return changed
    if content.lstrip()[:1] in (b"{", b"[") and rng.random() < 0.7 and (changed := mutate_json(content, rng)) is not None:
        return changed
    return mutate_bytes(content, rng) if content else rng.randbytes(rng.randrange(1, 50))


def damage(example: Path, folder: Path, form: Format, seed: int) -> str:
    """Copy an example to `folder` with one of its files damaged, and return the name of that file."""
    rng = random.Random(f"{form.name}:{seed}")
    files = sorted({p for pattern in form.targets for p in example.rglob(pattern) if p.is_file()})
    shutil.copytree(example, folder)
    chosen = rng.choice(files)
    (folder / chosen.relative_to(example)).write_bytes(mutate(chosen.read_bytes(), rng))
    return chosen.relative_to(example).as_posix()


# ------------------------------------------------------------------------------------------------ processes


def import_formats(file: Path) -> dict[str, Format]:
    """Return the formats of a file that defines `FORMATS`."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return {form.name: form for form in module.FORMATS}


def try_to_load(form: Format, folder: Path) -> tuple[str, str]:
    """Return the outcome of loading ("loaded", "rejected" or "failed") and its text."""
    from fieldguide.core.errors import FieldguideError

    try:
        form.load(folder)
    except FieldguideError as error:
        str(error).encode()  # can be printed
        return "rejected", str(error)
    return "loaded", ""


def get_virtual_bytes() -> int:
    """Return the address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def serve(pipe: Connection, formats_file: Path, examples: Path, log: Path) -> None:
    """Load what the parent process asks for, until it asks for nothing."""
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules.setdefault("fuzz", sys.modules[__name__])
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import warnings

    warnings.simplefilter("ignore")
    formats, ready = import_formats(formats_file), set[str]()
    pipe.send("ready")
    while job := pipe.recv():
        name, seed, folder = job
        form = formats[name]
        unlimited = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
        if name not in ready:
            outcome, text = try_to_load(form, examples / name)
            if outcome != "loaded":
                raise SystemExit(f"{name}: the valid example is rejected: {text}")
            ready.add(name)
        damage(examples / name, folder, form, seed)
        pipe.send("loading")
        if Path("/proc/self/statm").exists():  # elsewhere there is no limit on memory
            resource.setrlimit(resource.RLIMIT_AS, (get_virtual_bytes() + MEMORY_BYTES, unlimited))
        start = time.monotonic()
        try:
            outcome, text = try_to_load(form, folder)
        except BaseException:  # noqa: BLE001  (whatever it is, it is reported)
            outcome, text = "failed", traceback.format_exc()
        pipe.send((outcome, text, time.monotonic() - start))


class Worker:
    """A process that loads damaged files. It is replaced when it crashes or takes too long."""

    def __init__(self, formats_file: Path, examples: Path, scratch: Path, timeout: float) -> None:
        self.arguments, self.scratch, self.timeout = (formats_file, examples, scratch / "log"), scratch, timeout
        self.jobs, self.process = 0, None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()
        self.jobs = 0
        if not self.pipe.poll(START_TIMEOUT_S):
            raise RuntimeError("a process did not start")
        self.pipe.recv()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def run(self, name: str, seed: int, keep: Path | None) -> tuple[str, str, float]:
        """Return outcome, text and seconds of one damaged file."""
        if self.process is None or self.jobs >= JOBS_PER_PROCESS:
            self.stop()
            self.start()
        self.jobs += 1
        folder = self.scratch / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self.pipe.send((name, seed, folder))
            if not self.pipe.poll(START_TIMEOUT_S):
                raise TimeoutError("the valid example was not loaded")
            answer = self.pipe.recv()
            if answer == "loading":
                if not self.pipe.poll(self.timeout):
                    raise TimeoutError(f"more than {self.timeout:.0f} seconds")
                answer = self.pipe.recv()
            return answer
        except (EOFError, OSError, TimeoutError) as error:
            code = "" if isinstance(error, TimeoutError) else f"the process ended: {self.process and self.process.exitcode}. "
            tail = (self.scratch / "log").read_text(errors="replace")[-2000:]
            self.stop()
            return "failed", f"{code}{error}\n{tail}", self.timeout
        finally:
            if keep and folder.exists():
                shutil.copytree(folder, keep / f"{name}-{seed}", dirs_exist_ok=True)


def make_examples(formats_file: Path, names: list[str], examples: Path) -> None:
    """Make the valid examples, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules.setdefault("fuzz", sys.modules[__name__])
    formats = import_formats(formats_file)
    for name in names:
        (examples / name).mkdir(parents=True)
        formats[name].make(examples / name)


def fuzz(
    names: list[str],
    formats_file: Path,
    *,
    seed: int,
    seconds: float,
    count: int | None,
    workers: int,
    timeout: float,
    keep: Path | None,
) -> dict[str, Tally]:
    """Load damaged files of these formats in turn, each with the next seed, until the time or their number is reached."""
    tallies = {name: Tally() for name in names}
    jobs = ((name, number) for number in range(seed, seed + count if count else sys.maxsize) for name in names)
    lock = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        root = Path(temporary)
        maker = multiprocessing.get_context("spawn").Process(
            target=make_examples, args=(formats_file, names, root / "examples")
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the valid examples could not be made")
        deadline = time.monotonic() + seconds

        def work(number: int) -> None:
            scratch = root / f"worker-{number}"
            scratch.mkdir()
            worker = Worker(formats_file, root / "examples", scratch, timeout)
            while count or time.monotonic() < deadline:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    break
                outcome, text, took = worker.run(*job, keep)
                with lock:
                    tally = tallies[job[0]]
                    tally.counts[outcome] += 1
                    tally.slowest = max(tally.slowest, took)
                    if outcome == "failed":
                        tally.add_failure(*job, text)
            worker.stop()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return tallies


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--format", action="append", help="name or pattern of a format; several are possible; all by default")
    parser.add_argument("--seed", type=int, default=0, help="first seed of each format")
    parser.add_argument("--seconds", type=float, default=60, help="time after which no file is started")
    parser.add_argument("--count", type=int, help="files of each format, instead of --seconds")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds that a file may take")
    parser.add_argument("--keep", type=Path, help="folder for the damaged files")
    parser.add_argument("--formats", type=Path, default=FORMATS_FILE, help="Python file that defines FORMATS")
    options = parser.parse_args(arguments)
    known = list(import_formats(options.formats))
    names = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in options.format or ["*"])]
    if not names:
        parser.error(f"no format of that name; there are {', '.join(known)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tallies = fuzz(
        names,
        options.formats,
        seed=options.seed,
        seconds=options.seconds,
        count=options.count,
        workers=options.workers,
        timeout=options.timeout,
        keep=options.keep,
    )
    print(f"{'format':24}{'mutations':>10}{'rejected':>10}{'loaded':>10}{'failures':>10}{'slowest':>10}")
    for name, tally in tallies.items():
        numbers = (tally.counts.total(), tally.counts["rejected"], tally.counts["loaded"], tally.counts["failed"])
        print(f"{name:24}" + "".join(f"{number:10,}" for number in numbers) + f"{tally.slowest:9.1f}s")
    for name, tally in tallies.items():
        for cause, seeds in tally.causes.items():
            print(f"{name}: {len(seeds):,} times, as with --seed {seeds[0]}: {cause}")
    return int(any(tally.causes for tally in tallies.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules["fuzz"] = sys.modules[__name__]
    raise SystemExit(main())
