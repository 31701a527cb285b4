"""The command line: its commands and options are fixed, and each works on real files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import typer.main
from PIL import Image

from fieldguide.cli import commands as cli
from fieldguide.data import samples

# Verb -> its arguments and options. What is here stays: scripts of users call it.
VERBS = {
    "export": {"RUN", "--to", "--out", "--data", "--precision", "--json"},
    "advise": {
        "DATA",
        "--target",
        "--task",
        "--model",
        "--minutes",
        "--seed",
        "--group",
        "--time",
        "--allow-bad",
        "--json",
        "--set",
    },
    "fit": {
        "DATA",
        "--target",
        "--task",
        "--model",
        "--minutes",
        "--out",
        "--seed",
        "--group",
        "--time",
        "--resume",
        "--finish",
        "--metric",
        "--refit",
        "--deterministic",
        "--dry-run",
        "--config",
        "--weights",
        "--allow-bad",
        "--set",
    },
    "predict": {"RUN", "INPUTS", "--out", "--json", "--set"},
    "serve": {
        "RUNS",
        "--host",
        "--port",
        "--api-key",
        "--allow-host",
        "--max-batch",
        "--max-wait-ms",
        "--queue",
        "--slots",
        "--timeout",
    },
    "evaluate": {"RUN", "DATA", "--json", "--set"},
    "compare": {"RUNS", "--out", "--json"},
    "check": {"DATA", "--target", "--task", "--group", "--time", "--allow-bad", "--set"},
    "plan": {
        "SOURCE",
        "--target",
        "--task",
        "--model",
        "--minutes",
        "--mode",
        "--on",
        "--devices",
        "--strategy",
        "--batch",
        "--length",
        "--side",
        "--dtype",
        "--new-tokens",
        "--json",
        "--set",
    },
    "probe": {"OUT"},
    "models": {"GLOB", "--family", "--task", "--json"},
    "show": {"NAME", "--json", "--set"},
    "samples": set(),
    "tasks": {"--json"},
    "settings": {"TASK", "--json"},
}
TINY = ("--model", "mlp-s", "--set", "steps=60", "--set", "precision=float32", "--set", "model.dim=32")


def test_verbs_and_options_are_frozen():
    commands = typer.main.get_command(cli.app).commands
    found = {
        name: {p.name.upper() if p.param_type_name == "argument" else p.opts[0] for p in command.params}
        for name, command in commands.items()
    }
    assert found == VERBS


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a command in this process and return (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fieldguide", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def good(call):
    """Call a command that must succeed and return its output."""

    def run(*arguments: object) -> str:
        code, out, err = call(*arguments)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def bad(call):
    """Call a command that must fail with a one-line error and return that line."""

    def run(*arguments: object) -> str:
        code, _, err = call(*arguments)
        assert code == 1 and "Traceback" not in err, (code, err)
        assert err.startswith("fieldguide: ") and err.count("\n") == 1, err
        return err

    return run


# Fit, predict, evaluate on files


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Iris as a CSV file with a missing value."""
    path = tmp_path_factory.mktemp("flowers") / "flowers.csv"
    rows = pl.read_csv(samples.path("iris"))
    rows[3, "petal_length_cm"] = None
    rows.write_csv(path)
    return path


def test_fit_predict_evaluate_on_files(good, flowers, tmp_path):
    run = tmp_path / "run"
    said = good("fit", flowers, "--target", "species", "--out", run, "--seed", 3, *TINY)
    assert "150 examples from 1 file" in said and "tabular-classification" in said
    assert "4 numeric or categorical columns and a target with 3 classes" in said
    assert "ruled out" not in said  # who asks for a network is not told of the others
    assert "of the held-out examples correct" in said and "majority class" in said
    assert str(run / "report.html") in said and (run / "report.html").exists()
    assert json.loads((run / "run.json").read_text())["settings"]["seed"] == 3

    rows = [json.loads(line) for line in good("predict", run, flowers, "--json").splitlines()]
    assert len(rows) == 150 and rows[0]["input"].endswith("flowers.csv:2")
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["probability"] == max(row["probabilities"].values())
    truth = pl.read_csv(flowers)["species"].to_list()
    assert sum(row["label"] == t for row, t in zip(rows, truth)) >= 100

    without = tmp_path / "without.csv"
    pl.read_csv(flowers).drop("species").write_csv(without)
    again = [json.loads(line) for line in good("predict", run, without, "--json").splitlines()]
    assert [r["probabilities"] for r in again] == [r["probabilities"] for r in rows]

    printed = good("predict", run, without).splitlines()
    assert printed[0].split() == ["input", "label", "probability"] and len(printed) == 151

    scores = json.loads(good("evaluate", run, flowers, "--json"))
    tested = json.loads((run / "run.json").read_text())["data"]["split"]["test"]
    assert scores["rows"] == tested and "only its test rows" in scores["note"]
    other = tmp_path / "other.csv"
    pl.read_csv(flowers).head(120).write_csv(other)
    assert json.loads(good("evaluate", run, other, "--json"))["rows"] < tested  # its training rows are recognized
    pl.read_csv(flowers).head(120).with_columns(pl.col("petal_width_cm") + 0.01).write_csv(other)
    assert json.loads(good("evaluate", run, other, "--json"))["rows"] == 120
    table = good("evaluate", run, other)
    assert "accuracy" in table and "95 % interval" in table

    assert "evaluation needs the target column 'species'" in bad_line(run, without)


def bad_line(run, data) -> str:
    """Run one real process: its error goes to stderr, with exit code 1."""
    ended = subprocess.run([sys.executable, "-m", "fieldguide", "evaluate", run, data], capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == "" and ended.stderr.count("\n") == 1
    return ended.stderr


def test_predict_an_image_a_folder_and_a_list(good, digits_run, tmp_path):
    home = samples.path("digits")
    one = sorted((home / "7").iterdir())[0]
    (row,) = [json.loads(line) for line in good("predict", digits_run.path, one, "--json").splitlines()]
    assert row["label"] == "7" and len(row["probabilities"]) == 10
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x.png").write_bytes(one.read_bytes())
    with Image.open(sorted((home / "0").iterdir())[0]) as picture:
        picture.convert("RGB").resize((40, 30)).save(tmp_path / "b" / "x.jpg")
    rows = [json.loads(x) for x in good("predict", digits_run.path, tmp_path / "a", tmp_path / "b", "--json").splitlines()]
    assert [r["label"] for r in rows] == ["7", "0"]
    assert [r["input"] for r in rows] == [str(tmp_path / "a" / "x.png"), str(tmp_path / "b" / "x.jpg")]
    nested = good("predict", digits_run.path, tmp_path)
    assert "a/x.png" in nested and "b/x.jpg" in nested


def test_predict_lists_unreadable_inputs(call, digits_run, tmp_path):
    """The others are predicted in order; each error is one line on stderr, and the exit code is 3."""
    folder, run = tmp_path / "some", digits_run.path
    folder.mkdir()
    for i, file in enumerate(sorted((samples.path("digits") / "7").iterdir())[:6]):
        shutil.copy(file, folder / f"{i}.png")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])
    for i in (3, 4):
        (folder / f"{i}.png").write_bytes(b"")
    code, out, err = call("predict", run, folder, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and [a["input"] for a in answers] == [f"{i}.png" for i in range(6)]
    assert [set(a) == {"input", "error"} for a in answers] == [False, True, False, True, True, False]
    assert "corrupt" in answers[1]["error"] and "empty file" in answers[3]["error"]
    assert "3 of 6 inputs could not be read" in err and "Traceback" not in err and "allow" not in err
    code, out, err = call("predict", run, folder)
    assert code == 3 and "1.png" not in out and out.count(".png") == 3
    assert err.count("not read: ") == 3 and "not read: 3.png: empty file" in err
    code, out, err = call(
        "predict", run, folder / "0.png", folder / "1.png", tmp_path / "none.png", folder / "2.png", folder, "--json"
    )
    assert (
        code == 3
        and [("error" in json.loads(line)) for line in out.splitlines()]
        == [False, True, True, False, False, True, False, True, True, False]
        and "no such file" in out
    )
    assert call("predict", run, folder / "0.png")[0] == 0
    for refused, words in (
        (["predict", run, folder / "1.png"], "corrupt"),
        (["predict", run, folder / "1.png", folder / "3.png"], "none of the inputs can be read"),
        (["evaluate", run, damaged(tmp_path)], "corrupt"),
    ):
        code, out, err = call(*refused)
        assert code == 1 and not out and words in err and "--allow-bad" not in err and "Traceback" not in err


def damaged(tmp_path):
    """Images of two classes, one of which is truncated."""
    for name in ("3", "7"):
        shutil.copytree(samples.path("digits") / name, tmp_path / "classes" / name, ignore=lambda _, files: sorted(files)[20:])
    first = next((tmp_path / "classes" / "3").iterdir())
    first.write_bytes(first.read_bytes()[:40])
    return tmp_path / "classes"


def test_predict_text_given_as_argument(good, bad, text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = ["Return the indices of the maximum values along an axis.", "héllo 😀", "", "axis"]
    rows = [json.loads(x) for x in good("predict", text_run.path, *typed, "--json").splitlines()]
    assert [r["input"] for r in rows] == typed
    assert all(sum(r["probabilities"].values()) == pytest.approx(1, abs=1e-5) for r in rows)
    pl.DataFrame({"text": typed[:2]}).write_csv("t.csv")
    from_file = [json.loads(x) for x in good("predict", text_run.path, "t.csv", "--json").splitlines()]
    assert [r["input"] for r in from_file] == ["t.csv:2", "t.csv:3"]
    for a, b in zip(rows, from_file):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
    assert "Did you mean 't.csv'?" in bad("predict", text_run.path, "tt.csv")


# What cannot work is refused in one line that says what to do


def test_invalid_arguments_are_rejected(bad, iris_run, flowers, tmp_path):
    assert "Did you mean 'resnet50'?" in bad("show", "resnet51")
    assert "Did you mean 'resnet50'?" in bad("fit", "iris", "--model", "resnet51")
    assert "Did you mean 'tabular-regression'?" in bad("fit", "iris", "--task", "tabular-regresion")
    assert "Did you mean 'batch'?" in bad("fit", "iris", "--set", "batchs=3")
    assert "not an integer" in bad("fit", "iris", "--set", "batch=many")
    assert "KEY=VALUE" in bad("fit", "iris", "--set", "batch")
    assert "no group 'modell'" in bad("fit", "iris", "--set", "modell.dim=3")
    assert "model.dims" in bad("fit", "iris", "--model", "mlp-s", "--set", "model.dims=3").replace("'dims'", "model.dims")
    assert "dim='wide' must be an integer of at least 0" in bad("fit", "iris", "--model", "mlp-s", "--set", "model.dim=wide")
    assert "dim=-3 must be an integer of at least 0" in bad("show", "mlp-s", "--set", "dim=-3")
    assert "depths=2 must be a list" in bad("show", "resnet18", "--set", "depths=2")
    assert "Did you mean 'species'?" in bad("fit", flowers, "--target", "specis")
    assert "Did you mean 'species'?" in bad("check", flowers, "--target", "specis")
    assert "Did you mean 'iris'?" in bad("fit", "irris")
    assert "which this task cannot use" in bad("fit", "iris", "--model", "resnet18")
    assert "no model matches" in bad("models", "resnext*")
    assert "no run.json" in bad("predict", tmp_path, "x.csv")
    assert "no such file" in bad("predict", iris_run.path, "nowhere.csv")
    assert "schema" not in bad("evaluate", tmp_path / "nothing", "iris")


def test_fit_requires_either_data_or_resume(bad, iris_run):
    for arguments in ((), ("iris", "--resume", iris_run.path)):
        assert "either data to train on" in bad("fit", *arguments)
    for option in (("--target", "x"), ("--model", "mlp-s"), ("--seed", "2"), ("--out", "x"), ("--group", "g"), ("--task", "t")):
        assert f"{option[0]} cannot change" in bad("fit", "--resume", iris_run.path, *option)


def test_existing_output_is_never_overwritten(bad, good, iris_run, tmp_path):
    before = {p: p.read_bytes() for p in iris_run.path.rglob("*") if p.is_file()}
    said = bad("fit", "iris", "--out", iris_run.path, *TINY)
    assert f"fit --resume {iris_run.path}" in said
    assert before == {p: p.read_bytes() for p in iris_run.path.rglob("*") if p.is_file()}
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in bad("fit", "iris", "--out", tmp_path, *TINY)
    assert "a file" in bad("fit", "iris", "--out", tmp_path / "mine.txt", *TINY)
    assert "is finished already" in good("fit", "--resume", iris_run.path)


# The other verbs


def test_models(good):
    names = [line.split()[0] for line in good("models", "resnet*").splitlines()[1:]]
    assert {"resnet18", "resnet34", "resnet50", "resnet101", "resnet152"} <= set(names)
    assert all(n.startswith("resnet") for n in names)
    text = [json.loads(line) for line in good("models", "--task", "text-classification", "--json").splitlines()]
    assert {"gru-s", "lstm-s", "rnn-s"} <= {m["name"] for m in text} and {m["input_type"] for m in text} == {"tokens"}
    family = [json.loads(line) for line in good("models", "--family", "recurrent", "--json").splitlines()]
    assert {m["family"] for m in family} == {"recurrent"}


def test_show(good):
    said = good("show", "resnet50")
    assert "25,557,032 (as published)" in said and "4,089,184,256" in said and "He et al. 2015" in said
    assert "1x64x112x112" in said
    record = json.loads(good("show", "resnet50", "--json", "--set", "num_classes=10"))
    assert record["parameters"] == 25_557_032 - 990 * 2049 and record["config"]["num_classes"] == 10


def test_check(good, call, tmp_path):
    said = good("check", "iris")
    assert "150 examples" in said and "task: tabular-classification" in said and "species" in said
    home = tmp_path / "pictures"
    for name in ("dark", "light"):
        (home / name).mkdir(parents=True)
        for i in range(10):
            Image.new("L", (9 + i, 12), 20 * i + 100 * (name == "light")).save(home / name / f"{i}.png")
    assert "20 examples" in good("check", home)
    (home / "dark" / "3.png").write_bytes((home / "dark" / "4.png").read_bytes()[:40])
    code, _, err = call("check", home)
    assert code == 1 and "dark/3.png" in err and "--allow-bad" in err and "Traceback" not in err
    assert "19 examples from" in good("check", home, "--allow-bad")


def test_check_reports_errors_of_the_task(good, bad, tmp_path):
    """Mask values that are no classes are only detected when masks are read as such."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 200, (16, 16)).astype(np.uint8)
            colors = np.array([(0, 0, 0), (9, 8, 7), (7, 8, 9)], np.uint8)
            Image.fromarray(pixels if name == "images" else colors[pixels // 67]).save(tmp_path / name / f"{i}.png")
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nfield,0,0,0\nsquare,9,8,7\n")
    said = bad("check", tmp_path)
    assert "masks hold values outside the 2 classes" in said and "masks" in said
    assert "12 examples" in good("check", tmp_path, "--set", "task.ignore=460809")


def test_a_finding_is_counted_once(good, tmp_path):
    """ "2 x ..." and not "2 x ... [2x]"."""
    home = tmp_path / "pictures"
    for name in ("dark", "light"):
        (home / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGBA" if i < 2 else "RGB", (9, 12), (20 * i, 7, 100 * (name == "light"))).save(home / name / f"{i}.png")
    (line,) = [x for x in good("check", home).splitlines() if "transparent" in x]
    assert "4 x transparent" in line and "4x]" not in line


def test_samples_lists_all(good):
    said = good("samples")
    assert all(name in said for name in samples.SAMPLES)


def test_help_of_every_verb(good):
    for verb in VERBS:
        assert f"{verb} [OPTIONS]" in good(verb, "--help")


@pytest.mark.parametrize(
    "arguments", [("show", "resnet18"), pytest.param(("models", "--json", "lenet5-1998"), marks=pytest.mark.slow)]
)
def test_a_broken_pipe_is_no_error(arguments):
    """`fieldguide models | head -1` ends without an error."""
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-m", "fieldguide", *arguments], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    os.close(reading)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1) and err == b""  # rich ends with 1


def test_no_color_codes_if_output_is_redirected(flowers):
    said = subprocess.run([sys.executable, "-m", "fieldguide", "check", flowers], capture_output=True, text=True).stdout
    assert "\x1b" not in said and "species" in said


def test_plan_of_a_network_a_run_and_data(good, tmp_path):
    network = [json.loads(line) for line in good("plan", "fnn", "--batch", 8, "--json").splitlines()]
    assert [plan["mode"] for plan in network] == ["train", "predict"] and network[0]["fits"]
    assert network[0]["parts"]["weights"] == 4 * 269_322 == network[0]["parts"]["gradients"]
    assert network[0]["parts"]["optimizer"] >= 2 * network[0]["parts"]["weights"]
    text = good("plan", "fnn", "--mode", "predict", "--on", "t4", "--batch", 8)
    assert text.startswith("fnn: prediction, float32, batches of 8, on t4") and "peak" in text and "fits into" in text
    good("fit", "iris", *TINY, "--out", tmp_path / "run")
    assert good("plan", tmp_path / "run", "--mode", "train").startswith("mlp-s: training")
    assert good("plan", "iris", "--mode", "predict", *TINY).startswith("mlp-s: prediction")


def test_plan_names_what_is_wrong(call, tmp_path):
    for arguments, words in (
        (("fn",), "no network, sample, run folder or file"),
        (("fnn", "--on", "h100"), "unknown machine"),
        (("fnn", "--mode", "study"), "mode='study' is none of train, predict, serve"),
        ((tmp_path / "gone.csv",), "gone.csv"),
    ):
        code, _, err = call("plan", *arguments)
        assert code == 1 and words in err and "Traceback" not in err and len(err.splitlines()) <= 10
