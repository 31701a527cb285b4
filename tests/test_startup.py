"""Commands that need no torch do not import it, and rejected arguments answer at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

import fieldguide
from fieldguide.core.version import __version__

TORCH_FREE = [
    ["--version"],
    ["-h"],
    ["models", "resnet*"],
    ["show", "resnet18"],
    ["samples"],
    ["tasks"],
    ["settings"],
    ["settings", "text-generation"],
]
REJECTED = [
    (["fit", "no-such-file.csv"], "no such file"),
    (["fit", "irris"], "Did you mean 'iris'?"),
    (["fit", "iris", "--task", "tabular-clasification"], "Did you mean 'tabular-classification'?"),
    (["fit", "iris", "--model", "resnet51"], "Did you mean 'resnet50'?"),
    (["fit", "iris", "--set", "learning_rat=1"], "Did you mean 'learning_rate'?"),
    (["fit", "iris", "--set", "modle.dim=1"], "Did you mean 'model'?"),
    (["fit", "iris", "--task", "fill-mask", "--set", "task.lenght=1"], "Did you mean 'length'?"),
    (["fit", "--resume", "no-such-run"], "no-such-run does not exist"),
    (["predict", "no-such-run", "x.csv"], "no-such-run does not exist"),
    (["check", "no-such-file.csv"], "no such file"),
    (["show", "resnet51"], "Did you mean 'resnet50'?"),
    (["fitt"], "No such command"),
    (["fit", "iris", "--modle", "x"], "No such option"),
]
REPORT = """
import resource, sys
sys.argv = ["fieldguide", *{arguments!r}]
from fieldguide.cli.commands import main
code = 0
try:
    main()
except SystemExit as end:
    code = end.code or 0
usage = resource.getrusage(resource.RUSAGE_SELF)
print("|", code, usage.ru_utime + usage.ru_stime, "torch" in sys.modules)
"""


def call(arguments: list[str]) -> tuple[str, int, float, bool]:
    """Return output, exit code, seconds of CPU time and whether torch was imported."""
    done = subprocess.run([sys.executable, "-c", REPORT.format(arguments=arguments)], capture_output=True, text=True)
    out, _, last = done.stdout.rpartition("|")
    code, seconds, torch = last.split()
    return out + done.stderr, int(code), float(seconds), torch == "True"


@pytest.mark.parametrize("arguments", TORCH_FREE, ids=" ".join)
def test_listing_commands_do_not_import_torch(arguments):
    out, code, _, torch = call(arguments)
    assert code == 0 and not torch and len(out) > 10


@pytest.mark.parametrize("arguments, message", REJECTED, ids=[" ".join(a) for a, _ in REJECTED])
def test_rejected_arguments_do_not_import_torch(arguments, message):
    out, code, seconds, torch = call(arguments)
    assert code != 0 and message in out and "Traceback" not in out
    assert not torch and seconds < 2  # 0.2 to 0.5 s on an idle core; the bound allows for a loaded machine


def test_version():
    assert call(["--version"])[0].strip() == f"fieldguide {__version__}"


def test_help_shows_an_example():
    for command in ("fit", "predict", "evaluate", "check", "models", "show", "samples", "tasks", "settings"):
        assert f"Example: fieldguide {command}" in call([command, "-h"])[0]


def test_settings_have_meanings():
    for arguments in (["settings", "--json"], ["settings", "object-detection", "--json"]):
        rows = [json.loads(line) for line in call(arguments)[0].splitlines()]
        assert rows and all(row["key"] and row["meaning"] for row in rows)


@pytest.mark.slow
def test_run_is_repeated_by_its_config(tmp_path):
    settings = {"steps": 12, "precision": "float32", "model.dim": 16, "column.species": "category"}
    first = fieldguide.fit("iris", model="mlp-s", seed=3, out=tmp_path / "first", settings=settings)
    config = yaml.safe_load((first.path / "fit.yaml").read_text())
    assert config["model"] == "mlp-s" and config["seed"] == 3 and config["settings"]["model.dim"] == 16
    out = ["--out", str(tmp_path / "second")]
    done = subprocess.run(
        [sys.executable, "-m", "fieldguide", "fit", "--config", str(first.path / "fit.yaml"), *out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    again = fieldguide.open_run(tmp_path / "second")
    assert again.scores == first.scores
    assert (again.path / "model.safetensors").read_bytes() == (first.path / "model.safetensors").read_bytes()


def test_wrong_config_names_file_and_key(tmp_path):
    path = tmp_path / "fit.yaml"
    path.write_text("data: iris\nmodle: mlp-s\n")
    out, code, _, _ = call(["fit", "--config", str(path)])
    assert code == 1 and "fit.yaml: unknown key 'modle'" in out and "Did you mean 'model'?" in out
    path.write_text("data: [iris\n")
    assert "invalid YAML" in call(["fit", "--config", str(path)])[0]
