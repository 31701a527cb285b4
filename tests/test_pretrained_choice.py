"""Public checkpoints: the table, the choice with `--weights auto` from a local hub, and a linear head on frozen features."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import fieldguide
from fieldguide.automl import frozen_features, pretrained
from fieldguide.automl.build_plan import build_plan
from fieldguide.automl.fit import fit, resume
from fieldguide.automl.pretrained import Facts, choose, judge_language
from fieldguide.automl.profile import count_multiply_adds
from fieldguide.checkpoints import config_mapping, load, public
from fieldguide.checkpoints.public import PublicCheckpoint, list_public_checkpoints
from fieldguide.cli.commands import app
from fieldguide.core.errors import SettingsError, WeightsError
from fieldguide.data import read
from fieldguide.models.registry import find
from fieldguide.tasks import task as task_named
from fieldguide.training.state import Interrupted
from hub_server import Hub
from test_tasks_resume import StopAt
from test_tuning import Says, folder, sentences  # noqa: F401  # `folder` is a fixture

ROWS = list_public_checkpoints()
EACH = pytest.mark.parametrize("row", ROWS, ids=[row.path for row in ROWS])
SPDX = {"Apache-2.0", "MIT", "BSD-3-Clause", "CC-BY-NC-4.0"}
NAMED = {"Gemma Terms of Use", "Llama 3.2 Community License"}  # they have no SPDX identifier
BUFFERS = 0.11  # files may also hold causal masks (GPT-2), or lack a head (DINOv2)
FAST = {"batch": 8, "precision": "float32", "evaluate": 2, "steps": 4}


# ------------------------------------------------------------------------------------------------ the table


def build_row_config(row: PublicCheckpoint):
    card, size = find(row.size)
    fields: dict[str, object] = {"vocab_size": row.vocab_size} if row.vocab_size else {}
    if "label" in card.output_types and card.accepts("output_type") and card.name != "clip":
        fields["output_type"] = "label"
    return card, card.resolve_config(size, **fields)


def test_names_are_unique_and_every_field_is_given():
    assert len({row.path for row in ROWS}) == len(ROWS) >= 25
    assert all(row.name.count("/") == 1 and row.source.startswith("https://") and row.data for row in ROWS)
    assert {row.licence for row in ROWS} <= SPDX | NAMED and set(public.PERMISSIVE) <= SPDX
    assert {task for row in ROWS for task in row.tasks} >= {
        "image-classification",
        "text-classification",
        "text-generation",
        "translation",
        "summarization",
        "image-text",
        "image-to-text",
        "visual-question-answering",
    }


@EACH
def test_rows_describe_their_cards(row):
    """Input, tasks and the size of the file."""
    card, config = build_row_config(row)
    get = lambda word: getattr(config, card.names.get(word, word), None)
    assert bool(row.side) == (card.input_type in ("image", "captioned", "image-text")) == bool(row.channels)
    assert bool(row.length) == bool(row.languages) == (card.input_type in ("tokens", "pair", "captioned", "image-text"))
    assert row.channels == (get("channels") or 0)
    assert bool(row.classes) == bool(get("max_classes"))
    assert get("image") in (None, row.side) and row.length <= (get("length") or 0)
    for name in row.tasks:
        kind = task_named(name)
        assert card.input_type in kind.input_types and set(card.output_types) & set(kind.output_types)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in card.make(config).parameters())
    assert min(abs(1e6 * row.mb / (parameters * width) - 1) for width in (2, 4)) < BUFFERS


@EACH
def test_configurations_of_rows_are_recognized(row):
    """timm's by name; those of transformers in their form for this size."""
    card = find(row.size)[0]
    if row.name.startswith("timm/"):
        public_config = {"architecture": row.name.split("/")[1].partition(".")[0], "pretrained_cfg": {}}
        found, size, _ = config_mapping.resolve_timm_name(public_config, "config.json")
        assert (found, size) == (card, row.size)
        return
    (table,) = (card.configs[origin] for origin in ("huggingface", "tabicl") if origin in card.configs)
    size_config = card.resolve_config(row.size, **({"vocab_size": row.vocab_size} if row.vocab_size else {}))
    written = config_mapping.to_public_config(card, table, size_config)
    found, origin, again = config_mapping.identify_config(written)
    values = config_mapping.to_config_fields(found, again, written, "config.json")
    size = load.Checkpoint(Path("."), found, origin, values, {}).size
    assert found is card and card.resolve_config(size) == card.resolve_config(row.size)  # FLAN-T5 is T5 1.1 with other weights


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.path, marks=[pytest.mark.slow] if row.gmacs > 2 else []) for row in ROWS]
)
def test_multiply_adds_of_rows(row):
    card, config = build_row_config(row)
    if pretrained.reads_context(row):  # the average of the rows of a context
        with torch.device("meta"):
            network = card.make(dataclasses.replace(config, numbers=20, context=1024))
        assert network.count_work(1024, 0) / 1024e9 == pytest.approx(row.gmacs, rel=0.01)
        return
    assert count_multiply_adds(card.name, config, length=64, side=row.side or 224) / 1e9 == pytest.approx(row.gmacs, rel=0.01)


# ------------------------------------------------------------------------------------------------ the rule

LAPTOP = {"memory": 16e9, "speed": 5e10}


def facts(task: str = "text-classification", rows: int = 5000, minutes: float = 10, **more) -> Facts:
    values = {"length": 24, "language": "en"} if task != "image-classification" else {"side": 300}
    return Facts(task, rows, minutes, **{**LAPTOP, **values, **more})


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits before it tries again
    return tmp_path / "home"


def test_choice_follows_time_memory_and_language(no_cache):
    assert choose(facts(minutes=3)).name == "sentence-transformers/all-MiniLM-L6-v2"
    assert choose(facts("image-classification", rows=3000, minutes=3)).mb < 100
    assert choose(facts(language="other")).languages == ("*",)
    assert choose(facts(minutes=600, speed=2e13, memory=1e12)).gmacs > 5
    assert choose(facts(minutes=1.2, speed=4e10)).gmacs < 1  # for frozen features
    slow, fast = choose(facts(minutes=3)), choose(facts(minutes=60, speed=1e12))
    assert slow.gmacs < fast.gmacs
    assert choose(facts(memory=1e8)) is None and choose(facts(rows=10**9, minutes=1)) is None
    assert choose(facts("image-classification", side=32)) is None
    assert (
        choose(facts("tabular-classification")).classes == 100 and choose(facts("tabular-classification", classes=101)) is None
    )
    assert choose(facts("recommendation")) is None
    assert choose(facts("image-classification", model="resnet18")).size == "resnet18"
    assert choose(facts("image-classification", model="mobilenetv3")).size.startswith("mobilenetv3")


@pytest.mark.parametrize("task", sorted({task for row in ROWS for task in row.tasks}))
def test_choices_have_permissive_licences_and_read_the_language(task, no_cache):
    for minutes in (1, 10, 1000):
        for language in ("en", "other"):
            row = choose(facts(task, rows=500, minutes=minutes, language=language, side=300, speed=1e13, memory=1e12))
            assert row is None or (row.licence in ("MIT", "Apache-2.0", "BSD-3-Clause") and task in row.tasks)
            assert row is None or language == "en" or not row.languages or row.languages == ("*",)
            assert row is None or row.mb <= 200 + 100 * minutes


def test_larger_downloads_are_chosen_if_they_are_there_already(no_cache):
    wanted = facts(minutes=1, speed=1e13)
    row = next(row for row in reversed(ROWS) if "text-classification" in row.tasks and row.mb > 300)
    assert choose(wanted).mb <= 300
    snapshot = no_cache / f"hub/models--{row.name.replace('/', '--')}"
    (snapshot / "snapshots/abc").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs/main").write_text("abc")
    assert choose(wanted).name != row.name  # there are no weights yet
    (snapshot / "snapshots/abc/model.safetensors").write_bytes(b"")
    assert choose(wanted).name == row.name


@pytest.mark.parametrize(
    "text, language",
    [
        ("What is the capital of France, and how far is it from here?", "en"),
        ("The results of this trial were compared with those that had been published in the last decade.", "en"),
        ("USB cable 2 m black", "en"),
        ("Wie weit ist es von hier bis zur nächsten Stadt, und wann fährt der Zug?", "other"),
        ("¿Cuál es la capital de Francia y a qué distancia está de aquí?", "other"),
        ("Hoe ver is het van hier naar de volgende stad en wanneer vertrekt de trein naar het zuiden?", "other"),
        ("Какая столица Франции?", "other"),
        ("フランスの首都はどこですか", "other"),
        ("12345 67", ""),
    ],
)
def test_languages_are_told_apart(text, language):
    assert judge_language([text] * 20) == language


# ------------------------------------------------------------------------------------------------ a local hub


def files_of(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def tiny_row(name: str, **changes) -> PublicCheckpoint:
    row = next(row for row in ROWS if row.name == "google-bert/bert-base-uncased")
    return dataclasses.replace(row, name=name, size="bert-test", mb=0.01, gmacs=1e-6, source="https://example.org", **changes)


@pytest.fixture
def server(folder, no_cache, monkeypatch):  # noqa: F811
    made = Hub({}, {"org/words": files_of(folder), "org/more-words": files_of(folder)})
    monkeypatch.setenv("HF_ENDPOINT", made.address)
    rows = (tiny_row("org/more-words"), tiny_row("org/words"))
    monkeypatch.setattr(pretrained, "list_public_checkpoints", lambda: rows)
    yield made
    made.close()


@pytest.fixture
def table(tmp_path):
    return sentences(tmp_path / "texts.csv")


def test_auto_downloads_what_it_names_and_resume_does_not(server, table, no_cache, tmp_path):
    says = Says()
    run = fit(table, weights="auto", out=tmp_path / "run", callback=says, settings=FAST)
    (line,) = (text for text in says.said if text.startswith("pretrained weights"))
    assert "org/words (0 MB, Apache-2.0), downloading" in line and "example.org" in line
    assert run.record["request"]["weights"] == "hf:org/words" and run.record["model"]["architecture"] == "bert"
    assert "weights: hf:org/words" in (run.path / "fit.yaml").read_text()
    server.requests.clear()
    with pytest.raises(Interrupted):
        fit(table, weights="auto", out=tmp_path / "stopped", callback=StopAt(1), settings=FAST)
    assert server.requests and not server.downloads()  # it asks whether there is a newer version
    for file in (tmp_path / "stopped/checkpoints").iterdir():
        file.unlink()
    shutil.copytree(tmp_path / "stopped", tmp_path / "again")
    server.requests.clear()
    again = resume(tmp_path / "stopped")
    assert (again.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    shutil.rmtree(no_cache)
    with pytest.raises(WeightsError, match="hf:org/words is not among the downloads on this machine"):
        resume(tmp_path / "again")
    assert not server.requests


def test_names_in_config_files_are_not_downloaded(server, table, tmp_path, capsys):
    """A run writes such a file, and the run may come from somebody else."""
    config = tmp_path / "fit.yaml"
    config.write_text(f"data: {table}\nweights: hf:org/words\nsettings: {{steps: 2, precision: float32}}\n")
    arguments = ["fit", "--config", str(config), "--out", str(tmp_path / "run")]
    with pytest.raises(WeightsError, match=r"names in files are not downloaded.*--weights hf:org/words"):
        app(arguments, standalone_mode=False)
    assert not server.requests
    app([*arguments, "--weights", "hf:org/words"], standalone_mode=False)
    server.requests.clear()
    app([*arguments[:-1], str(tmp_path / "again")], standalone_mode=False)
    assert not server.requests
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "again"))
    assert first == second


def test_without_weights_one_line_suggests_them_and_nothing_is_contacted(server, table, tmp_path):
    def say(out: str, **more) -> list[str]:
        says = Says()
        fit(table, out=tmp_path / out, callback=says, settings=FAST, **more)
        return [text for text in says.said if text.startswith("pretrained weights")]

    line = "pretrained weights: `--weights auto` would start from org/words (0 MB, Apache-2.0)"
    assert say("a", model="bert-test") == [line] and not server.requests
    assert say("b", model="lstm") == []  # none of the rows is one
    fieldguide.load("hf:org/words")
    server.requests.clear()
    assert say("c", model="bert-test") == [f"{line[:-1]}; already downloaded)"] and not server.requests


def test_without_a_network_earlier_downloads_are_used(server, table, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"hf:org/words: .* cannot be reached"):
        build_plan(read(table), weights="auto", settings=FAST)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SettingsError, match=r"HF_HUB_OFFLINE is set, and no checkpoint.*would be org/words \(0 MB"):
        build_plan(read(table), weights="auto", settings=FAST)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    fieldguide.load("hf:org/more-words")
    for variable, value in (("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:9")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            says = Says()
            assert build_plan(read(table), weights="auto", settings=FAST, callback=says).weights == "hf:org/more-words"
            assert any("org/more-words (0 MB, Apache-2.0), downloaded before" in text for text in says.said)


def test_auto_without_a_suitable_row_says_why(server, table):
    with pytest.raises(SettingsError, match=r"no public checkpoint suits this data \(org/words: it is no lstm\)"):
        build_plan(read(table), weights="auto", model="lstm", settings=FAST)


# ------------------------------------------------------------------------------------------------ frozen features


def features_of(run, texts: list[str]) -> np.ndarray:
    """Return the inputs of the head, computed one text at a time."""
    seen = []
    model = run.model
    handle = model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for text in texts:
        run.predict([text])
    handle.remove()
    return torch.cat(seen).float().numpy()


def test_head_equals_logistic_regression_on_the_features(folder, table, tmp_path):  # noqa: F811
    """With a learning rate that destroys the network, frozen features win, and the weights stay those of the checkpoint."""
    says = Says()
    run = fit(table, weights=folder, out=tmp_path / "run", callback=says, settings={**FAST, "lr": 3.0, "ema": 0})
    frozen = run.record["choice"]["frozen"]
    assert run.record["cost"]["best_step"] == 0 and any("so they are kept" in text for text in says.said)
    plan = build_plan(read(table), weights=folder, settings=FAST)
    before, after = plan.objective.model.state_dict(), run.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if name.startswith("blocks"))
    data, splits = plan.source, plan.splits
    texts, labels = data.rows["text"].to_list(), data.rows["label"].to_list()
    x = features_of(run, texts)
    mean, std = x[splits.train].mean(0), x[splits.train].std(0)
    model = LogisticRegression(C=float(frozen["chosen"].split("=")[1]), max_iter=2000)
    model.fit(((x - mean) / std)[splits.train], [labels[i] for i in splits.train])
    expected = model.predict((x - mean) / std)
    predicted = np.array([run.predict([text])[0]["label"] for text in texts])
    assert (predicted == expected).mean() > 0.98
    held = splits.validation
    assert frozen["validation"] == pytest.approx(np.mean([expected[i] == labels[i] for i in held]), abs=1.01 / len(held))
    assert frozen["rows"] == len(splits.train)


def test_fine_tuning_goes_on_from_the_fitted_head(folder, table):  # noqa: F811
    plan = build_plan(read(table), weights=folder, settings=FAST)
    before = plan.objective.model.head.weight.clone()
    assert frozen_features.is_possible(plan)
    found = frozen_features.fit_frozen(plan, Says())
    assert not torch.equal(plan.objective.model.head.weight, before) and found.score > 0.4
    whole = build_plan(read(table), weights=folder, settings={**FAST, "finetune": "whole"})
    assert not frozen_features.is_possible(whole)  # it was asked for
    fresh = build_plan(read(table), model="bert-test", settings=FAST)
    assert not frozen_features.is_possible(fresh)


def test_failing_fit_leaves_the_head_as_it_was(folder, table, monkeypatch):  # noqa: F811
    plan = build_plan(read(table), weights=folder, settings=FAST)
    before = plan.objective.model.head.weight.clone()
    monkeypatch.setattr(type(plan.task), "score", lambda *_: {plan.task.monitored_metric().name: float("nan")})
    says = Says()
    assert frozen_features.fit_frozen(plan, says) is None and torch.equal(plan.objective.model.head.weight, before)
    assert "not finite" in says.said[-1]


def test_time_limits_the_rows(folder, table, monkeypatch):  # noqa: F811
    plan = build_plan(read(table), weights=folder, minutes=1, settings={"batch": 8, "precision": "float32"})
    monkeypatch.setattr(frozen_features, "FEATURES_FRACTION", 0.0)
    monkeypatch.setattr(frozen_features, "BATCH", 16)
    says = Says()
    assert frozen_features.fit_frozen(plan, says).rows == 16  # one batch
    assert f"of 16 of {len(plan.splits.train)} training rows" in says.said[-1]
    monkeypatch.setattr(frozen_features, "VALIDATION_FRACTION", 0.0)
    monkeypatch.setattr(frozen_features, "BATCH", 4)
    assert frozen_features.fit_frozen(plan, says) is None and "takes too long" in says.said[-1]


@pytest.mark.slow
@pytest.mark.parametrize("wins", [True, False])
def test_downloaded_weights_take_part_in_the_race(server, table, tmp_path, monkeypatch, wins):
    from fieldguide.automl import race
    from fieldguide.tasks.text.text_classification import TextClassification

    fit(table, weights="auto", out=tmp_path / "first", callback=Says(), settings=FAST)
    server.requests.clear()
    monkeypatch.setattr(race, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(TextClassification, "baseline_models", ())
    pick = lambda self: next(c for c in self.contenders if bool(c.plan.weights) == wins)
    monkeypatch.setattr(race.Race, "find_leader", pick)
    run = fit(table, minutes=0.15, out=tmp_path / "run", callback=Says())
    entries = {c["name"]: c for c in run.record["race"]["contenders"]}
    tuned = next(c for c in entries.values() if "weights" in c)
    assert tuned["weights"] == "hf:org/words" and tuned["frozen"]["rows"] > 0 and len(entries) >= 2
    assert (run.record["model"]["architecture"] == "bert") == wins
    assert run.record["request"]["weights"] == ("hf:org/words" if wins else None)
    assert not server.downloads()
    again = fieldguide.open_run(run.path)
    assert again.predict(["the sea is calm"])[0]["label"]


@pytest.mark.slow
def test_a_baseline_that_beats_the_winner_keeps_its_own_preprocessing(server, table, tmp_path, monkeypatch):
    """The winner of the race has the tokenizer of its checkpoint, with which the baseline would read other words."""
    from fieldguide.automl import race, training

    fit(table, weights="auto", out=tmp_path / "first", callback=Says(), settings=FAST)
    monkeypatch.setattr(race, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(race.Race, "find_leader", lambda self: next(c for c in self.contenders if c.plan.weights))
    monkeypatch.setattr(training, "find_ensemble", lambda plan, rivals, own: None)
    monkeypatch.setattr(training, "find_better", lambda plan, rivals, own: next(r for r in rivals if r.name == "bag-of-ngrams"))
    run = fit(table, minutes=0.15, out=tmp_path / "run", callback=Says())
    alone = fit(table, model="bag-of-ngrams", out=tmp_path / "alone", callback=Says())
    assert run.card.name == "bag-of-ngrams" and run.record["race"]["winner"] == "bert"
    texts = ["the sea is calm", "a bird sang on the wall"]
    ours, theirs = (fieldguide.open_run(each.path).predict(texts) for each in (run, alone))
    assert [p["label"] for p in ours] == [p["label"] for p in theirs]
    assert [p["probability"] for p in ours] == pytest.approx([p["probability"] for p in theirs], abs=1e-4)
    assert run.evaluate(table)["scores"] == pytest.approx(run.scores, nan_ok=True)
