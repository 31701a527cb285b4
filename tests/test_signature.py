"""Signatures: declared tensors, rows and records equal those of real batches, networks and predictions of every task."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from typer.testing import CliRunner

import fieldguide
from fieldguide.checkpoints import load
from fieldguide.cli import commands
from fieldguide.core.errors import RunError, SettingsError
from fieldguide.core.network_tensors import describe_network
from fieldguide.core.settings import Settings
from fieldguide.core.signature import Axis, Signature, TensorSpec
from fieldguide.data import read
from fieldguide.data.preprocessing import TextTokenizer
from fieldguide.inference.predictor import TaskPredictor
from fieldguide.models import registry
from fieldguide.tasks import task as task_named
from fieldguide.tasks import tasks
from fieldguide.tasks.timeseries.forecasting import LEVELS
from visual_chats import write_checkpoint, write_digits

GOLDEN = Path(__file__).parent / "golden"
RUNS = sorted(p.parent.name for p in GOLDEN.glob("v*/run.json"))
GENERATED_INPUTS = ("image", "video", "time", "noise")  # drawn by the loop, so they are in no batch for prediction
SMALL_SIDE, LARGE_SIDE = 64, 96
SENTENCES = ["the cat sat on the mat", "a dog ran in the fog", "rain fell all day long", "we bake bread and soup"]


# Predictors: the run folders of every task, and tasks fitted here on toy data with untrained networks


@functools.cache
def golden(name: str) -> tuple[TaskPredictor, list, dict]:
    """Return a run, its raw inputs, and its prediction options."""
    path = GOLDEN / name
    expected = json.loads((path / "expected.json").read_text())
    inputs = [str(path / one) if (path / one).exists() else one for one in expected["inputs"]]
    return fieldguide.open_run(path), inputs, expected.get("asked", {})


def fit_task(source, name: str, architecture: str, *, kinds=None, target=None, options=None, fields=None) -> TaskPredictor:
    """Return a task fitted on data, with an untrained network of the smallest size of an architecture."""
    kind = task_named(name)
    chosen = kind.options_from(options or {})
    data = kind.select_columns(read(source, target=target, kinds=kinds, column_spec=kind.column_spec))
    data = kind.build_examples(data, chosen)
    task = kind.fit(data, chosen)
    card = registry.card(architecture)
    dims = {key: value for key, value in task.model_dims().items() if card.accepts(key)}
    torch.manual_seed(0)
    outputs = [given for given in kind.output_types if given in card.output_types]
    head = {"output_type": outputs[0]} if len(card.output_types) > 1 else {}
    config = card.resolve_config(card.tiny, **dims, **head, **(fields or {}))
    parts = {}
    for part, other in card.parts.items():
        critic = registry.card(other)
        parts[part] = critic.make(critic.resolve_config(critic.tiny, **{k: v for k, v in dims.items() if critic.accepts(k)}))
    predictor = TaskPredictor(task, card, task.objective(card.make(config), card, Settings(), **parts).eval())
    predictor.config = config
    return predictor


def write_table(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    pl.DataFrame(rows).write_csv(path)
    return path


def write_images(folder: Path, count: int, channels: int = 3) -> list[str]:
    rng, names = np.random.default_rng(0), []
    for i in range(count):
        pixels = rng.integers(0, 255, (14 + i % 3, 16, channels), dtype=np.uint8)
        Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(folder / f"{i}.png")
        names.append(f"{i}.png")
    return names


def fit_tables(folder):
    rng = np.random.default_rng(0)
    rows = [
        {
            "size": round(float(rng.normal(10, 2)), 2) if i % 9 else None,
            "code": int(rng.integers(3)) * 10,
            "colour": "red" if i % 3 else "blue",
            "day": f"2024-{i % 12 + 1:02d}-03",
            "note": SENTENCES[i % 4] + f" {i % 5}",
            "price": round(float(rng.normal(5, 1)), 3),
        }
        for i in range(60)
    ]
    return write_table(folder, "orders.csv", rows), rows


def variant_ensemble(folder):
    path, rows = fit_tables(folder)
    return fit_task(path, "tabular-regression", "tabm", target="price", kinds={"note": "text"}), rows[:3], {}


def variant_vector(folder):
    path, rows = fit_tables(folder)
    return fit_task(path, "tabular-classification", "fnn", target="colour"), [dict(rows[1], colour=None)], {}


def variant_pairs(folder, architecture="bert"):
    rows = [{"a": SENTENCES[i % 4], "b": SENTENCES[(i + i // 4) % 4] + f" {i}", "same": str(i % 2)} for i in range(40)]
    path = write_table(folder, "pairs.csv", rows)
    options = {"length": 24, "vocab_size": 300}
    made = fit_task(path, "text-classification", architecture, target="same", kinds={"a": "text", "b": "text"}, options=options)
    return made, [{"a": "the cat", "b": "a dog"}], {}


def variant_pairs_recurrent(folder):
    return variant_pairs(folder, "gru")


def variant_chat(folder):
    path = folder / "chat.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": s}, {"role": "assistant", "content": t}]}
        for s in SENTENCES
        for t in SENTENCES
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    made = fit_task(path, "text-generation", "gpt2", options={"length": 16, "vocab_size": 300})
    return made, [pl.DataFrame({"messages": [[{"role": "user", "content": "the cat"}]]})], {"max_new_tokens": 3}


def variant_summaries(folder):
    rows = [{"document": f"{s}. {t}.", "summary": s} for s in SENTENCES for t in SENTENCES]
    path = write_table(folder, "documents.csv", rows)
    options = {"length": 24, "vocab_size": 300}
    made = fit_task(path, "summarization", "transformer", options=options)
    return made, [rows[0]["document"]], {"max_new_tokens": 3}


def variant_flat_images(folder):
    names = write_images(folder, 24, 1)
    rows = [{"image": n, "label": "ab"[i % 2]} for i, n in enumerate(names)]
    path = write_table(folder, "labels.csv", rows)
    return fit_task(path, "image-classification", "fnn", target="label", options={"side": 8}), [str(folder / "0.png")], {}


def variant_questions_alone(folder):
    names = write_images(folder, 16)
    rows = [{"image": n, "question": f"is it {SENTENCES[i % 4]}?", "answer": "yn"[i % 2]} for i, n in enumerate(names)]
    path = write_table(folder, "vqa.csv", rows)
    options = {"side": 16, "vocab_size": 300, "length": 16}
    made = fit_task(path, "visual-question-answering", "bag-of-ngrams", target="answer", options=options)
    return made, [{"image": str(folder / "0.png"), "question": "is it?"}], {}


def variant_captions(folder):
    names = write_images(folder, 24)
    path = write_table(folder, "c.csv", [{"image": n, "caption": f"{SENTENCES[i % 4]} {i}"} for i, n in enumerate(names)])
    options = {"side": 8, "vocab_size": 300, "length": 12}
    return fit_task(path, "image-generation", "ddpm-unet", options=options), ["the cat"], {"count": 2, "steps": 2}


def variant_noise(folder):
    write_images(folder, 8)
    return fit_task(folder, "image-generation", "dcgan", options={"side": 16}), [], {"count": 2}


def write_recordings(folder):
    for i in range(12):
        wave = 0.3 * np.sin(np.arange(2000 + 300 * (i % 4)) * (0.2 + 0.4 * (i % 2)))
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        soundfile.write(folder / "ab"[i % 2] / f"{i}.wav", wave, 8000)
    return [str(folder / "a" / "0.wav"), str(folder / "b" / "3.wav")]


def variant_spectrograms(folder):
    paths = write_recordings(folder)
    return fit_task(folder, "audio-classification", "simplecnn", options={"side": 16, "seconds": 0.3}), paths, {}


def variant_recordings(folder):
    paths = write_recordings(folder)
    return fit_task(folder, "audio-classification", "mfcc-linear"), paths, {}


def variant_series(folder):
    hours = [f"2024-01-{d:02d} {h:02d}:00" for d in range(1, 15) for h in range(24)]
    rows = [{"time": t, "load": float(np.sin(i / 4)), "heat": float(i % 7)} for i, t in enumerate(hours)]
    path = write_table(folder, "load.csv", rows)
    made = fit_task(
        path, "time-series-forecasting", "dlinear", target="load", options={"horizon": 4, "length": 12, "season": 1}
    )
    return made, [path], {}


def variant_events(folder, architecture="hstu"):
    rows = [{"user": f"u{u}", "item": f"i{(u + t) % 9}", "time": 1000 * u + t * t} for u in range(6) for t in range(5)]
    return fit_task(write_table(folder, "events.csv", rows), "recommendation", architecture), rows[:6], {"count": 2}


def variant_visual_chat(folder):
    """A network that reads images of any size."""
    weights = write_checkpoint(folder / "qwen", "qwen2.5-vl")
    found = load.inspect_checkpoint(weights)
    options = found.preprocessing_defaults()
    path = write_digits(folder)
    made = fit_task(path, "image-text-to-text", "qwen2.5-vl", options=options, fields={"picture": options["picture"]})
    return made, [str(folder / f"images/{i}.png") for i in range(3)], {"prompt": "Which?", "max_new_tokens": 2}


def variant_hidden_items(folder):
    return variant_events(folder, "bert4rec")


def variant_towers(folder):
    return variant_events(folder, "two-tower")


def variant_unusual_rows(folder):
    rng = np.random.default_rng(0)
    rows = [{"a": float(a), "b": float(2 * a), "kind": "xy"[i % 2], "label": "ok"} for i, a in enumerate(rng.normal(size=60))]
    path = write_table(folder, "rows.csv", rows)
    return fit_task(path, "anomaly-detection", "autoencoder"), [path], {}


VARIANTS = {
    "unusual-rows": variant_unusual_rows,
    "ensemble": variant_ensemble,
    "vector": variant_vector,
    "pairs": variant_pairs,
    "pairs-recurrent": variant_pairs_recurrent,
    "chat": variant_chat,
    "summaries": variant_summaries,
    "flat-images": variant_flat_images,
    "questions-alone": variant_questions_alone,
    "captions": variant_captions,
    "noise": variant_noise,
    "series": variant_series,
    "spectrograms": variant_spectrograms,
    "recordings": variant_recordings,
    "events": variant_events,
    "hidden-items": variant_hidden_items,
    "visual-chat": variant_visual_chat,
    "towers": variant_towers,
}
CASES = [*RUNS, *VARIANTS]


@functools.cache
def make_variant(name: str) -> tuple[TaskPredictor, list, dict]:
    made, inputs, options = VARIANTS[name](Path(tempfile.mkdtemp()))
    return made, inputs, options


def get_case(name: str) -> tuple[TaskPredictor, list, dict]:
    return golden(name) if name in RUNS else make_variant(name)


def test_every_task_has_a_run():
    assert {get_case(name)[0].task.name for name in CASES} == set(tasks())


# Helpers


def choose_sizes(signature: Signature, large: bool) -> dict[str, int]:
    """Return sizes of the dynamic axes but the batch: near their least, or near their most."""
    sizes = {}
    for name, axis in signature.dynamic_axes.items():
        if name in ("height", "width"):
            sizes[name] = LARGE_SIDE if large else SMALL_SIDE
        elif name != "batch":
            sizes[name] = (axis.most or axis.least + 20) if large else min(axis.least + 2, axis.most or axis.least + 2)
    return sizes


def check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Check a shape: fixed axes, dynamic ones within their bounds, and equal names with equal sizes."""
    assert len(shape) == len(spec.axes), (str(spec), shape)
    for axis, size in zip(spec.axes, shape):
        if axis.size is not None:
            assert size == axis.size, (str(spec), shape)
        else:
            assert axis.least <= size <= (axis.most or size) and size % axis.multiple == 0, (str(spec), axis, shape)
            assert sizes.setdefault(axis.name, size) == size, (str(spec), shape, sizes)


def check_values(spec: TensorSpec, values: torch.Tensor) -> None:
    assert str(values.dtype) == f"torch.{spec.dtype}", str(spec)
    if values.numel() and not spec.std:
        assert spec.low is None or values.min() >= spec.low, str(spec)
        assert spec.high is None or values.max() <= spec.high, str(spec)
    for column, count in enumerate(spec.codes):
        assert values[..., column].min() >= 0 and values[..., column].max() < count, str(spec)
    if spec.std:  # pixels from 0 to 255
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (spec.mean, spec.std))
        pixels = (values * std + mean) * 255
        assert pixels.min() > -0.01 and pixels.max() < 255.01 and (pixels - pixels.round()).abs().max() < 0.01


def check_forward(signature: Signature, network) -> None:
    """Check that a network accepts example batches of two sizes and returns what is declared, on real and meta tensors."""
    for batch, large in ((2, False), (3, True)):
        sizes = choose_sizes(signature, large)
        example = signature.example_batch(batch, sizes)
        assert list(example) == [spec.name for spec in signature.forward_tensors]
        for spec in signature.forward_tensors:
            check_shape(spec, tuple(example[spec.name].shape), {**sizes, "batch": batch})
            check_values(spec, example[spec.name])
        with torch.inference_mode():
            found = getattr(network, signature.method)(*example.values())
        (declared,) = signature.outputs
        check_shape(declared, tuple(found.shape), {**sizes, "batch": batch})
        assert str(found.dtype) == f"torch.{declared.dtype}" and found.isfinite().all()
        meta = signature.example_batch(batch, sizes, device="meta")
        assert {k: (v.shape, v.dtype) for k, v in meta.items()} == {k: (v.shape, v.dtype) for k, v in example.items()}
        assert all(v.is_meta for v in meta.values())


def to_row(signature: Signature, value) -> dict:
    """Return a raw input as a row."""
    return value if isinstance(value, dict) else {signature.inputs[0].name: value}


def read_rows(signature: Signature, predictor: TaskPredictor, inputs: list) -> list[dict]:
    """Return the raw rows of a request as JSON values."""
    rows: list[dict] = []
    for one in inputs:
        if isinstance(one, Path | pl.DataFrame) or str(one).endswith(".csv"):
            frame = one if isinstance(one, pl.DataFrame) else pl.read_csv(one, infer_schema_length=1000)
            names = [f.name for f in signature.inputs if f.name in frame.columns]
            rows += json.loads(frame.select(names).write_json())
        elif isinstance(one, str) and signature.inputs[0].kind == "list":
            rows.append({signature.inputs[0].name: one.split()})
        else:
            row = to_row(signature, one)
            rows.append({name: value for name, value in row.items() if name in {f.name for f in signature.inputs}})
    return rows


@functools.cache
def predict(name: str) -> list[dict]:
    """Return the records of a case, as `predict --json` writes them."""
    predictor, inputs, options = get_case(name)
    predictions = predictor.predict(list(inputs), **options).save_media(tempfile.mkdtemp())
    return json.loads(json.dumps(list(predictions)))


# Of every task


@pytest.mark.parametrize("name", CASES)
def test_network_accepts_example_batches(name):
    predictor = get_case(name)[0]
    check_forward(predictor.signature, predictor.model)


@pytest.mark.parametrize("name", CASES)
def test_real_batches_have_the_declared_tensors(name):
    predictor, inputs, options = get_case(name)
    signature, declared = predictor.signature, {spec.name: spec for spec in predictor.signature.tensors}
    assert len(declared) == len(signature.tensors)
    task = predictor.task.for_request(predictor.task.parse_predict_options(options))
    batches = task.predict_batches(task.read(list(inputs)), predictor.card)
    batch = batches.make(np.arange(min(len(batches), 3)), None)
    assert batch.keys() <= declared.keys()
    sizes: dict[str, int] = {}
    for key, values in batch.items():
        check_shape(declared[key], tuple(values.shape), sizes)
        check_values(declared[key], values)
    if signature.loop is None and signature.forward_tensors[0].name not in GENERATED_INPUTS[1:]:
        texts = {"tokens", "mask"} if signature.record_for == "row" and "embeddings" in predictor.card.output_types else set()
        assert {spec.name for spec in signature.forward_tensors if spec.required} - texts <= batch.keys()


@pytest.mark.parametrize("name", CASES)
def test_json_round_trip(name):
    signature = get_case(name)[0].signature
    value = json.loads(json.dumps(signature.to_json(), allow_nan=False))
    assert Signature.from_json(value) == signature
    assert Signature.from_json(value).to_json() == signature.to_json()
    for schema in (signature.input_schema(), signature.output_schema(), signature.options_schema()):
        Draft202012Validator.check_schema(schema)
        json.dumps(schema, allow_nan=False)


@pytest.mark.parametrize("name", CASES)
def test_records_fit_the_schema(name):
    predictor, records = get_case(name)[0], predict(name)
    valid = Draft202012Validator(predictor.signature.output_schema())
    assert records
    for record in records:
        assert not list(valid.iter_errors(record)), record
    record, fields = records[0], predictor.signature.record
    assert not valid.is_valid(record | {"surprise": 1})
    for field in fields:
        if field.required:
            assert not valid.is_valid({key: value for key, value in record.items() if key != field.name})
        if field.name in record:
            wrong = copy.deepcopy(record)
            wrong[field.name] = 7 if field.type in ("string", "map", "array", "object") else "seven"
            assert not valid.is_valid(wrong), field
    assert valid.is_valid({"input": "x", "error": "unreadable"}) and not valid.is_valid({"input": "x"})


@pytest.mark.parametrize("name", CASES)
def test_rows_fit_the_schema(name):
    predictor, inputs, _ = get_case(name)
    signature = predictor.signature
    valid = Draft202012Validator(signature.input_schema())
    rows = read_rows(signature, predictor, inputs) or [{}]
    for row in rows:
        assert not list(valid.iter_errors(row)), row
    row = rows[0]
    if not any(field.name == "*" for field in signature.inputs):
        assert not valid.is_valid(row | {"surprise": 1})
    for field in signature.inputs:
        assert not valid.is_valid(row | {field.name: {"an": "object"}}), field
        if field.required:
            assert not valid.is_valid({key: value for key, value in row.items() if key != field.name})
        if not field.nullable:
            assert not valid.is_valid(row | {field.name: None}), field


@pytest.mark.parametrize("name", CASES)
def test_rows_that_fit_the_schema_are_predicted(name):
    """A row of JSON values is predicted, also with null in every field that may be null."""
    predictor, inputs, options = get_case(name)
    signature = predictor.signature
    if signature.row_form == "value" or signature.record_for != "row":
        pytest.skip("a request is more than independent rows")
    if any(field.kind in ("list", "messages") for field in signature.inputs):
        pytest.skip("lists in rows are passed as a data frame")
    row = next(row for row in read_rows(signature, predictor, inputs) if None not in row.values())
    row |= {f.name: str(GOLDEN / name / row[f.name]) for f in signature.inputs if f.kind == "image"}  # absolute ones stay
    empty = {field.name: None if field.nullable else row[field.name] for field in signature.inputs}
    assert Draft202012Validator(signature.input_schema()).is_valid(empty)
    valid = Draft202012Validator(signature.output_schema())
    for one in (row, empty):
        for record in predictor.predict([one], **options).save_media(tempfile.mkdtemp()):
            assert "error" not in record and valid.is_valid(json.loads(json.dumps(record))), (one, record)


@pytest.mark.parametrize("name", CASES)
def test_options_are_those_of_prediction(name):
    predictor = get_case(name)[0]
    valid = Draft202012Validator(predictor.signature.options_schema())
    defaults = {option.name: option.default for option in predictor.signature.options}
    assert defaults == vars(predictor.task.PredictOptions()) and valid.is_valid(defaults) and valid.is_valid({})
    assert not valid.is_valid({"surprise": 1})
    for option in predictor.signature.options:
        assert option.about, option
        assert all(valid.is_valid({option.name: choice}) for choice in option.choices)
        assert not option.choices or not valid.is_valid({option.name: "another"})
        for limit, step in ((option.low, -1), (option.high, 1)):
            if limit is not None:
                assert not valid.is_valid({option.name: limit + step})
                with pytest.raises(SettingsError, match=f"{option.name}=.* must be at (least|most)"):
                    predictor.task.parse_predict_options({option.name: limit + step})


@pytest.mark.parametrize("name", CASES)
def test_steps_and_details(name):
    signature = get_case(name)[0].signature
    for step in (*signature.preprocessing, *signature.postprocessing):
        assert step.name.isidentifier() and step.about
    assert all(spec.about for spec in (*signature.tensors, *signature.outputs))
    for field in signature.inputs:
        assert field.count >= len(field.values) and (field.kind != "image" or (field.image and field.media_types))


def apply_step(step, values: np.ndarray, labels: tuple[str, ...]):
    """Apply a declared step to an array, with nothing but its settings."""
    s = step.settings
    if step.name == "softmax":
        return (p := np.exp(values - values.max(-1, keepdims=True))) / p.sum(-1, keepdims=True)
    if step.name == "average":
        return values.mean(s["axis"])
    if step.name == "temperature":
        scaled = np.log(np.clip(values, 1e-30, 1)) / s["temperature"]
        return (p := np.exp(scaled - scaled.max(-1, keepdims=True))) / p.sum(-1, keepdims=True)
    if step.name == "rescale":
        return values * s["std"] + s["mean"]
    assert step.name in ("argmax", "name_classes"), step.name
    return values


@pytest.mark.parametrize(
    "name",
    [
        *("v2-tabular-classification", "v2-tabular-regression", "v2-image-classification", "v2-text-classification"),
        *("v1-click-prediction", "ensemble", "vector", "pairs", "flat-images", "spectrograms", "recordings"),
    ],
)
def test_declared_steps_turn_outputs_into_predictions(name):
    """Whoever runs an exported graph has only the signature: its steps give what `predict` gives."""
    predictor, inputs, _ = get_case(name)
    task = predictor.task.for_request(predictor.task.PredictOptions())
    source = [pl.DataFrame(inputs)] if isinstance(inputs[0], dict) else list(inputs)
    batches = task.predict_batches(task.read(source), predictor.card)
    rows = np.arange(len(batches))
    batch = batches.make(rows, None)
    with torch.inference_mode():
        values = predictor.model(*(batch[spec.name] for spec in predictor.signature.forward_tensors if spec.required))
    values = values.double().numpy()
    field = predictor.signature.record[0]
    for step in predictor.signature.postprocessing:
        values = apply_step(step, values, field.values)
    for row, record in zip(values, predict(name)):
        if field.type == "number":
            assert record[field.name] == pytest.approx(row[0], rel=1e-5)
        else:
            assert record[field.name] == field.values[row.argmax()]
            assert record["probabilities"] == pytest.approx(dict(zip(field.values, row)), abs=1e-5)


def test_declared_steps_turn_files_into_pixels():
    """Decode, resize and normalize as declared, with Pillow alone: equal to the tensors of the task but for rounding."""
    for name in ("v2-image-classification", "v1-image-text", "v1-visual-question-answering"):
        predictor = golden(name)[0]
        task, paths = predictor.task, sorted((GOLDEN / name).glob("*.png"))
        spec = next(spec for spec in predictor.signature.tensors if spec.name == "image")
        steps = {step.name: step.settings for step in predictor.signature.preprocessing}
        channels, height, width = (axis.size for axis in spec.axes[1:])
        assert steps["resize"]["side"] == height == width and steps["decode_image"]["channels"] == channels
        assert paths
        for path in paths:
            image = Image.open(path).convert("L" if channels == 1 else "RGB")
            assert image.width == image.height  # so that cropping and padding are the same
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32)
            pixels = pixels.reshape(height, width, channels).transpose(2, 0, 1) / 255
            mean, std = (np.array(steps["normalize"][key]).reshape(-1, 1, 1) for key in ("mean", "std"))
            found = task.pictures.apply(task.pictures.load([str(path)]))[0].numpy()
            assert np.abs(found - (pixels - mean) / std).max() < 3 / 255 / np.min(std), path


def test_values_seen_in_training_are_described():
    signature = make_variant("ensemble")[0].signature
    fields = {field.name: field for field in signature.inputs}
    assert fields["size"].low < 10 < fields["size"].high and fields["size"].was_missing and fields["size"].nullable
    assert fields["colour"].values == ("blue", "red") and fields["colour"].count == 2
    assert fields["note"].kind == "text" and (fields["day"].low, fields["day"].high) != (None, None)
    assert signature.outputs[0].axes[1:] == (Axis("members", 4), Axis("values", 1))


def test_series_are_described():
    signature = golden("v1-time-series-forecasting")[0].signature
    assert (signature.series.history, signature.series.horizon, signature.series.frequency) == (24, 4, "one hour")
    assert {f.name: f.about for f in signature.inputs}["temperature"] == "known for the past"
    assert signature.options[0].choices == tuple(LEVELS)


# Networks and published models


@pytest.mark.parametrize("name", sorted(registry.cards()))
def test_every_network_accepts_its_example_batches(name):
    card = registry.card(name)
    for output in card.output_types:
        if (name, output) in {("clip", "label"), ("clip-resnet", "label")}:
            continue  # without classes
        config = card.resolve_config(card.tiny, **({"output_type": output} if len(card.output_types) > 1 else {}))
        network = card.make(config).eval()
        signature = describe_network(card, config, network)
        assert Signature.from_json(signature.to_json()) == signature
        check_forward(signature, network)


SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<image>", "<|endoftext|>")
PUBLISHED = {
    "text encoder": ("bert-test", {"output_type": "label", "num_classes": 3, "length": 20}, ["the cat"], {}),
    "text vectors": ("bert-test", {"output_type": "vector", "length": 20}, ["the cat"], {}),
    "image classifier": ("vit-test", {"channels": 3}, ["image"], {}),
    "convolutional classifier": ("resnet-test", {}, ["image"], {}),
    "causal language model": ("gpt2-test", {}, ["the cat"], {"max_new_tokens": 3}),
    "sequence to sequence": ("bart-test", {}, ["the cat"], {"max_new_tokens": 3}),
    "CLIP": ("clip-test", {"channels": 3}, ["image"], {"classes": "cat,dog"}),
    "vision-language model": ("llava-test", {"channels": 3}, ["image"], {"prompt": "hi", "max_new_tokens": 2}),
}


@functools.cache
def publish(kind: str):
    """Return the folder of a small model in the format of transformers, with its tokenizer."""
    name, fields, _, _ = PUBLISHED[kind]
    text = TextTokenizer.fit_exact(SENTENCES, size=300, special=SPECIAL)
    card, folder = registry.find(name)[0], Path(tempfile.mkdtemp()) / "model"
    fields = fields | ({"vocab_size": text.size} if card.accepts("vocab_size") else {})
    fields |= {"picture": text.token_id("<image>")} if card.accepts("picture") else {}
    fields |= {"end": text.end} if card.input_type == "captioned" and card.accepts("end") else {}
    torch.manual_seed(0)
    fieldguide.save(registry.create(name, **fields), folder, "huggingface")
    if "tokens" in card.inputs:
        text.save(folder)
    return folder


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_models(kind, pictures):
    folder, (_, _, inputs, options) = publish(kind), PUBLISHED[kind]
    network = fieldguide.load(folder)
    assert network.signature.tensors and not network.signature.inputs
    check_forward(network.signature, network)
    predictor = fieldguide.pipeline(folder)
    signature = predictor.signature
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature
    check_forward(signature, predictor.model)
    inputs = [str(pictures / "a.png") if one == "image" else one for one in inputs]
    rows, valid = Draft202012Validator(signature.input_schema()), Draft202012Validator(signature.output_schema())
    for one in inputs:
        assert rows.is_valid(to_row(signature, one)) and not rows.is_valid({}) and not rows.is_valid({"surprise": 1})
        assert not rows.is_valid({signature.inputs[0].name: 3})
    assert Draft202012Validator(signature.options_schema()).is_valid(options)
    for record in predictor.predict(inputs, **options):
        assert valid.is_valid(json.loads(json.dumps(record))) and not valid.is_valid({"input": "x", "other": 1})
    required = [option.name for option in signature.options if option.required]
    if required:
        assert not Draft202012Validator(signature.options_schema()).is_valid({})
        with pytest.raises(SettingsError, match=required[0]):
            predictor.predict(inputs)


def test_loops_name_their_tokens():
    language, pairs = (
        fieldguide.pipeline(publish(kind)).signature for kind in ("causal language model", "sequence to sequence")
    )
    assert language.loop.kind == "autoregressive" and language.loop.eos_tokens and language.loop.max_length == 12
    assert pairs.loop.kind == "encoder-decoder" and pairs.loop.start_tokens
    for signature, kind in ((language, "causal language model"), (pairs, "sequence to sequence")):
        cache, network = signature.loop.cache, fieldguide.load(publish(kind))
        with torch.inference_mode():
            real = network.new_cache(2, 5)
        assert {tuple(x.shape) for x in (*real.keys, *real.values)} == {(2, cache.heads, 5, cache.dim)}
        assert len(real.keys) == cache.layers
    images = golden("v1-image-generation")[0].signature.loop
    assert (images.kind, images.predicts, images.guidance) == ("diffusion", "v", True)
    assert [axis.size for axis in images.latent] == [1, 8, 8]


def test_speech_network_is_described_without_its_run():
    network = fieldguide.load(GOLDEN / "v1-automatic-speech-recognition")
    check_forward(network.signature, network)


# The JSON form and the example batch reject what is wrong


@pytest.mark.parametrize(
    "change, message",
    [
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"format": 99}, "format 99.*Update fieldguide"),
        ({"format": "1"}, "format must be an integer"),
        ({"tensors": [{"name": "x", "dtype": "float16", "axes": []}]}, "dtype='float16' must be one of"),
        ({"tensors": [{"name": "x", "dtype": "int64", "axes": [{"name": "batch", "size": "2"}]}]}, "size"),
        ({"architecture": None}, "architecture must be a text"),
        ({"record": [{"name": "x", "type": "number", "items": {"name": "y", "type": "z"}}]}, "items"),
    ],
)
def test_damaged_json_is_rejected(change, message):
    value = golden("v2-tabular-classification")[0].signature.to_json()
    with pytest.raises(RunError, match=message):
        Signature.from_json({**value, **change}, "signature.json")
    with pytest.raises(RunError, match=r"x\.json is damaged: signature must be an object"):
        Signature.from_json([], "x.json")


def test_example_batches_depend_on_the_seed_and_check_sizes():
    signature = golden("v1-translation")[0].signature
    first, again, other = (signature.example_batch(2, {"source": 5}, seed=seed) for seed in (0, 0, 1))
    assert first["source"].equal(again["source"]) and not first["source"].equal(other["source"])
    with pytest.raises(SettingsError, match=r"'sauce' is not a dynamic axis\. Did you mean 'source'"):
        signature.example_batch(2, {"sauce": 5})
    with pytest.raises(SettingsError, match="source=61 must be from 1 to 60"):
        signature.example_batch(2, {"source": 61})
    with pytest.raises(SettingsError, match="batch=0 must be at least 1"):
        signature.example_batch(0)
    even = replace(signature.tensors[0], axes=(Axis("batch"), Axis("source", least=8, most=60, multiple=8)))
    with pytest.raises(SettingsError, match="source=12 must be from 8 to 60 and a multiple of 8"):
        replace(signature, tensors=(even,)).example_batch(2, {"source": 12})


def test_reading_a_signature_needs_no_torch():
    from test_imports import loaded

    assert "torch" not in loaded(
        "from fieldguide.core.signature import Signature\n"
        "Signature.from_json({'architecture': 'x', 'tensors': []}).input_schema()"
    )


def test_on_the_command_line():
    path = GOLDEN / "v2-tabular-classification"
    shown = CliRunner().invoke(commands.app, ["show", str(path)])
    assert shown.exit_code == 0, shown.output
    for part in ("tabular-classification with mlp", "colour  category  blue, green, red", "[batch, numbers=4]", "10,000 rows"):
        assert part in shown.output
    written = CliRunner().invoke(commands.app, ["show", str(path), "--json"])
    assert Signature.from_json(json.loads(written.output)) == golden(path.name)[0].signature
