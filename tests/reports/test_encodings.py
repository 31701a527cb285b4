"""Text is UTF-8 whatever the locale, printing never fails, and control characters of data never reach the terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import fieldguide
from fieldguide.automl.callbacks import NullCallback
from fieldguide.automl.output import OutputConsole
from fieldguide.core.terminal import escape_controls

SOURCE = Path(fieldguide.__file__).parent
CITIES = ["Köln", "Łódź", "東京", "नई दिल्ली", "naïve\u2028line", "plain"]
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield node, name


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_text_file_names_its_encoding(path):
    for node, name in calls(path):
        keywords = {k.arg for k in node.keywords}
        if name in ("read_text", "write_text"):
            is_own = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "validation"  # always UTF-8
            is_method = isinstance(node.func, ast.Attribute) and not is_own
            assert not is_method or "encoding" in keywords, f"{path}:{node.lineno}"
        elif name == "open" and isinstance(node.func, ast.Name):
            modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            modes += [k.value.value for k in node.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
            assert "b" in "".join(modes) or "encoding" in keywords, f"{path}:{node.lineno}"


@pytest.fixture(scope="module")
def cities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("städte")
    rows = [(c, i % 7, "süß" if i % 2 else "salzig") for i, c in enumerate(CITIES * 20)]
    pl.DataFrame(rows, schema=["città", "x", "Klasse"], orient="row").write_csv(folder / "daten ü.csv")
    fieldguide.fit(folder / "daten ü.csv", "Klasse", out=folder / "lauf", settings={"steps": 2}, callback=NullCallback())
    return folder


def run(*arguments, **environment):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-m", "fieldguide", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**plain, "PYTHONPATH": str(SOURCE.parent), **environment})


@pytest.mark.parametrize("encoding", [pytest.param(name, marks=pytest.mark.slow) for name in ("latin-1", "ascii", "utf-8")])
def test_predictions_do_not_depend_on_the_locale(cities, encoding):
    done = run("predict", cities / "lauf", cities / "daten ü.csv", "--json", LC_ALL="C", PYTHONCOERCECLOCALE="0",
               PYTHONUTF8="0", PYTHONIOENCODING=encoding)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("utf-8" if encoding == "utf-8" else "latin-1").splitlines()
    assert len(lines) == len(CITIES) * 20
    if encoding == "utf-8":
        assert {json.loads(line)["label"] for line in lines} <= {"süß", "salzig"}


@pytest.mark.slow
def test_printing_never_fails(cities):
    done = run("check", cities / "daten ü.csv", "--target", "Klasse", LC_ALL="C", PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"\\u6771" in done.stdout or b"\\xf6" in done.stdout or b"K\\" in done.stdout


def test_controls_are_escaped():
    assert escape_controls("a\tb\nc") == "a\tb\nc"
    shown = escape_controls(ESCAPES)
    assert shown == r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    console = OutputConsole(file=io.StringIO(), force_terminal=True, width=200)
    console.print(f"[bold]{ESCAPES.replace('[', chr(92) + '[')}[/]")
    assert "\x1b]0" not in console.file.getvalue() and "\x9b" not in console.file.getvalue()
    assert "owned" in console.file.getvalue() and "\x1b[1m" in console.file.getvalue()  # styles of rich still work


@pytest.mark.slow
def test_data_cannot_control_the_terminal(cities, tmp_path):
    rows = [(f"{ESCAPES}{i % 5}", i % 7, f"yes{ESCAPES}" if i % 2 else "no") for i in range(60)]
    table = tmp_path / "hostile.csv"
    pl.DataFrame(rows, schema=[f"name{ESCAPES}", "x", "y"], orient="row").write_csv(table)
    for arguments in (("check", table), ("predict", table, "x"), ("predict", cities / "lauf", table)):
        own, other = pty.openpty()
        command = [sys.executable, "-m", "fieldguide", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=other, stderr=other, env={**os.environ, "TERM": "xterm"})
        os.close(other)
        output = b""
        while True:
            try:
                piece = os.read(own, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            output += piece
        process.wait()
        os.close(own)
        for hostile in (b"\x1b]0;", b"\x1b[2J", "\x9b".encode(), "\u202e".encode()):
            assert hostile not in output, (arguments, hostile)


def test_names_that_are_not_utf8(tmp_path):
    for i in range(30):
        folder = os.fsencode(tmp_path / "data" / "ab"[i % 2])
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, b"t\xe4xt %d.txt" % i), "wb") as file:
            file.write(f"{'good' if i % 2 else 'bad'} words {i}".encode())
    done = run("check", tmp_path / "data")
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1)
