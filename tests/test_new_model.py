"""The steps of CONTRIBUTING.md: a model made from the template passes all contract tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_model_from_the_template_passes_its_tests(tmp_path):
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "golden", "*.egg-info"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    make = [sys.executable, ROOT / "tools/new_model.py", "my-net", "convolutional", "--root", tmp_path]
    made = subprocess.run(make, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "tests/test_models.py -k my-net" in made.stdout
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_models.py", "-k", "my-net"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and " passed" in ended.stdout.replace("[100%]", " passed"), ended.stdout + ended.stderr
    assert ended.stdout.count(".") > 10  # shapes, gradients, reference, saving, export, learning
    listed = subprocess.run(
        [sys.executable, "-m", "fieldguide", "models", "my-net*"], env=environment, capture_output=True, text=True
    )
    assert "my-net-s" in listed.stdout, listed.stderr  # found without being registered, and the index is known to be old
    again = subprocess.run(make, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr
