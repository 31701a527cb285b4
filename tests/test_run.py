"""The run folder: the documented files, the same predictions after reopening, and old schemas."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors import safe_open

import fieldguide
from fieldguide.core.errors import DataError, RunError, SettingsError, WeightsError
from fieldguide.core.run_record import SCHEMA, migrate
from fieldguide.core.settings import Settings
from fieldguide.data import samples
from fieldguide.data.splits import Splits
from fieldguide.report.eval_samples import EvalSamples
from fieldguide.tasks import tasks

GOLDEN = Path(__file__).parent / "golden"
RUNS = ("iris_run", "digits_run", "text_run")
PREPROCESS = {"iris_run": {"task.json"}, "digits_run": {"task.json"}, "text_run": {"task.json", "text.json", "tokenizer.json"}}


@pytest.fixture(params=RUNS)
def run(request):
    found = request.getfixturevalue(request.param)
    found.kind = request.param
    return found


def copy(run, to: Path) -> Path:
    shutil.copytree(run.path, to)
    return to


def rewrite(path: Path, **changes) -> None:
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | changes))


# What is in it


def test_run_folder_has_the_documented_files(run):
    top = {p.name for p in run.path.iterdir()}
    assert top == {
        "run.json",
        "model.safetensors",
        "preprocess",
        "splits.npz",
        "row_digests.npz",
        "manifest.json",
        "metrics.jsonl",
        "report.html",
        "README.md",
        "fit.yaml",
        "checkpoints",
    }
    assert {p.name for p in (run.path / "preprocess").iterdir()} == PREPROCESS[run.kind]
    kept = {p.suffix for p in (run.path / "checkpoints").iterdir()}
    assert kept == {".json", ".safetensors"}


def test_run_folder_contains_no_pickle(run):
    """Each file has the format of its suffix, none holds a pickle, and arrays are numeric."""
    for path in (p for p in run.path.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")), path
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".jsonl":
            assert all(isinstance(json.loads(line), dict) for line in content.splitlines())
        elif path.suffix == ".safetensors":
            (size,) = struct.unpack("<Q", content[:8])
            json.loads(content[8 : 8 + size])
            with safe_open(path, "pt") as file:
                assert list(file.keys())
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                assert set(arrays) == ({"used"} if path.stem == "row_digests" else {"train", "validation", "test"})
                assert all(arrays[a].dtype.kind in "iu" for a in arrays)
        else:
            assert path.suffix in (".html", ".md", ".yaml"), f"{path} is of no documented kind"
            content.decode()


def test_run_json(run):
    record = json.loads((run.path / "run.json").read_text())
    assert set(record) == {
        "schema",
        "status",
        "task",
        "request",
        "model",
        "settings",
        "choice",
        "data",
        "cost",
        "machine",
        "versions",
        "started",
        "scores",
        "digests",
    }
    assert record["schema"] == SCHEMA == 2 and record["status"] == "done"
    assert set(record["request"]) == {
        "data",
        "target",
        "group",
        "time",
        "allow_bad",
        "kinds",
        "roles",
        "task",
        "settings",
        "weights",
        "model",
    }
    assert set(record["model"]) == {"architecture", "size", "config", "parts"}
    assert set(record["settings"]) == set(Settings().to_dict())
    assert None not in [record["settings"][k] for k in ("steps", "batch_size", "eval_steps", "precision", "channels_last")]
    assert {"parameters", "multiply_adds", "seconds", "steps", "best_step", "stopped", "peak_memory", "processes"} <= set(
        record["cost"]
    )
    assert {"root", "files", "bytes", "rows", "dropped", "digest", "source", "columns", "findings", "notes", "split"} == set(
        record["data"]
    )
    names = {m.name for m in run.task.metrics}
    scores = record["scores"]
    assert set(scores) == {"test", "intervals", "baselines", "tested"}
    assert set(scores["test"]) == set(scores["intervals"]) == names
    assert {b["name"] for b in scores["baselines"]} > {"majority class"}
    assert all(set(b["scores"]) == names for b in scores["baselines"])
    for name, (low, high) in scores["intervals"].items():
        assert low <= high, name
    split = record["data"]["split"]
    with np.load(run.path / "splits.npz") as parts:
        assert {k: len(parts[k]) for k in parts} == {k: split[k] for k in ("train", "validation", "test")}
        rows = np.concatenate([parts[k] for k in parts])
    assert sorted(rows) == list(range(record["data"]["rows"]))
    assert sum(p.numel() for p in run.model.parameters()) == record["cost"]["parameters"]


def test_the_manifest_names_every_file(run):
    entries = json.loads((run.path / "manifest.json").read_text())
    home = samples.path(run.record["request"]["data"])
    assert len(entries) == run.record["data"]["files"] and sum(e["rows"] for e in entries) == run.record["data"]["rows"]
    first = home / entries[0]["path"] if home.is_dir() else home
    assert entries[0]["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()


def test_losses_and_scores_by_step(run):
    lines = run.losses()
    steps = [x["step"] for x in lines if "loss" in x]
    assert steps == sorted(steps) and steps[-1] == run.record["settings"]["steps"]
    assert run.record["cost"]["best_step"] in [x["step"] for x in lines if "scores" in x]


def test_report_and_card_agree(run):
    value = run.task.metrics[0].text(run.scores[run.task.metrics[0].name])
    page, card = ((run.path / n).read_text() for n in ("report.html", "README.md"))
    plain = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    assert f"{value} of the held-out examples correct" in plain
    assert f"{value} of the held-out examples correct" in card
    for address in ("http://", "https://", 'src="//', "@import"):
        assert address not in page.replace("http://www.w3.org", ""), f"the report points to {address}"


# Opened again


def test_predictions_are_the_same_after_reopening(run, tmp_path):
    moved = copy(run, tmp_path / "elsewhere" / "run")
    again = fieldguide.open_run(moved)
    source = samples.path(run.record["request"]["data"])
    if source.is_dir():
        source = source / "4"
    first, second = run.predict(source), again.predict(source)
    assert [a["probabilities"] for a in first] == [a["probabilities"] for a in second]
    assert again.scores == run.scores and repr(again).endswith("done)")


def test_training_data_is_scored_on_its_test_rows(run):
    found = run.evaluate(run.record["request"]["data"])
    assert found["rows"] == run.record["data"]["split"]["test"] and "only its test rows" in found["note"]
    assert found["scores"] == pytest.approx(run.scores, abs=1e-6)
    assert found["intervals"].keys() == run.record["scores"]["intervals"].keys()


def test_other_data_is_scored_completely(iris_run):
    table = pl.read_csv(samples.path("iris")).with_columns(pl.col("sepal_length_cm") + 0.01)  # rows that training has not seen
    found = iris_run.evaluate(table.head(149))
    assert found["rows"] == 149 and not found["note"]
    one = iris_run.evaluate(table.head(1))
    assert one["rows"] == 1 and one["scores"]["accuracy"] in (0, 1) and np.isnan(one["scores"]["auc"])


def test_data_without_targets_cannot_be_scored(iris_run):
    with pytest.raises(DataError, match="evaluation needs the target column 'species'"):
        iris_run.evaluate(pl.read_csv(samples.path("iris")).drop("species"))


def test_inputs_of_several_sources_keep_their_names(iris_run, tmp_path):
    table = pl.read_csv(samples.path("iris")).drop("species")
    for name, rows in (("a", table[:2]), ("b", table[100:103])):
        rows.write_csv(tmp_path / f"{name}.csv")
    found = iris_run.predict([tmp_path / "a.csv", tmp_path / "b.csv", table[:1]])
    assert [a["input"] for a in found] == [
        f"{tmp_path}/a.csv:2",
        f"{tmp_path}/a.csv:3",
        f"{tmp_path}/b.csv:2",
        f"{tmp_path}/b.csv:3",
        f"{tmp_path}/b.csv:4",
        "memory:1",
    ]
    alone = iris_run.predict(table[101:102])[0]
    assert alone["probabilities"] == pytest.approx(found[3]["probabilities"], abs=1e-6)


# What cannot be opened


def test_other_folders_are_rejected(tmp_path):
    with pytest.raises(RunError, match=r"not a run folder: it has no run\.json"):
        fieldguide.open_run(tmp_path)
    with pytest.raises(RunError, match=r"not a run folder"):
        fieldguide.open_run(tmp_path / "nowhere")


def test_damaged_record(iris_run, tmp_path):
    path = copy(iris_run, tmp_path / "run")
    text = (path / "run.json").read_text()
    (path / "run.json").write_text(text[:300])
    with pytest.raises(RunError, match=r"run\.json is not valid JSON"):
        fieldguide.open_run(path)


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"schema": "one"}', '{"schema": null}'])
def test_json_of_another_kind_is_rejected(iris_run, tmp_path, content):
    path = copy(iris_run, tmp_path / "run")
    (path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json"):
        fieldguide.open_run(path)


def test_newer_schema_is_rejected(iris_run, tmp_path):
    path = copy(iris_run, tmp_path / "run")
    rewrite(path, schema=SCHEMA + 1)
    with pytest.raises(RunError, match=f"newer version of fieldguide .schema {SCHEMA + 1}; this version reads up to {SCHEMA}"):
        fieldguide.open_run(path)


@pytest.mark.parametrize("name", ["model.safetensors", "preprocess/task.json"])
@pytest.mark.parametrize("how", ["gone", "cut"])
def test_damaged_file_is_named(iris_run, tmp_path, name, how):
    path = copy(iris_run, tmp_path / "run")
    content = (path / name).read_bytes()
    (path / name).unlink()
    if how == "cut":
        (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises((RunError, WeightsError), match=Path(name).name.replace(".", r"\.")):
        fieldguide.open_run(path).predict(pl.read_csv(samples.path("iris")))


def test_run_without_checkpoint_explains_how_to_resume(iris_run, tmp_path):
    path = copy(iris_run, tmp_path / "run")
    rewrite(path, status="training")
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(RunError, match=r"not finished.*fit --resume"):
        fieldguide.open_run(path).predict(pl.read_csv(samples.path("iris")))


# Resumed after the last step


def test_crash_before_the_last_write_is_harmless(iris_run, tmp_path):
    """After training and calibration, but before run.json is updated: resuming gives the same run."""
    path = copy(iris_run, tmp_path / "run")
    rewrite(path, status="training")
    again = fieldguide.resume(path)
    assert again.status == "done" and again.task.temperature == iris_run.task.temperature
    assert again.scores == iris_run.scores
    assert (path / "model.safetensors").read_bytes() == (iris_run.path / "model.safetensors").read_bytes()


def test_settings_that_cannot_change_on_resume(iris_run, tmp_path):
    path = copy(iris_run, tmp_path / "run")
    rewrite(path, status="training")
    with pytest.raises(SettingsError, match="batch_size cannot change"):
        fieldguide.resume(path, settings={"batch": 3})
    rewrite(path, data=iris_run.record["data"] | {"digest": "0" * 64})
    with pytest.raises(RunError, match="has changed since"):
        fieldguide.resume(path)


# Golden folders of every released schema


def golden() -> list[Path]:
    return sorted(p.parent for p in GOLDEN.glob("v*/run.json"))


def test_every_task_has_a_golden_folder():
    names = {p.name.partition("-")[2].removesuffix("-in-images").removesuffix("-of-embeddings") for p in golden()}
    assert names == set(tasks())


def test_current_schema_has_golden_folders():
    tabular = {"tabular-classification", "tabular-regression", "image-classification", "text-classification"}
    assert {f"v{SCHEMA}-{name}" for name in tabular} <= {p.name for p in golden()}


def same(found, wanted, name):
    """Compare predictions across machines: floats within 1e-3, images within a few gray levels, all else exactly."""
    if isinstance(wanted, dict) and "media" in wanted:
        assert found.suffix == wanted["media"]
        if wanted["base64"] and wanted["media"] in (".png", ".webp"):
            opened = [Image.open(io.BytesIO(x)) for x in (found.content, base64.b64decode(wanted["base64"]))]
            a, b = (
                np.stack([np.asarray(frame.copy()) for frame in ImageSequence.Iterator(image)]).astype(float)
                for image in opened
            )
            assert a.shape == b.shape and np.abs(a - b).mean() < 3, name
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), name
        for key, value in wanted.items():
            same(found[key], value, f"{name}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), name
        for i, (a, b) in enumerate(zip(found, wanted)):
            same(a, b, f"{name}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-3), name
    else:
        assert found == wanted, name


@pytest.mark.parametrize("path", golden(), ids=lambda p: p.name)
def test_golden_folder_predicts_the_same(path):
    expected = json.loads((path / "expected.json").read_text())
    inputs = [str(path / name) if (path / name).exists() else name for name in expected["inputs"]]
    run = fieldguide.open_run(path)
    found = run.predict(inputs, **expected.get("asked", {}))
    assert len(found) == len(expected["answers"])
    for i, (answer, wanted) in enumerate(zip(found, expected["answers"])):
        same({k: answer[k] for k in wanted}, wanted, f"answer {i}")  # later versions may add to an answer
    assert (run.losses() or run.card.solver) and run.scores and run.record["schema"] == SCHEMA


@pytest.mark.parametrize("path", golden(), ids=lambda p: p.name)
def test_golden_folders_are_small_and_contain_no_local_paths(path):
    files = [p for p in path.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 450_000
    for file in files:
        content = file.read_bytes()
        assert not any(word in content for word in (b"/home/", b"/root/", b"/tmp/", b"/work/", b"/Users/")), file


def test_golden_predictions_vary():
    """Constant predictions would not detect wrong preprocessing."""
    for path in golden():
        answers = json.loads((path / "expected.json").read_text())["answers"]
        if path.name.split("-", 1)[1] not in (
            "tabular-classification",
            "tabular-regression",
            "image-classification",
            "text-classification",
        ):
            continue
        values = [next(iter(a.get("probabilities", a).values())) for a in answers]
        assert np.std(values) > 0.02, path.name


def test_schema_1_names_are_migrated():
    record = {
        "schema": 1,
        "model": {
            "architecture": "llama",
            "config": {"vocab": 5, "groups": 2, "base": 1e4, "dim": 8},
            "parts": {"critic": {"architecture": "mlp", "config": {"classes": 2}}},
        },
        "settings": {"batch": 8, "tune": "whole", "lr": 0.1},
    }
    found = migrate(record)
    assert found["schema"] == SCHEMA
    assert found["model"]["config"] == {"vocab_size": 5, "kv_heads": 2, "rope_theta": 1e4, "dim": 8}
    assert found["model"]["parts"]["critic"]["config"] == {"num_classes": 2}
    assert found["settings"] == {"batch_size": 8, "finetune": "whole", "lr": 0.1}


def test_eval_samples_of_schema_1_are_read_from_their_former_folder(tmp_path):
    sample = [{"title": "Samples", "note": "", "quotes": [{"text": "a b c", "caption": ""}]}]
    for folder in (tmp_path / "old" / "glimpses", tmp_path / "new" / "eval_samples"):
        folder.mkdir(parents=True)
        (folder / "step-00000002.json").write_text(json.dumps(sample))
        samples = EvalSamples(folder.parent)
        assert samples.folder == folder
        (step, (quotes,)), *others = samples.read()
        assert step == 2 and quotes.quotes[0].text == "a b c" and not others
    assert EvalSamples(tmp_path / "empty").folder.name == "eval_samples"


def test_splits_have_the_documented_fields():
    assert [f.name for f in Splits.__dataclass_fields__.values()] == ["train", "validation", "test", "description"]


def test_verdict_names_better_baselines(iris_run):
    import copy

    from fieldguide.report.pages import summarize_result

    record, metric = copy.deepcopy(iris_run.record), iris_run.task.metrics[0]
    record["scores"]["test"]["accuracy"] = 0.5
    linear = next(b for b in record["scores"]["baselines"] if b["name"] == "linear")
    for other in record["scores"]["baselines"]:
        other["scores"]["accuracy"] = 0.4
    linear["scores"]["accuracy"] = 0.6
    assert "does not beat linear" in summarize_result(record, metric)
    linear["scores"]["accuracy"] = 0.4
    assert "does not beat" not in summarize_result(record, metric)


def test_networks_without_a_config_are_loaded_from_a_run(digits_run):
    """SimpleCNN has the constructor of the guide's code."""
    network = fieldguide.load(digits_run.path)
    for name, tensor in digits_run.model.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
