"""`fieldguide compare` shows scores, costs, settings that differ and learning curves of several runs."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import fieldguide
from fieldguide.cli.commands import main
from fieldguide.core.errors import RunError
from fieldguide.core.run_record import read_record, write_record
from fieldguide.report.compare import compare, flatten_settings, name_runs

SETTINGS = {"steps": 12, "batch_size": 32, "precision": "float32", "eval_steps": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    make = lambda name, seed=0, **more: fieldguide.fit(
        "iris", model="mlp-test", out=folder / name, seed=seed, settings={**SETTINGS, **more}
    )
    return [make("slow", lr=1e-5), make("fast", lr=1e-2)]


@pytest.mark.slow
def test_the_best_run_is_first_and_the_page_shows_everything(runs, tmp_path):
    comparison = compare(runs, tmp_path / "out" / "page.html")
    assert comparison.names == ["fast", "slow"]
    assert comparison.scores["fast"]["accuracy"] > comparison.scores["slow"]["accuracy"]
    page = (tmp_path / "out" / "page.html").read_text()
    for words in (
        "Comparison of 2 runs",
        "AUC",
        "95 % interval",
        "Settings that differ",
        "0.01",
        "1e-05",
        "Validation accuracy by time",
    ):
        assert words in page, words
    assert page.count('class="line c0"') >= 3 and page.count('class="line c1"') >= 3  # overlaid learning curves
    links = re.findall(r'<a href="([^"#]*)"', page)
    assert [(tmp_path / "out" / link).resolve() for link in links] == [run.path / "report.html" for run in comparison.runs]
    assert [row[0] for row in comparison.list_differences().rows] == ["lr"]
    text = repr(comparison)
    assert "fast" in text and "Settings that differ" in text


def test_paths_and_names(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path / "a" / "run")
    shutil.copytree(runs[1].path, tmp_path / "b" / "run")
    opened = [fieldguide.open_run(tmp_path / name / "run") for name in "ab"]
    assert name_runs(opened) == ["a/run", "b/run"]
    found = fieldguide.compare([tmp_path / "a" / "run", str(tmp_path / "b" / "run")], out=tmp_path / "page.html")
    assert found.names == ["b/run", "a/run"]


def test_notes_say_what_is_not_comparable(runs, tmp_path):
    assert compare(runs, tmp_path / "page.html").notes == []
    changed = tmp_path / "changed"
    shutil.copytree(runs[0].path, changed)
    record = read_record(changed)
    record["data"]["digest"], record["machine"]["cores"] = "0" * 64, 99
    write_record(changed, record)
    notes = compare([*runs, changed], tmp_path / "page.html").notes
    assert len(notes) == 2 and "different data" in notes[0] and "different machines" in notes[1]


def test_runs_that_are_not_tested_have_curves_but_no_scores(runs, tmp_path):
    stopped = tmp_path / "stopped"
    shutil.copytree(runs[0].path, stopped)
    record = read_record(stopped)
    del record["scores"]
    record["status"] = "training"
    for key in ("seconds", "steps", "peak_memory", "latency"):
        record["cost"].pop(key)
    write_record(stopped, record)
    comparison = compare([stopped, *runs], tmp_path / "page.html")
    assert comparison.names[-1] == "stopped" and "Not tested yet" in comparison.notes[0]
    assert comparison.list_scores().rows[-1][2:4] == ["–", "–"]
    with pytest.raises(RunError, match="none of the runs is tested"):
        compare([stopped, stopped], tmp_path / "page.html")


def test_settings_of_other_architectures_are_not_compared(runs):
    record = runs[0].record
    assert "model.num_classes" in (with_model := flatten_settings(record, True)) and with_model["lr"] == "1e-05"
    assert not [key for key in flatten_settings(record, False) if key.startswith("model.")]


def test_mistakes_are_explained(runs, digits_run, tmp_path):
    with pytest.raises(RunError, match="at least two"):
        compare([runs[0].path], tmp_path / "page.html")
    with pytest.raises(RunError, match="2 tasks cannot be compared"):
        compare([runs[0], digits_run], tmp_path / "page.html")
    with pytest.raises(RunError):
        compare([runs[0].path, tmp_path / "no run"], tmp_path / "page.html")


def test_command_line(runs, tmp_path, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr("sys.argv", ["fieldguide", "compare", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return stop.code
        return 0

    monkeypatch.chdir(tmp_path)
    assert not call(*(run.path for run in runs))
    said = capsys.readouterr().out
    assert "Page: compare.html" in said and (tmp_path / "compare.html").exists() and "lr" in said
    assert not call(*(run.path for run in runs), "--json", "--out", "other.html")
    found = json.loads(capsys.readouterr().out)
    assert set(found["scores"]) == {"fast", "slow"} and found["page"] == "other.html"
    assert call(runs[0].path, tmp_path / "missing")
