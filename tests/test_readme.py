"""The README is executed: its commands one after another in an empty folder, and its Python code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [
    line[2:].strip() for kind, text in BLOCKS if kind == "console" for line in text.splitlines() if line.startswith("$ ")
]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
EXECUTED = ("fieldguide", "python", "curl")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("readme")


def run(command: list[str], home: Path) -> str:
    """Run a command in `home`, with this Python first in the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        command, cwd=home, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, f"{shlex.join(command)}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_the_readme_has_commands_and_python():
    assert len(COMMANDS) >= 6 and len(PYTHON) >= 2
    verbs = {shlex.split(c)[1] for c in COMMANDS if c.startswith("fieldguide ")}
    assert {"fit", "predict", "evaluate", "check", "models", "show", "samples"} <= verbs


@pytest.mark.slow
def test_commands_run_one_after_another(home):
    started = []
    try:
        for command in COMMANDS:
            words = shlex.split(command)
            if words[-1] == "&":
                started.append(start(words[:-1], home))
            elif words[0] in EXECUTED and (words[0] != "curl" or shutil.which("curl")):
                assert run(words, home).strip(), f"{command} printed nothing"
    finally:
        for process in started:
            process.terminate()
            process.communicate()
    assert [process.returncode for process in started] == [0] * len(started)


def start(command: list[str], home: Path) -> subprocess.Popen:
    """Start a command that goes on, and wait for the line that says it is ready."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        command, cwd=home, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Serving on" in line:
            return process
    pytest.fail(f"{shlex.join(command)} ended with {process.wait()}")


@pytest.fixture(scope="module")
def first(home):
    """The output of the first block, whose run the others open."""
    return run([sys.executable, "-W", "error", "-c", PYTHON[0]], home)


@pytest.mark.parametrize("number", [n if n == 0 else pytest.param(n, marks=pytest.mark.slow) for n in range(len(PYTHON))])
def test_python_runs(number, home, first):
    said = run([sys.executable, "-W", "error", "-c", PYTHON[number]], home) if number else first
    assert said.strip()


def test_other_commands_exist():
    """make targets and `torchrun -m` of the package are not run, but must exist."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    lines = [line.removeprefix("$ ") for kind, text in BLOCKS if kind in ("console", "", "sh") for line in text.splitlines()]
    seen = 0
    for line in lines:
        words = shlex.split(line.split("#")[0]) if line.startswith(("make ", "torchrun ", "git ", "cd ")) else []
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets, line
            seen += 1
        elif words[:1] == ["torchrun"]:
            assert words[words.index("-m") + 1] == "fieldguide", line
            seen += 1
    assert seen >= 1


def test_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), f"README.md points to {target}, which is not there"


def test_options_named_in_the_text_exist():
    from typer.main import get_command

    from fieldguide.cli.commands import app
    from test_cli import VERBS

    known = {o for c in get_command(app).commands.values() for p in c.params for o in p.opts} | {"--help"}
    assert known >= {o for options in VERBS.values() for o in options if o.startswith("--")}
    said = {o for code in re.findall(r"`([^`\n]+)`", README) for o in re.findall(r"(?<!\S)--[a-z][a-z-]+", code)}
    assert said <= known, f"README.md names options that are not there: {said - known}"


def test_extras_and_the_lowest_python_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = project["requires-python"].removeprefix(">=")
    assert f"Python {lowest} or newer" in README
    for extra in re.findall(r"fieldguide\[(\w+)\]", README):
        assert extra in project["optional-dependencies"]
