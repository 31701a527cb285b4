"""The fuzzer finds planted faults, and finds none in the formats that are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "fuzz.py"
FORMATS = """
import time
from pathlib import Path

from fuzz import Format

from fieldguide.core.errors import DataError


def make(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"0123456789" * 5)


def load(folder: Path) -> None:
    content = (folder / "a.txt").read_bytes()
    if content != b"0123456789" * 5:
        {fault}


FORMATS = [Format("planted", make, load)]
"""
FAULTS = {  # what happens to a damaged file, and the exit code of the fuzzer
    "rejected": ("raise DataError('a.txt: damaged.')", 0),
    "traceback": ("[][1]", 1),
    "hang": ("time.sleep(60)", 1),
    "crash": ("import os; os.abort()", 1),
    "memory": ("bytearray(3 << 30)", 1),
}


def fuzz(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "hang" else n for n in FAULTS])
def test_planted_faults_are_found(tmp_path, name):
    fault, code = FAULTS[name]
    (tmp_path / "formats.py").write_text(FORMATS.replace("{fault}", fault))
    done = fuzz("--formats", tmp_path / "formats.py", "--count", 4, "--workers", 1, "--timeout", 2)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("failed: --format planted --seed" in done.stdout) == bool(code), done.stdout


@pytest.mark.slow
def test_a_minute_of_mutations_of_every_format():
    done = fuzz("--seconds", 60)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
