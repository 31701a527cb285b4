"""Exports: verified on raw held-out rows without torch, and every mistake in an export is found."""

from __future__ import annotations

import base64
import datetime
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import polars as pl
import pytest
import soundfile
import torch
from PIL import Image
from scipy.special import ndtri

import fieldguide
from fieldguide.cli import commands
from fieldguide.core.errors import SettingsError
from fieldguide.core.media import Media
from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data import samples
from fieldguide.data.media import audio, images
from fieldguide.data.number_formats import NumberFormat
from fieldguide.data.preprocessing.image_transform import ImageTransform, ResizeTransform
from fieldguide.data.preprocessing.labels import list_spellings
from fieldguide.data.preprocessing.speech import LogMel
from fieldguide.data.preprocessing.table import fit_quantiles, to_normal
from fieldguide.data.timeseries.frequency import Frequency
from fieldguide.data.timestamps import DateFormat
from fieldguide.exporting import onnx_file
from fieldguide.exporting.audio import Spectrogram
from fieldguide.exporting.builders import build_graph
from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.export import export
from fieldguide.exporting.folder import build_program, write_folder
from fieldguide.exporting.gguf import make_probes
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.exporting.image_generation import tabulate_sampler
from fieldguide.exporting.steps.images import Resize
from fieldguide.exporting.steps.tables import compute_normal_quantile, find_day_of_year, interpolate
from fieldguide.exporting.tables import describe_cells
from fieldguide.exporting.verify import verify
from fieldguide.metrics import generative
from fieldguide.models.feedforward.bag_of_ngrams import BagOfNgrams, Config
from fieldguide.objectives.ctc_decoding import align, collapse
from fieldguide.objectives.diffusion import DDIM, DDPM, DPMSolver, Euler, Heun, build_process
from fieldguide.objectives.diffusion.unclip import PRIOR_SPACING
from tv import transformers


def build_parts(parts):
    """Return the source of run.py without the import that opens graphs."""
    return build_program(parts).replace("from session import Session\n", "")


@pytest.fixture(scope="module")
def people_run(tmp_path_factory):
    """A network for a table with numbers, texts, truth values, dates and missing cells, some of them in local formats."""
    folder, rng = tmp_path_factory.mktemp("people"), np.random.default_rng(0)
    lines = ["income;color;member;joined;bought"]
    for i in range(300):
        day = datetime.date(2019, 1, 1) + datetime.timedelta(int(rng.integers(1200)))
        income, color, member = rng.normal(50_000, 20_000), ["red", "green", "deep blue"][rng.integers(3)], rng.random() < 0.5
        bought = (income > 50_000) ^ (color == "red")
        cells = [f"{income:,.2f}".translate(str.maketrans(",.", ".,")), color, "yes" if member else "no", f"{day:%d.%m.%Y}"]
        for place in rng.integers(0, 40, 2):
            if place < 4:
                cells[place] = ["", "n/a"][i % 2]
        lines.append(";".join([*cells, "b1" if bought else "b0"]))
    (folder / "people.csv").write_text("\n".join(lines), encoding="utf-8")
    return fieldguide.fit(
        folder / "people.csv",
        target="bought",
        model="tabm-s",
        out=folder / "run",
        settings={"steps": 40, "precision": "float32"},
    )


@pytest.fixture(scope="module")
def color_run(tmp_path_factory):
    """A network for color photos of various sizes, whose classes are mixtures of red and blue."""
    folder, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for i in range(80):
        warm = i % 2 == 0
        (folder / "photos" / ("warm" if warm else "cold")).mkdir(parents=True, exist_ok=True)
        low = rng.integers(0, 256, (5, 6, 3))
        low[..., 0 if warm else 2] = np.minimum(low[..., 0 if warm else 2] + 60, 255)
        photo = Image.fromarray(low.astype(np.uint8)).resize(tuple(rng.integers(20, 60, 2)), Image.Resampling.BICUBIC)
        photo.save(folder / "photos" / ("warm" if warm else "cold") / f"{i:03}.{'png' if i % 3 else 'jpg'}")
    return fieldguide.fit(
        folder / "photos",
        model="simplecnn",
        out=folder / "run",
        settings={"steps": 40, "precision": "float32", "task.side": 16},
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function from a run to its export, which is made once."""
    made = {}

    def export(run):
        if run.path not in made:
            made[run.path] = run.export(out=tmp_path_factory.mktemp("exports") / "export")
        return made[run.path]

    return export


@pytest.mark.parametrize(
    "name",
    [
        "people_run",
        pytest.param("color_run", marks=pytest.mark.slow),
        "digits_run",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("iris_run", "text_run", "messy_run")),
    ],
)
def test_exports_equal_the_run_on_raw_rows(name, request, exported):
    run = request.getfixturevalue(name)
    done = exported(run)
    found, folder = json.loads((done.path / "verify.json").read_text()), done.path
    assert done.passed, done.verification.problems
    assert found["agreement"] == 1 and found["largest"] < 1e-4 and found["rows"] >= 8
    for before, after in done.verification.scores.values():
        assert before == pytest.approx(after, abs=1e-3)
    assert len((folder / "run.py").read_text().splitlines()) < 150
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    assert all(value.shape[0] == "batch" for value in (*session.get_inputs(), *session.get_outputs()))
    assert json.loads((folder / "signature.json").read_text()) == json.loads(json.dumps(run.signature.to_json()))


def test_the_folder_runs_from_another_place_and_prints_records(iris_run, exported, tmp_path):
    moved = shutil.copytree(exported(iris_run).path, tmp_path / "moved")
    rows = tmp_path / "rows.jsonl"
    row = {"sepal_length_cm": 5.1, "sepal_width_cm": 3.5, "petal_length_cm": 1.4, "petal_width_cm": None}
    rows.write_text(json.dumps(row) + "\n")
    done = subprocess.run(
        [sys.executable, "-E", str(moved / "run.py"), str(rows)], capture_output=True, text=True, cwd=tmp_path
    )
    want = iris_run.predict([row])[0]
    assert Comparison(1e-5).compare({k: v for k, v in want.items() if k != "input"}, json.loads(done.stdout))[1] == "", (
        done.stderr
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision, part", [("float16", 0.65), ("int8", 0.5)])
def test_weights_in_fewer_bits_make_the_file_smaller(digits_run, exported, precision, part, tmp_path):
    whole, done = exported(digits_run).path, digits_run.export(out=tmp_path / "export", precision=precision)
    size = lambda folder: (folder / "model.onnx").stat().st_size
    assert done.passed and size(done.path) < part * size(whole)
    assert done.verification.largest > 1e-6
    before, after = done.verification.scores["accuracy"]
    assert abs(before - after) < 0.02


TRICKY_NUMBERS = [
    *"1 -1 +1 1.5 1,5 1.234,56 1,234.56 1,234 12,34 .5 ,5 5. 1e3 -1E-2 (5) (1,234.5) 5- $5 -$5 $-5 $(5) ($5) 5% 5,5% 0.08 0 0%".split(),
    *"5_000 1'000 \u22125 \uff15 5,- 5,-€ 5€ 5.00€ 1\u00a0234,5 --5 - abc 1.2.3 $ 5kg".split(),
    *("1 234,5", "- 5", "5 %", "$ 5", "5 €", "-$ 5", "( 5 )", "5 -"),
]


def test_the_program_reads_numbers_as_training(table_program):
    words = {"$": ("$", ""), "%": ("", "%"), "€": ("", "€"), "": ("", "")}
    marks = [(".", ""), (",", ""), (".", ","), (",", "."), (",", " "), (".", "'")]
    for (decimal, grouping), (prefix, suffix), accounting in itertools.product(marks, words.values(), (False, True)):
        form = NumberFormat(decimal, grouping, prefix, suffix, accounting)
        for cell, want in zip(TRICKY_NUMBERS, form.parse(pl.Series(TRICKY_NUMBERS)).to_list()):
            column = {"pattern": form.build_pattern(), "format": form.to_json()}
            assert read_or_none(table_program["to_number"], cell, column) == want, (cell, form)


def test_the_program_reads_dates_as_training(table_program):
    cells = [
        *("2021-04-03", "2021-4-3", "2021/04/03 14:05", "2021.04.03T9:05", "03.04.2021", "13.04.2021", "04/13/2021"),
        *("04/03/21 2:05 PM", "04/03/71 12:05 am", "03.04.2021 14:05:06,5", "2021-04-03T14:05:00Z", "2021-04-03 14:05+02:00"),
        *(
            "2021-04-03 14:05:00.123456-0330",
            "03. 04. 2021",
            "2021-13-01",
            "32.01.2021",
            "2021-04-03 24:00",
            "2021-04-03 25:00",
        ),
        *("03.04.2021.", "2021-04-03, 14:05", "2021-04-03 14", "2021-04-03 13:05 PM", "2021-04-03 14:65", "1.2.3", "03.04.999"),
        *("2021-04-03T14:05:00+02", "2021-04-03 2PM", "2021-04-03 2 p.m.", "0:30", "x"),
    ]
    for form in (DateFormat("dmy"), DateFormat("mdy"), DateFormat("dmy", "UTC"), DateFormat("ymd"), DateFormat("dmy", "local")):
        for cell, want in zip(cells, form.parse(pl.Series(cells)).to_list()):
            days = read_or_none(table_program["to_days"], cell, {"format": form.to_json()})
            found = None if days is None else datetime.datetime(1970, 1, 1) + datetime.timedelta(days)
            assert (found is None) == (want is None) and (want is None or abs(found - want).total_seconds() < 1e-3), (
                cell,
                form,
            )


def read_or_none(read, cell, column):
    try:
        return read(cell, column)
    except (ValueError, TypeError):  # the program takes the cell as missing
        return None


@pytest.fixture(scope="module")
def table_program(tmp_path_factory):
    """The names of run.py for tables."""
    folder = tmp_path_factory.mktemp("program")
    (folder / "export.json").write_text(json.dumps(describe_cells()))
    names = {"__file__": str(folder / "run.py"), "__name__": "run"}
    exec(compile(build_parts(("numbers", "stacked", "tables", "classes", "table_answers")), "run.py", "exec"), names)
    return names


@pytest.fixture(scope="module")
def messy_run(tmp_path_factory):
    """Boosted trees for a table whose columns have the names of values in the graph, with cells that are not numbers or words."""
    folder, rng = tmp_path_factory.mktemp("messy"), np.random.default_rng(0)
    lines = ["label,x,raw,codes_0,probabilities,class"]
    for i in range(300):
        label, x, color = ["a", "ü 🌴", "None"][rng.integers(3)], rng.normal(), ["1.0", "2", "3.0"][rng.integers(3)]
        cells = [label, f"{x:.3f}", ["yes", "no"][rng.integers(2)], color, f"{rng.random():.2f}"]
        if i % 29 == 0:
            cells[1 + i % 2] = "unknown"
        lines.append(",".join([*cells, "up" if x + (label == "a") > 0.5 else "down"]))
    (folder / "messy.csv").write_text("\n".join(lines), encoding="utf-8")
    return fieldguide.fit(folder / "messy.csv", target="class", model="gradient-boosting", out=folder / "run", allow_bad=True)


@pytest.mark.slow
def test_names_of_columns_may_be_those_of_values_in_the_graph(messy_run, exported):
    done = exported(messy_run)
    session = onnxruntime.InferenceSession(str(done.path / "model.onnx"))
    names = [value.name for value in session.get_inputs()]
    assert done.passed and "label_column" in names and "label" not in names
    assert json.loads((done.path / "export.json").read_text("utf-8"))["renamed"]["label"] == "label_column"


def test_the_operations_of_graphs_find_the_same_ngrams(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 12, (40, 9), generator=generator)
    mask = torch.arange(9) < torch.randint(1, 10, (40, 1), generator=generator)
    for texts in (tokens, tokens[:1, :1]):
        model = BagOfNgrams.from_inputs(Config(vocab_size=12, num_classes=3), [(texts, mask[: len(texts), : texts.shape[1]])])
        torch.nn.init.normal_(model.head.weight, generator=generator)
        place, weight = model.weigh(tokens, mask)
        logits = model(tokens, mask)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
            again = model.weigh(tokens, mask)
            assert torch.equal(place, again[0]) and torch.equal(weight, again[1])
            assert torch.allclose(logits, model(tokens, mask), atol=1e-6)


def test_other_spellings_of_numbers_and_truth_values_are_known():
    assert list_spellings(("False", "True"), 1) == {
        text: place for place, n, word in ((1, "0", "false"), (2, "1", "true"))
        for text in (*(z + n + e for z in ("", "0", "00") for e in ("", ".", ".0", ".00")), word, word.upper())
    }  # fmt: skip
    found = list_spellings(("1", "1.0", "02", "red"))
    assert found["2"] == found["02.0"] == 2 and "01" not in found and "1." not in found
    assert list_spellings(("a", "b")) == {}


def test_a_run_whose_data_has_moved_asks_for_data(messy_run, tmp_path):
    source = Path(messy_run.record["data"]["source"])
    moved = source.rename(source.with_name("moved.csv"))
    try:
        with pytest.raises(ExportError, match=r"messy.csv.*\n.*with --data"):
            messy_run.export(out=tmp_path / "export")
        assert list(tmp_path.iterdir()) == []
    finally:
        moved.rename(source)


# ------------------------------------------------------------------------------------------------ mistakes are found


def edit_json(path, change):
    value = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(change(value)), encoding="utf-8")


def roll_labels(folder):
    model = onnx.load(folder / "model.onnx")
    node = next(n for n in model.graph.node if n.output[0] == "label")
    names = next(a for a in node.attribute if a.name == "values_strings").strings
    names.append(names.pop(0))
    onnx.save(model, folder / "model.onnx")


def swap_channels(folder):
    path = folder / "run.py"
    path.write_text(path.read_text().replace("np.atleast_3d(np.asarray(image))", "np.atleast_3d(np.asarray(image))[..., ::-1]"))


def shuffle_tokens(folder):
    def change(value):
        words = value["model"]["vocab"]
        value["model"]["vocab"] = dict(zip(words, [*list(words.values())[50:], *list(words.values())[:50]]))
        return value

    edit_json(folder / "tokenizer.json", change)


MISTAKES = {
    "shifted labels": ("digits_run", roll_labels),
    "blue before red": ("color_run", swap_channels),
    "stale tokenizer": ("text_run", shuffle_tokens),
    "order of the names": ("digits_run", lambda f: edit_json(f / "export.json", lambda v: {**v, "labels": v["labels"][::-1]})),
    "decimal comma": (
        "people_run",
        lambda f: edit_json(f / "export.json", lambda v: {**v, "columns": [{**c, "format": {}} for c in v["columns"]]}),
    ),
}


SLOW = {"stale tokenizer", "blue before red"}  # these exports take long


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MISTAKES])
def test_mistakes_in_a_folder_are_found(name, request, exported, tmp_path):
    fixture, change = MISTAKES[name]
    run = request.getfixturevalue(fixture)
    shutil.copytree(exported(run).path, tmp_path / "export")
    change(tmp_path / "export")
    try:
        found = verify(run, tmp_path / "export", run.record["data"]["source"])
    except ExportError as error:
        assert "run.py" in str(error)
    else:
        assert not found.passed and found.problems


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean", "temperature"])
def test_mistakes_in_a_graph_are_found(name, color_run, tmp_path):
    graph = build_graph(color_run)
    if name == "mean":
        transform = graph.module.front.transform
        graph.module.front.transform = ImageTransform(transform.side, 3, (0.45, 0.5, 0.5), transform.std, transform.fit)
    else:
        assert abs(graph.module.back.temperature - 1) > 0.01
        graph.module.back.temperature = 1.0
    write_folder(color_run, graph, tmp_path / "export", "run")
    assert not verify(color_run, tmp_path / "export", color_run.record["data"]["source"]).passed


def test_a_frozen_axis_is_an_error():
    class Frozen(torch.nn.Module):
        def forward(self, *tensors):
            return (tensors[0].reshape(3, 4) * 2,)

    graph = Graph(Frozen(), (TensorSpec("x", "float32", (BATCH, Axis("width", 4))),), ("y",), "tables")
    with pytest.raises(ExportError, match="fails for x 1x4, so a dynamic axis became fixed"):
        onnx_file.check_sizes(graph, onnx_file.trace(graph))


def test_a_graph_with_other_values_is_an_error():
    class Double(torch.nn.Module):
        def forward(self, *tensors):
            return (tensors[0] * torch.full((4,), 2.0),)

    graph = Graph(Double(), (TensorSpec("x", "float32", (BATCH, Axis("width", 4))),), ("y",), "tables")
    model = onnx_file.trace(graph)
    onnx_file.check_sizes(graph, model)
    model.graph.node[-1].op_type = "Add"
    with pytest.raises(ExportError, match="output 'y' of the graph differs from the network's for 1 rows of size 7"):
        onnx_file.check_sizes(graph, model)


def test_a_failed_export_is_renamed_and_exits_with_3(digits_run, exported, tmp_path, monkeypatch, capsys):
    right = exported(digits_run).path

    def write_wrong(predictor, graph, out, *rest):
        shutil.copytree(right, out)
        roll_labels(out)

    monkeypatch.setattr("fieldguide.exporting.folder.write_folder", write_wrong)
    monkeypatch.setattr(sys, "argv", ["fieldguide", "export", str(digits_run.path), "--out", str(tmp_path / "export")])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 3
    assert not (tmp_path / "export").exists() and (tmp_path / "export.unverified" / "verify.json").exists()
    assert "must not be used" in capsys.readouterr().err


def test_ties_are_no_differences():
    find = lambda want, got: Comparison(1e-4).compare(want, got)[1]
    tied = {"label": "a", "probabilities": {"a": 0.50001, "b": 0.49999}}
    assert find(tied, {"label": "b", "probabilities": {"a": 0.49999, "b": 0.50001}}) == ""
    clear = {"label": "a", "probabilities": {"a": 0.7, "b": 0.3}}
    assert find(clear, {"label": "b", "probabilities": {"a": 0.7, "b": 0.3}})
    assert find(clear, {"label": "a"}) and find({"x": 1.0}, {"x": 1.05}) and find([1], [1, 2])


def test_a_score_at_the_threshold_is_an_anomaly_or_not():
    compare = Comparison(1e-4).compare
    record = lambda score, anomaly: {"anomaly": anomaly, "score": score}
    assert compare(record(1.00005, True), record(0.99999, False))[1] == ""
    assert compare(record(1.01, True), record(1.01, False))[1].startswith("anomaly")
    assert compare(record(1.0, True), record(0.9, False))[1].startswith("score")


def test_objects_are_matched_whatever_their_order():
    one = {"label": "cat", "score": 0.80001, "box": [1.0, 2.0, 30.0, 40.0]}
    two = {"label": "dog", "score": 0.80002, "box": [50.0, 2.0, 70.0, 40.1]}
    low = {"label": "cat", "score": 0.1, "box": [0.0, 0.0, 5.0, 5.0]}
    find = lambda want, got, **limits: Comparison(1e-4, **limits).compare(want, got)[1]
    assert find([two, one, low], [one, {**two, "box": [50.0, 2.0, 70.0, 40.0]}, low]) == ""
    assert find([one, low], [{**one, "label": "dog"}, low])
    for want, got in (([two, one, low], [two, one]), ([low], []), ([one], [])):  # whatever the score
        assert "missing" in find(want, got) and "not found by the original" in find(got, want)
    for limits in ({"threshold": 0.09995}, {"most": 3}):  # rounding decides on which side of a limit the last one is
        assert find([two, one, low], [two, one], **limits) == "" == find([two, one], [two, one, low], **limits)
        assert "missing" in find([two, one, low], [two, low], **limits)


# ------------------------------------------------------------------------------------------------ Hugging Face


@pytest.fixture(scope="module")
def bert_run(tmp_path_factory):
    """A BERT for pairs of texts, after a few steps."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    words = "the a red green big small cat dog runs sleeps near under old house tree".split()
    text = lambda: " ".join(rng.choice(words, rng.integers(4, 12)))
    rows = [f"{text()} number {i},{text()} item {i * 7},{'same' if i % 2 else 'other'}" for i in range(90)]
    (folder / "pairs.csv").write_text("\n".join(["first,second,label", *rows]))
    settings = {"steps": 5, "precision": "float32", "column.first": "text", "column.second": "text"}
    return fieldguide.fit(folder / "pairs.csv", target="label", model="bert-test", out=folder / "run", settings=settings)


def test_transformers_reads_a_text_classifier(bert_run, tmp_path):
    folder = bert_run.export("huggingface", out=tmp_path / "export").path
    pairs = [
        ("the red cat sleeps", "a dog runs under the tree"),
        ("big old house", "the small green cat runs near a dog item 7"),
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = network(**tokenizer(*map(list, zip(*pairs)), return_tensors="pt", padding=True, truncation=True)).logits
    p = (logits.double() / bert_run.task.temperature).softmax(1)
    want = bert_run.predict([{"first": a, "second": b} for a, b in pairs])
    got = [{network.config.id2label[i]: float(v) for i, v in enumerate(row)} for row in p]
    assert Comparison(1e-5).compare([one["probabilities"] for one in want], got)[1] == ""
    again = fieldguide.pipeline(str(folder))
    assert again.task.name == "text-classification" and again.classes == bert_run.classes


def test_networks_without_a_public_format_are_named(text_run, tmp_path):
    with pytest.raises(fieldguide.WeightsError, match="cannot be saved in the format 'huggingface'"):
        text_run.export("huggingface", out=tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "sample, task, model", [("scattered", None, "yolov8-test"), ("puppets", "keypoint-detection", "yolov8-pose-test")]
)
def test_detectors_equal_the_run(sample, task, model, tmp_path):
    run = fieldguide.fit(sample, task=task, model=model, out=tmp_path / "run", settings={"steps": 60, "precision": "float32"})
    done = run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows >= 100, done.verification.problems
    before, after = done.verification.scores["map"]  # of all objects, not only of those above the threshold
    assert abs(before - after) < 1e-3 and abs(before - run.record["test"]["scores"]["map"]) < 0.02


def test_records_of_objects_are_scored_as_outputs():
    """Boxes are rounded to a tenth of a pixel in records."""
    run = fieldguide.open_run(GOLDEN / "v1-object-detection")
    records = list(run.predict(sorted(map(str, (GOLDEN / "v1-object-detection").glob("input-*.png"))), threshold=0.0))
    found = run.task.collect_outputs(records)
    assert found["boxes"].shape == (*found["labels"].shape, 4) and len(found["labels"]) == 2
    real = found["labels"] >= 0
    assert real.sum(1).tolist() == [len(record["objects"]) for record in records] and (found["scores"][~real] == 0).all()
    assert found["scores"][real].tolist() == pytest.approx([one["score"] for record in records for one in record["objects"]])
    targets = {"boxes": found["boxes"], "labels": found["labels"], "crowd": np.zeros(found["labels"].shape, dtype=bool)}
    assert run.task.score(found, targets)["map"] > 0.99
    assert run.task.collect_outputs([{"found": "nothing"}]) is None


# ------------------------------------------------------------------------------------------------ errors


def test_mistaken_calls(iris_run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SettingsError, match="exists already"):
        iris_run.export(out=tmp_path / "full")
    with pytest.raises(SettingsError, match=r"unknown format 'onx'. Did you mean 'onnx'"):
        iris_run.export("onx", out=tmp_path / "export")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_a_table_with_texts_names_the_column(tmp_path):
    rng = np.random.default_rng(0)
    words = [
        "the parcel came late again",
        "very happy with the quality",
        "it broke after one single day",
        "would buy it once more",
    ]
    rows = [f"{rng.normal():.3f},{words[rng.integers(4)]} {i},{'yn'[i % 2]}" for i in range(80)]
    (tmp_path / "reviews.csv").write_text("\n".join(["price,review,good", *rows]))
    run = fieldguide.fit(tmp_path / "reviews.csv", target="good", model="mlp-s", out=tmp_path / "run", settings={"steps": 2})
    with pytest.raises(SettingsError, match="column 'review' holds texts"):
        run.export(out=tmp_path / "export")


# ------------------------------------------------------------------------------------------------ steps


def test_numbers_are_scaled_as_in_training():
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=400) * 3)  # many are equal
    knots = fit_quantiles(values)
    new = np.concatenate([values, [-99, 99, knots[0], knots[-1]], rng.normal(size=300) * 3])
    padded = torch.tensor([[*knots, np.inf, np.inf]], dtype=torch.float64)
    got = compute_normal_quantile(interpolate(torch.from_numpy(new)[:, None], padded, torch.tensor([len(knots)])))[:, 0]
    assert abs(got.numpy() - to_normal(new, knots)).max() < 1e-12
    p = np.concatenate([np.geomspace(1e-7, 0.5, 500), 1 - np.geomspace(1e-7, 0.5, 500)])
    assert abs(compute_normal_quantile(torch.from_numpy(p)).numpy() - ndtri(p)).max() < 1e-13


def test_days_of_the_year_follow_the_calendar():
    days = torch.arange(-80_000, 60_000, 7)
    want = [(datetime.date(1970, 1, 1) + datetime.timedelta(int(day))).timetuple().tm_yday for day in days]
    assert find_day_of_year(days).tolist() == want


TRANSFORM = ImageTransform(48, 3, (0.5, 0.4, 0.3), (0.25, 0.3, 0.2))
RESIZES = (
    "crop bicubic",
    "crop 0.875 bicubic",
    "crop 0.9 lanczos even",
    "pad bicubic",
    "stretch bilinear",
    "crop 0.875 bilinear",
)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch", *RESIZES])
def test_images_are_resized_as_by_pillow(fit):
    transform = TRANSFORM.with_resize(fit) if " " in fit else ImageTransform(48, 3, *[(0.5,) * 3, (0.25,) * 3], fit)
    rng = np.random.default_rng(0)
    for height, width in ((90, 120), (333, 200), (48, 48), (30, 41), (250, 60), (60, 250), (400, 90)):
        low = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
        photo = Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC)
        cut = transform.cut if isinstance(transform, ResizeTransform) else None
        want = images.load_pixels(photo, transform.side, 3, transform.fit, cut)
        got = Resize(transform)(torch.from_numpy(np.asarray(photo).copy())[None])["image"][0]
        std, mean = (torch.tensor(values).view(-1, 1, 1) for values in (transform.std, transform.mean))
        difference = np.abs(((got * std + mean) * 255).round().numpy() - want)
        assert difference.max() == 0, (height, width)


@pytest.mark.parametrize("scale", ["recording", "corpus"])
def test_spectrograms_are_those_of_training(scale):
    rng = np.random.default_rng(0)
    mel = LogMel(rate=8000, bands=20, scale=scale, mean=(0.5,) * 20, std=(2.0,) * 20)
    waves, lengths = torch.from_numpy(rng.normal(size=(3, 4000)).astype(np.float32) * 0.1), torch.tensor([4000, 700, 150])
    waves[2, 20:120] = 0  # digital silence
    want, frames = mel.apply(waves, lengths)
    got, counted = Spectrogram(mel)(waves, lengths)
    assert torch.equal(frames, counted)
    torch.testing.assert_close(got[:, : want.shape[1]], want, rtol=1e-3, atol=1e-3)
    assert not got[:, want.shape[1] :].any()


def test_recordings_are_read_as_in_training(tmp_path):
    rng = np.random.default_rng(0)
    for rate, channels in ((44_100, 2), (8_000, 1), (16_000, 2)):
        samples = rng.normal(size=(rate // 3, channels)) * 0.1
        if rate == 16_000:  # the channels cancel out
            samples[:, 1] = -samples[:, 0]
        soundfile.write(tmp_path / "one.wav", samples, rate, subtype="PCM_16")
        program = build_parts(("media", "waves", "classes", "sounds")).partition("if __name__")[0]
        names = {"__file__": str(tmp_path / "run.py"), "__doc__": ""}
        (tmp_path / "export.json").write_text("{}")
        exec(compile(program, "run.py", "exec"), names)
        want = audio.load_wave(tmp_path / "one.wav", 8000)
        assert abs(names["load_wave"](tmp_path / "one.wav", 8000) * 32768 - want).max() == 0


def test_missing_packages_are_named(iris_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SettingsError, match=r"pip install 'fieldguide\[export\]'"):
        iris_run.export(out=tmp_path / "export")
    assert not (tmp_path / "export").exists()
    shutil.rmtree(tmp_path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------ language models


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    """A language model with scaled rotary positions, after a few steps."""
    folder = tmp_path_factory.mktemp("language")
    words = "the cat sat on a mat while it rained and the dog slept near an old green door".split()
    rng = np.random.default_rng(0)
    (folder / "text.txt").write_text("\n\n".join(" ".join(rng.choice(words, 60)) + f". {i}." for i in range(150)))
    settings = {"steps": 20, "precision": "float32", "task.length": 48}
    return fieldguide.fit(
        folder / "text.txt", task="text-generation", model="llama-test", out=folder / "run", settings=settings
    )


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_gguf_files_generate_as_the_run(language_run, precision, tmp_path):
    path = language_run.export("gguf", out=tmp_path / "export", precision=precision).path
    assert path.suffix == ".gguf" and [p.name for p in (tmp_path / "export").iterdir()] == [path.name]
    again = fieldguide.pipeline(str(path))
    assert again.text.tokenizer.encode("the cat sat").ids == language_run.task.prompt([("", "the cat sat")])
    options = {"max_new_tokens": 12, "temperature": 0}
    assert again.predict(["the cat sat"], **options)[0]["text"] == language_run.predict(["the cat sat"], **options)[0]["text"]
    assert again.network.config.rope_scaling == language_run.model.config.rope_scaling != ()


def test_transformers_generates_as_the_run(language_run, tmp_path):
    folder = language_run.export("huggingface", out=tmp_path / "export").path
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert tokenizer("the cat sat")["input_ids"] == language_run.task.prompt([("", "the cat sat")])
    made = network.generate(**tokenizer("the cat sat", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    want = language_run.predict(["the cat sat"], max_new_tokens=12, temperature=0)[0]["text"]
    start = len(tokenizer("the cat sat")["input_ids"])
    assert tokenizer.decode(made[0, start:], skip_special_tokens=True).strip() == want.strip()


def test_step_graphs_generate_as_the_run(language_run, tmp_path):
    """Also where an answer is longer than the network reads, so that its newer half is read again.

    Noise on the weights makes answers that do not repeat one word, so that each token depends on those before it.
    """
    run, generator = fieldguide.open_run(language_run.path), torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    done = run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows >= 15 and done.verification.largest == 0, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    loop = json.loads((done.path / "loop.json").read_text())
    assert loop["kind"] == "autoregressive" and loop["inputs"] == ["tokens", "keys", "values"]
    assert set(loop["eos_tokens"]) >= set(run.task.ends)
    prompts = [" the cat sat\n", "", "the dog slept near an old green door " * 12, "a green door"]
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import run; model = run.Model()\n"
        "rows = [{'text': prompt} for prompt in json.loads(sys.argv[2])]\n"
        "long = model.predict(rows, max_new_tokens=100, temperature=0)\n"
        "drawn = [model.predict(rows[:1], max_new_tokens=9, seed=seed, temperature=1.0, top_p=1.0) for seed in (0, 0, 1)]\n"
        "cut = [model.predict(rows[:1], max_new_tokens=9, seed=seed, top_p=1e-9) for seed in range(4)]\n"
        "json.dump([long, drawn, cut], sys.stdout)"
    )
    command = [sys.executable, "-E", "-c", program, str(done.path), json.dumps(prompts)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    long, drawn, cut = json.loads(found.stdout)
    alone = [run.predict([prompt], max_new_tokens=100, temperature=0)[0]["text"] for prompt in prompts]
    assert [record["text"] for record in long] == alone
    assert max(len(set(run.task.text.encode_exact([text])[0])) for text in alone) > 10
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(one == cut[0] for one in cut) and long[0]["text"].startswith(
        cut[0][0]["text"]
    )  # only the most likely token is left


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt-neox", "opt", "mistral", "qwen2", "qwen3", "mixtral", "gemma", "gemma2", "gemma3", "olmo2", "gpt"]
)
def test_step_graphs_of_architectures(name, tmp_path):
    settings = {"steps": 10, "precision": "float32", "task.length": 64}
    run = fieldguide.fit("manual", task="text-generation", model=f"{name}-test", out=tmp_path / "run", settings=settings)
    done = run.export(out=tmp_path / "export")
    assert done.passed, done.verification.problems


@pytest.mark.slow
def test_conversations_of_step_graphs_are_those_of_the_run(tmp_path):
    say = lambda who, text: {"role": who, "content": text}
    rows = [
        {"messages": [say("system", "be kind"), say("user", f" what is {i} "), say("assistant", f"it is {i}")]}
        for i in range(120)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"steps": 20, "precision": "float32", "task.length": 48}
    run = fieldguide.fit(
        tmp_path / "chat.jsonl", task="text-generation", model="gpt2-test", out=tmp_path / "run", settings=settings
    )
    done = run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows > 5, done.verification.problems


@pytest.mark.slow
@pytest.mark.parametrize("name, data", [("translation", "phrases"), ("summarization", "reports")])
def test_beams_of_step_graphs_find_the_answers_of_the_run(name, data, tmp_path):
    run, rows = fieldguide.open_run(GOLDEN / f"v1-{name}"), str(tmp_path / "rows.csv")
    names = [run.task.column, run.task.target.name]
    fieldguide.read(data, column_spec=run.task.column_spec).rows.head(12).select(names).write_csv(rows)
    done = export(run, data=rows, out=tmp_path / "export")
    assert done.passed and done.verification.rows == 12, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    settings = json.loads((done.path / "export.json").read_text())
    changed = {"beams": 1, "end": settings["end"] + 1, "limits": [3] * len(settings["limits"]), "prefix": "x "}
    found = []
    for key, value in changed.items():
        (done.path / "export.json").write_text(json.dumps(settings | {key: value}))
        found.append(verify(run, done.path, rows).passed)
    assert found == [False] * len(changed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "marian", "pegasus", "nllb", "nllb-moe", "transformer"])
def test_step_graphs_of_encoder_decoders(name, tmp_path):
    settings = {"steps": 10, "precision": "float32", "task.length": 32}
    run = fieldguide.fit("phrases", model=f"{name}-test", out=tmp_path / "run", settings=settings)
    done = run.export(out=tmp_path / "export")
    assert done.passed, done.verification.problems


def test_other_models_have_no_gguf(bert_run, language_run, tmp_path):
    with pytest.raises(SettingsError, match="a format of language models"):
        bert_run.export("gguf", out=tmp_path / "export")
    with pytest.raises(SettingsError, match=r"unknown precision 'int4'.*Choose float32, float16, int8."):
        language_run.export("gguf", out=tmp_path / "export", precision="int4")
    with pytest.raises(SettingsError, match="keep float32"):
        bert_run.export("huggingface", out=tmp_path / "export", precision="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_llama_cpp_gives_the_same_tokens(precision, tmp_path):
    """Needs `npm install node-llama-cpp` in the folder that NODE_LLAMA_CPP names."""
    if not os.environ.get("NODE_LLAMA_CPP"):
        pytest.skip("NODE_LLAMA_CPP names no folder with node-llama-cpp")
    run = fieldguide.fit(
        "manual", task="text-generation", model="llama-test", out=tmp_path / "run",
        settings={"steps": 300, "precision": "float32", "model.dim": 64, "model.hidden": 128, "model.heads": 4},
    )  # fmt: skip
    path = run.export("gguf", out=tmp_path / "export", precision=precision).path
    texts, prompt = make_probes(run.task.text), run.task.prompt([("", "The function returns")])
    (tmp_path / "request.json").write_text(json.dumps({"texts": texts, "prompt": prompt, "count": 20}))
    script = Path(__file__).with_name("llama_cpp.mjs")
    command = ["node", str(script), str(path), str(tmp_path / "request.json"), str(tmp_path / "answer.json")]
    subprocess.run(command, check=True, capture_output=True)
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["tokens"] == [ids.tolist() for ids in run.task.text.encode_exact(texts)]
    assert answer["begin"] == prompt[0]
    network, ids = fieldguide.load(path), list(prompt)
    with torch.no_grad():
        for _ in answer["made"]:
            ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
    assert answer["made"] == ids[len(prompt) :]


# Texts and series

GOLDEN = Path(__file__).parent / "golden"


def wave(rng, steps: int, period: int) -> np.ndarray:
    return 10 + 3 * np.sin(2 * np.pi * np.arange(steps) / period) + rng.normal(0, 0.4, steps)


def write_hours(path: Path, rng) -> None:
    """Write three series with rows and values missing, decimal commas, and one row between two hours."""
    lines = ["sensor;time;value"]
    for sensor in "xyz":
        for hour, value in enumerate(wave(rng, 400, 24)):
            cell = "" if rng.random() < 0.02 else f"{value:.3f}".replace(".", ",")
            if rng.random() > 0.03:
                lines.append(f"{sensor};{datetime.datetime(2024, 1, 1) + datetime.timedelta(hours=hour)};{cell}")
    path.write_text("\n".join([*lines, "x;2024-01-03 04:17:00;9,5"]))


def write_months(path: Path, rng) -> None:
    ends = [datetime.date(2005 + (m + 1) // 12, (m + 1) % 12 + 1, 1) - datetime.timedelta(1) for m in range(180)]
    pl.DataFrame({"month": ends, "a": wave(rng, 180, 12), "b": 100 * wave(rng, 180, 12)}).write_csv(path)


def write_weekdays(path: Path, rng) -> None:
    days = [day for i in range(500) if (day := datetime.date(2020, 1, 1) + datetime.timedelta(i)).weekday() < 5]
    pl.DataFrame({"day": days, "price": wave(rng, len(days), 5)}).write_csv(path)


def write_rows_with_texts(path: Path, rng) -> None:
    """Write a series per row whose first step looks like an identifier, and a column of texts that is no step."""
    write_rows(path, rng)
    header, *rows = [line.split(",", 2) for line in path.read_text().splitlines()]
    rows = [[name, str(i), rest, "xy"[i % 2]] for i, (name, _, rest) in enumerate(rows, 1)]
    path.write_text("\n".join(map(",".join, [[*header, "region"], *rows])))


def write_rows(path: Path, rng) -> None:
    """Write a series per row, of different lengths."""
    lines = ["id," + ",".join(f"V{i}" for i in range(120))]
    for row in range(40):
        values = wave(rng, int(rng.integers(70, 121)), 12)
        lines.append(",".join([f"s{row}", *(f"{v:.3f}" for v in values), *[""] * (120 - len(values))]))
    path.write_text("\n".join(lines))


def write_years(path: Path, rng) -> None:
    pl.DataFrame({"year": np.arange(1700, 2000), "spots": wave(rng, 300, 11)}).write_csv(path)


@pytest.mark.parametrize(
    "write, model",
    [
        pytest.param(write_hours, "nhits", marks=pytest.mark.slow),
        pytest.param(write_months, "dlinear", marks=pytest.mark.slow),
        pytest.param(write_weekdays, "exponential-smoothing", marks=pytest.mark.slow),
        (write_rows, "dlinear"),
        pytest.param(write_rows_with_texts, "dlinear", marks=pytest.mark.slow),
        pytest.param(write_years, "patchtst", marks=pytest.mark.slow),
    ],
)
def test_forecasts_of_raw_series_are_equal(write, model, tmp_path):
    write(tmp_path / "series.csv", np.random.default_rng(0))
    settings = {"steps": 10, "precision": "float32", "task.length": 24, "task.horizon": 6}
    if write is write_rows_with_texts:
        settings["column.region"] = "identifier"
    run = fieldguide.fit(
        tmp_path / "series.csv", task="time-series-forecasting", model=model, out=tmp_path / "run", settings=settings
    )
    done = run.export(out=tmp_path / "export")
    assert done.passed, done.verification.problems
    assert done.verification.rows >= 48 and done.verification.largest < 1e-5
    assert len((done.path / "run.py").read_text().splitlines()) < 150


def write_labeled_steps(path: Path, rng) -> None:
    """Write two channels of series with gaps, of 20 to 90 steps, whose rows are not in order of time."""
    rows = []
    for i in range(40):
        steps = int(rng.integers(20, 90))
        a, b = wave(rng, steps, 6 + 6 * (i % 2)), 100 * wave(rng, steps, 9)
        for step in range(steps):
            cells = ["" if rng.random() < 0.05 else f"{v:.3f}" for v in (a[step], b[step])]
            rows.append(f"machine {i},{datetime.date(2024, 1, 1) + datetime.timedelta(step)},{','.join(cells)},{'xy'[i % 2]}")
    rng.shuffle(rows)
    path.write_text("\n".join(["sensor,day,a,b,kind", *rows]))


def write_labeled_rows(path: Path, rng) -> None:
    """Write a series per row, of different lengths, without names."""
    lines = [",".join([*(f"V{i}" for i in range(60)), "kind"])]
    for row in range(60):
        steps = int(rng.integers(30, 61))
        values = [f"{v:.3f}" for v in wave(rng, steps, 6 + 6 * (row % 2))]
        values[3] = ""
        lines.append(",".join([*values, *[""] * (60 - steps), "xy"[row % 2]]))
    path.write_text("\n".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize(
    "write, model, settings, rows",
    [
        (write_labeled_steps, "inceptiontime-test", {"task.length": 30}, 40),
        (write_labeled_steps, "rocket-test", {"task.by_series": True}, 40),
        (write_labeled_rows, "inceptiontime-test", {"task.by_series": True}, 60),
    ],
)
def test_classes_of_raw_series_are_equal(write, model, settings, rows, tmp_path):
    write(tmp_path / "series.csv", np.random.default_rng(0))
    settings = {"steps": 10, "precision": "float32", **settings}
    read_as = {"task": "time-series-classification", "target": "kind"}
    run = fieldguide.fit(tmp_path / "series.csv", model=model, out=tmp_path / "run", settings=settings, **read_as)
    shutil.copy(tmp_path / "series.csv", tmp_path / "again.csv")
    done = run.export(out=tmp_path / "export", data=str(tmp_path / "again.csv"))
    assert done.passed, done.verification.problems
    assert done.verification.largest < 1e-5 and done.verification.rows == rows
    assert len((done.path / "run.py").read_text().splitlines()) < 150


def write_watched(path: Path, rng, times: list[object]) -> None:
    """Write steps of two series, not in order of time, with missing values, also at the beginning."""
    rows = []
    for sensor in ("pump, north", "x"):
        for step, (time, a, b) in enumerate(zip(times, wave(rng, len(times), 12), 50 * wave(rng, len(times), 7))):
            cells = ["" if step < 2 or rng.random() < 0.05 else f"{v:.3f}" for v in (a, b)]
            rows.append(f'"{sensor}",{time},{",".join(cells)}')
    rng.shuffle(rows)
    path.write_text("\n".join(["sensor,time,a,b", *rows]))


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["hours", "days", "steps"])
def test_anomalies_of_raw_series_are_equal(unit, tmp_path):
    start = datetime.datetime(2024, 1, 1)
    times = list(range(300)) if unit == "steps" else [start + datetime.timedelta(**{unit: i}) for i in range(300)]
    times = [time.date() for time in times] if unit == "days" else times
    write_watched(tmp_path / "series.csv", np.random.default_rng(0), times)
    settings = {"steps": 5, "precision": "float32", "task.length": 8}
    model = {"task": "anomaly-detection", "model": "conv-autoencoder-test"}
    run = fieldguide.fit(tmp_path / "series.csv", out=tmp_path / "run", settings=settings, **model)
    done = run.export(out=tmp_path / "export")
    assert done.passed, done.verification.problems
    assert done.verification.largest < 1e-4 and done.verification.rows == 600
    assert len((done.path / "run.py").read_text().splitlines()) < 150


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("day", ["2023-01-31", "2023-02-28", "2024-02-29", "2023-04-30", "2023-03-30", "2023-12-15"])
def test_months_of_the_program_are_those_of_the_task(day, size):
    names = {"np": np, "CONFIG": {"size": size}}
    exec(compile(files("fieldguide.exporting").joinpath("runners/times_month.py").read_text(), "times", "exec"), names)
    first = np.datetime64(day, "us").astype(np.int64) + 3_600_000_000
    want = Frequency("month", size, "month").times(first, 40)
    assert names["list_times"](first, 40).tolist() == want.tolist()


@pytest.mark.slow
def test_answers_after_preference_tuning_are_equal(tmp_path):
    done = export(GOLDEN / "v2-preference-tuning", out=tmp_path / "export")
    assert done.passed and done.verification.rows >= 32, done.verification.problems


@pytest.mark.slow
def test_tags_of_raw_words_are_equal(tmp_path):
    """Sentences of several lengths, one longer than the network reads, with entities next to each other."""
    rng, words = np.random.default_rng(0), ["Anna", "Ben", "Jena", "Hof", "visits", "likes", "in", "May", ".", "Ünal", "日本"]
    rows = [{"tokens": [str(w) for w in rng.choice(words, n)]} for n in (*range(1, 30), 400)]
    rows = [{**row, "tags": [str(t) for t in rng.choice(["O", "B-PER", "I-PER", "B-LOC"], len(row["tokens"]))]} for row in rows]
    (tmp_path / "words.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    done = export(GOLDEN / "v1-token-classification", data=str(tmp_path / "words.jsonl"), out=tmp_path / "export")
    assert done.passed and done.verification.rows == 30, done.verification.problems


@pytest.mark.slow
def test_answers_to_raw_questions_are_equal(tmp_path):
    """Contexts of one and of several windows, with whitespace and letters of several bytes."""
    rng, words = (
        np.random.default_rng(1),
        [*"what is a the of returns value number name".split(), "naïve", "größe", "x-ray", "½"],
    )
    say = lambda n: " ".join(str(w) for w in rng.choice(words, n))
    rows = [{"context": f"  {say(n)}\n{say(3)}.", "question": say(5) + "?"} for n in (1, 8, 20, 60, 200, 500)]
    rows = [{**row, "answer": row["context"].split()[-1]} for row in rows]
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    done = export(GOLDEN / "v1-question-answering", data=str(tmp_path / "questions.jsonl"), out=tmp_path / "export")
    assert done.passed and done.verification.rows == 6, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150


def write_masked_images(folder: Path) -> None:
    """Write images of several sizes, some larger than a network reads, one turned by its EXIF data, with masks of two classes."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i, (width, height) in enumerate([(31, 47), (64, 64), (420, 300), (200, 700), (5, 90), (300, 420), (33, 32), (64, 64)]):
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 3 :] = 255
        pixels = rng.integers(0, 120, (height, width)) + np.where(mask, 130, 0)
        image, kind = Image.fromarray(pixels.astype(np.uint8)), "png" if i % 2 else "jpg"
        exif = Image.Exif()
        if i == 2:
            exif[0x0112] = 6
            image = image.transpose(Image.Transpose.ROTATE_90)
        image.save(folder / "images" / f"{i}.{kind}", exif=exif)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")


@pytest.mark.slow
def test_masks_of_raw_images_are_equal(tmp_path):
    write_masked_images(tmp_path / "data")
    done = export(GOLDEN / "v1-image-segmentation", data=str(tmp_path / "data"), out=tmp_path / "export")
    assert done.passed and done.verification.rows == 8, done.verification.problems
    done = subprocess.run(
        [sys.executable, "-E", str(done.path / "run.py"), str(tmp_path / "data" / "images")], capture_output=True, text=True
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 8 and all(len(record["shares"]) == 2 for record in records[:2]), done.stderr


def test_a_mask_with_other_pixels_is_noticed():
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 10:30] = 1
    original = {"mask": Media(to_png(mask), ".png"), "shares": {"a": 0.9, "b": 0.1}, "classes": "a 90 %, b 10 %"}
    url = lambda m: "data:image/png;base64," + base64.b64encode(to_png(m)).decode()
    other = mask.copy()
    other[0, 0] = 1
    compare = lambda m, tolerance: Comparison(tolerance).compare(original, {"mask": url(m), "shares": {"a": 0.9, "b": 0.1}})[1]
    assert compare(mask, 1e-4) == "" and compare(other, 1e-3) == ""
    assert "0.05 % of the pixels" in compare(other, 1e-4)
    assert "another size" in compare(mask[:-1], 1e-4)
    assert "missing" in Comparison(1e-4).compare(original, {"mask": None, "shares": {}})[1]


def to_png(mask: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def test_a_class_without_pixels_has_no_share_of_them():
    compare = Comparison(0.1).compare
    record = lambda **shares: {"shares": shares}
    assert compare(record(sky=0.95, bird=0.05), record(sky=1.0)) == (pytest.approx(0.05), "")
    assert compare(record(sky=1.0), record(sky=0.95, bird=0.05))[1] == ""
    assert compare(record(sky=0.8, bird=0.2), record(sky=0.8, fish=0.2))[1].startswith("shares: bird")


def test_a_text_that_sums_up_is_compared_where_nothing_else_says_it():
    """`classes` is the sum of `shares` in segmentation; in a table, it may be the target."""
    assert Comparison(1e-4).compare({"classes": "a"}, {"classes": "b"})[1] == "classes: 'a' against 'b'"


def test_anomalies_of_raw_rows_are_equal(tmp_path):
    """Numbers, categories, one of them rare, and missing cells; ten rows are unusual in one column."""
    rng, lines = np.random.default_rng(0), ["flow,mode,door,pressure,fault"]
    for i in range(260):
        flow, is_fault = rng.normal(5, 1), i % 26 == 0
        mode, door = ("idle", "run")[rng.integers(2)], ("open", "shut")[rng.integers(2)]
        pressure = "" if i % 31 == 5 else f"{2 * flow + rng.normal(0, 0.1) + 9 * is_fault:.3f}"
        lines.append(f"{flow:.3f},{'test' if i == 77 else mode},{door},{pressure},{int(is_fault)}")
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    run = fieldguide.fit(
        tmp_path / "rows.csv",
        task="anomaly-detection",
        target="fault",
        out=tmp_path / "run",
        model="autoencoder-s",
        settings={"steps": 40, "precision": "float32"},
    )
    done = run.export(out=tmp_path / "export", data=str(tmp_path / "rows.csv"))
    assert done.passed and done.verification.largest < 1e-4, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150


@pytest.mark.slow
def test_transcripts_of_raw_recordings_are_equal(tmp_path):
    """Recordings of several lengths and rates, one with two channels; a longer one than the network hears at once is an error."""
    rng = np.random.default_rng(0)
    for i in range(12):
        rate, seconds = (8000, 16000, 11025)[i % 3], rng.uniform(0.2, 3)
        tone = np.sin(np.cumsum(rng.uniform(200, 2000, round(rate * seconds))) / rate * 2 * np.pi) * rng.uniform(0.1, 0.5)
        soundfile.write(tmp_path / f"{i}.wav", np.stack([tone, 0.5 * tone], 1) if i == 4 else tone, rate)
    lines = ["file,transcript", *(f"{i}.wav,one two" for i in range(12))]
    (tmp_path / "recordings.csv").write_text("\n".join(lines))
    done = export(GOLDEN / "v1-automatic-speech-recognition", data=str(tmp_path / "recordings.csv"), out=tmp_path / "export")
    assert done.passed and done.verification.rows == 12, done.verification.problems
    soundfile.write(tmp_path / "long.wav", np.zeros(60 * 8000), 8000)
    command = [sys.executable, "-E", str(done.path / "run.py")]
    ended = subprocess.run([*command, str(tmp_path / "long.wav")], capture_output=True, text=True)
    assert ended.returncode == 1 and "which run.py does not split" in ended.stderr


def test_a_value_that_is_no_number_is_named(tmp_path):
    names = {"__file__": str(tmp_path / "run.py"), "__name__": "run"}
    (tmp_path / "export.json").write_text(json.dumps(describe_cells()))
    exec(
        compile(build_parts(("numbers", "dates", "times_clock", "series_steps", "series_values", "series")), "run.py", "exec"),
        names,
    )
    column = {"name": "load", "format": {}, "pattern": NumberFormat().build_pattern()}
    assert names["read_value"]({"load": " 1.5 "}, column) == 1.5 and np.isnan(names["read_value"]({"load": "n/a"}, column))
    with pytest.raises(SystemExit, match="column 'load': 'high' is no number"):
        names["read_value"]({"load": "high"}, column)


def test_words_of_frames_are_those_of_the_task(tmp_path):
    """Paths with repeats, blanks between equal symbols, spaces in a row, and frames after the end, against the task's alignment."""
    task = fieldguide.open_run(GOLDEN / "v1-automatic-speech-recognition").task
    symbols = ["", *(task.transcripts.spell(i) for i in range(1, task.transcripts.size))]
    (tmp_path / "export.json").write_text(json.dumps({"symbols": symbols, "seconds": task.frame_seconds}))
    names = {"__file__": str(tmp_path / "run.py"), "__name__": "run"}
    exec(compile(build_parts(("media", "waves", "speech")), "run.py", "exec"), names)
    generator, space = torch.Generator().manual_seed(0), symbols.index(" ")
    for frames in (1, 2, 40, 60):
        path = torch.randint(0, 4, (1, 60), generator=generator)
        path[path == 3] = space
        likely = torch.nn.functional.one_hot(path, len(symbols)).float().mul(30).log_softmax(-1)
        count = torch.tensor([frames])
        said, sizes = collapse(path, count)
        spans = align(likely, count, said, sizes).spans.numpy()
        want = {"said": said.numpy(), "first": spans[..., 0], "end": spans[..., 1]}
        outputs = {"path": np.where(np.arange(60) < frames, path[0].numpy(), -1), "sure": 1.0}
        found = names["build_record"](outputs, None, None)
        assert found["text"] == task.transcripts.decode(said[0].tolist())
        assert found["words"] == task.words(want, 0)
    assert len(found["words"]) > 3


@pytest.fixture(scope="module")
def brief_evaluation():
    """Train the CNNs that score generated images for a few steps only."""
    whole = generative.train_classifier
    generative.train_classifier = lambda *values, steps=10, **named: whole(*values, steps=10, **named)
    yield
    generative.train_classifier = whole


@pytest.fixture(scope="module")
def sampled_run(tmp_path_factory, brief_evaluation):
    """A diffusion model of digits by class."""
    settings = {"steps": 20, "eval_steps": 20, "batch_size": 16, "precision": "float32"}
    return fieldguide.fit("figures", model="ddpm-unet-test", out=tmp_path_factory.mktemp("made") / "run", settings=settings)


@pytest.mark.slow
def test_samples_of_step_graphs_are_those_of_the_run(sampled_run, tmp_path):
    """From the same noise, in three sizes of batches, with guidance and new noise in each step. Wrong tables are found."""
    done = sampled_run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows == 64, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    loop = json.loads((done.path / "loop.json").read_text())
    assert loop["kind"] == "diffusion" and len(loop["steps"]) == sampled_run.task.PredictOptions().steps
    settings = json.loads((done.path / "export.json").read_text())
    sampler, found = settings["sampler"], []
    changes = (
        {"guidance": 1.0},
        {"steps": [{**step, "next": [*step["next"][:2], 0.0, *step["next"][3:]]} for step in sampler["steps"]]},
    )
    for change in changes:
        (done.path / "export.json").write_text(json.dumps(settings | {"sampler": sampler | change}))
        found.append(verify(sampled_run, done.path, "figures", options={"count": 1}).passed)
    (done.path / "export.json").write_text(json.dumps(settings | {"classes": settings["classes"][::-1]}))
    found.append(verify(sampled_run, done.path, "figures", options={"count": 1}).passed)
    assert found == [False] * (len(changes) + 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "edm", "flow"])
@pytest.mark.parametrize("name", ["dpm++", "dpm++-sde", "ddim", "ddim-noisy", "euler", "dpm++3"])
def test_tables_of_samplers_equal_their_steps(schedule, name):
    process = build_process(schedule)
    sampler = {
        "dpm++": DPMSolver(steps=7),
        "dpm++-sde": DPMSolver(steps=16, stochastic=True),
        "ddim": DDIM(steps=5),
        "ddim-noisy": DDIM(steps=5, eta=0.7),
        "euler": Euler(steps=6, clip=0.0),
        "dpm++3": DPMSolver(steps=17, order=3),
    }[name]
    table = tabulate_sampler(process, sampler)
    generator = torch.Generator().manual_seed(0)
    noises = [torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(len(table["steps"]) + 1)]
    answer = lambda x, time: torch.sin(3 * x) * (0.5 + time / 2000)
    source = iter(noises)
    state = sampler.start(process, lambda: next(source))
    while not state.done:
        scale = process.get_input_scale(state.level)
        sampler.step(state, answer(state.x * scale, state.level.time))
    fresh, history = iter(noises), []
    x = table["prior"] * next(fresh)
    for step in table["steps"]:
        clean = step["clean"][0] * x + step["clean"][1] * answer(step["scale"] * x, step["time"])
        history = [clean.clamp(-1, 1) if table["clip"] else clean, *history[:2]]
        *factors, new = step["next"]
        x = sum(factor * part for factor, part in zip(factors, (x, *history)) if factor)
        x = x + new * next(fresh) if new else x
    assert torch.allclose(x, state.x, atol=1e-9)


def test_table_of_ancestral_sampling():
    """The prior of unCLIP is exported as DDIM with eta = 1, and samples with `DDPM`."""
    process, same = build_process("cosine", "x"), {"steps": 6, "clip": 5.0, "spacing": PRIOR_SPACING}
    generator, found = torch.Generator().manual_seed(0), []
    noises = [3 * torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(7)]
    for sampler in (DDPM(**same), DDIM(eta=1.0, **same)):
        source = iter(noises)
        state = sampler.start(process, lambda source=source: next(source))
        while not state.done:
            sampler.step(state, 4 * torch.sin(3 * state.x + state.level.time))
        found.append(state.x)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_samplers_that_call_the_network_twice_have_no_table():
    with pytest.raises(ExportError, match="Heun has no table of steps"):
        tabulate_sampler(build_process("cosine"), Heun(steps=4))
    with pytest.raises(ExportError, match="DDPM has no table of steps"):
        tabulate_sampler(build_process("cosine"), DDPM(steps=4))


@pytest.mark.parametrize("kind", ["gan", pytest.param("captions", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_other_generators(kind, tmp_path, brief_evaluation):
    settings = {"steps": 4, "eval_steps": 4, "batch_size": 16, "precision": "float32"}
    if kind == "gan":
        source, model, extra = "figures", "dcgan-32", {"model.dim": 4, "task.side": 16, "model.image": 16}
    else:
        source, model, extra = captioned_digits(tmp_path / "data"), "ddpm-unet-test", {"task.vocab_size": 300}
    run = fieldguide.fit(source, task="image-generation", model=model, out=tmp_path / "run", settings={**settings, **extra})
    done = run.export(out=tmp_path / "export")
    assert done.passed and done.verification.rows == 64, done.verification.problems


def captioned_digits(folder: Path) -> Path:
    """Write digits with a caption next to each."""
    folder.mkdir()
    names = "zero one two three four five six seven eight nine".split()
    for i, path in enumerate(sorted(samples.path("digits").rglob("*.png"))[::8]):
        shutil.copy(path, folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"a scan of the number {names[int(path.parent.name)]}, drawn by hand {i % 7}")
    return folder
