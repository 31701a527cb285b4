"""Images with captions and questions: ranks against a slow count, damaged tables, rare answers, complete runs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import damage
from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import BadData, read, split
from fieldguide.inference.run import open_run
from fieldguide.tasks import infer_task, task
from fieldguide.tasks.multimodal.base import overlay_heatmap
from fieldguide.tasks.multimodal.image_text import compute_ranks

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120)}
SIDES = ("left", "right")


def album(folder, count=200, kind="captions"):
    """Write images with a colored square on one side, and a table with two captions or questions for each."""
    rng, rows = np.random.default_rng(0), []
    (folder / "photos").mkdir(parents=True)
    for i in range(count):
        colour, side = str(rng.choice(list(COLOURS))), str(rng.choice(SIDES))
        picture = rng.integers(0, 60, (16, 16, 3)).astype(np.uint8)
        left = int(rng.integers(0, 3)) + (9 if side == "right" else 0)
        top = int(rng.integers(0, 11))
        picture[top : top + 5, left : left + 4] = COLOURS[colour]
        Image.fromarray(picture).save(folder / f"photos/{i:03}.png")
        said = (
            (f"a {colour} square on the {side}", f"on the {side} there is something {colour}")
            if kind == "captions"
            else (f"what colour is the square?,{colour}", f"on which side is the square?,{side}")
        )
        rows += [f"photos/{i:03}.png,{words}" for words in said]
    names = "image,caption" if kind == "captions" else "image,question,answer"
    return damage.write(folder / "table.csv", [names, *rows])


def read_as(source, name, **asked):
    return read(source, column_spec=task(name).column_spec, **asked)


def change(table, edits):
    rows = table.read_text().splitlines()
    for line, new in edits.items():
        rows[line - 1] = new
    return damage.write(table, rows)


# Scores


def test_ranks_equal_a_slow_count(monkeypatch):
    monkeypatch.setattr("fieldguide.tasks.multimodal.image_text.QUERY_CHUNK", 3)
    rng = np.random.default_rng(0)
    questions, answers = rng.integers(-2, 3, (8, 3)).astype(float), rng.integers(-2, 3, (6, 3)).astype(float)
    right = np.array([(q, a) for q in range(8) for a in range(6) if a == q % 6 or rng.random() < 0.2])
    expected = []
    for q in range(8):
        good = {int(a) for x, a in right if x == q}
        best = max(float(questions[q] @ answers[a]) for a in good)
        expected.append(sum(1 for a in range(6) if a not in good and float(questions[q] @ answers[a]) >= best))
    assert compute_ranks(questions, answers, right).tolist() == expected and max(expected) > 1


def learnt(tmp_path, name, **options):
    table = album(tmp_path / name, 60, "captions" if name == "image-text" else "questions")
    kind = task(name)
    asked = kind.options_from(options)
    data = kind.build_examples(kind.select_columns(read_as(table, name)), asked)
    return kind.fit(data, asked), data


def test_equal_images_and_captions_are_all_correct(tmp_path):
    it, data = learnt(tmp_path, "image-text")
    truth = it.targets(data)
    # Four colours, two sides, two ways to say it: 16 captions. One vector for what is meant makes every recall perfect.
    meant = np.array([[colour in c, side in c] for c in it.captions(data) for colour in COLOURS for side in SIDES])
    code = meant.reshape(len(data), 4, 2, 2).all(3).reshape(len(data), 8).astype(np.float32)
    assert len(np.unique(truth["caption"])) == 16 and len(np.unique(truth["picture"])) == 60
    assert set(it.score({"image": code, "text": code}, truth).values()) == {1.0}
    same = np.ones((len(data), 3), dtype=np.float32)
    assert set(it.score({"image": same, "text": same}, truth).values()) == {0.0}, "ties count against"
    exact = np.eye(60, dtype=np.float32)[truth["picture"]]
    own = np.zeros((16, 60), dtype=np.float32)
    own[truth["caption"], truth["picture"]] = 1
    scores = it.score({"image": exact, "text": own[truth["caption"]]}, truth)
    assert all(scores[f"{way}_r{k}"] == 1 for way in ("text", "image") for k in (1, 5, 10)) and scores["mean_recall"] == 1
    turned = it.score({"image": exact, "text": -own[truth["caption"]]}, truth)
    assert turned["image_r1"] == turned["text_r1"] == 0
    between = it.intervals({"image": exact, "text": own[truth["caption"]]}, truth)
    assert 0.7 < between["image_r1"][0] < between["image_r1"][1] == 1 and set(between) == set(scores)


def test_equal_captions_share_an_id_in_a_batch(tmp_path):
    from fieldguide.core.settings import Settings
    from fieldguide.models import registry

    it, data = learnt(tmp_path, "image-text")
    card = registry.find("clip-test")[0]
    batch = it.batches(data, card, Settings()).make(np.arange(len(data)), None)
    said = it.captions(data)
    for i in range(20):
        for j in range(20):
            assert (batch["text"][i] == batch["text"][j]) == (said[i] == said[j])
            assert (batch["picture"][i] == batch["picture"][j]) == (i // 2 == j // 2)  # two captions of each
    ends = batch["mask"].sum(1) - 1
    assert (batch["tokens"].gather(1, ends[:, None])[:, 0] == it.text.end).all()
    assert it.classes == sorted(set(said)) and it.model_dims()["end"] == it.text.end


def test_equal_images_stay_in_one_split(tmp_path):
    for name in ("image-text", "visual-question-answering"):
        _, data = learnt(tmp_path, name)
        made = split(data)
        sides = [set(data.rows["image"][rows].to_list()) for rows in (made.train, made.validation, made.test)]
        assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_rare_answers_count_as_wrong(tmp_path):
    table = album(tmp_path / "rare", 40, "questions")
    change(table, {2: "photos/000.png,what colour is the square?,mauve"})
    kind = task("visual-question-answering")
    data = kind.build_examples(read_as(table, kind.name), kind.options_from({}))
    it = kind.fit(data, kind.options_from({}))
    assert "mauve" not in it.labels and len(it.labels) == 6 and "1 of 7 answers are rare" in it.notes[0]
    truth = it.targets(data)
    assert truth["label"][0] == -1 and (truth["label"][1:] >= 0).all() and len(it.answerable_rows(data)) == len(data) - 1
    sure = np.eye(6)[np.maximum(truth["label"], 0)]
    assert it.score({"probabilities": sure}, truth)["accuracy"] == pytest.approx(1 - 1 / len(data))
    few = kind.fit(data, kind.options_from({"answers": "2"}))
    assert len(few.labels) == 2 and "5 of 7" in few.notes[0]
    assert few.report_elements(data, {"probabilities": np.tile([0.6, 0.4], (len(data), 1))}, few.targets(data))["Questions"]


def test_first_correct_answer_counts(tmp_path):
    """One of five captions near its image is enough for the image; each caption is also a query of its own."""
    it, _ = learnt(tmp_path, "image-text")
    picture, caption = np.repeat([0, 1], 5), np.arange(10)
    image, text = np.repeat(np.eye(4)[:2], 5, 0), np.tile(np.eye(4)[3], (10, 1))
    text[0], text[5], text[6] = np.eye(4)[0], 0.9 * np.eye(4)[1], np.eye(4)[0] + 0.5 * np.eye(4)[1]
    truth = {"picture": picture, "caption": caption, "class": np.full(10, -1)}
    hits = it.compute_hits({"image": image, "text": text}, truth)
    assert hits["text_r1"].tolist() == [False, True]  # caption 6, of picture 1, is as near to picture 0 as its own
    assert hits["image_r1"].tolist() == [True, False, False, False, False, True, False, False, False, False]
    assert hits["text_r5"].all() and len(hits["image_r1"]) == 10


def test_captions_are_not_mistaken_for_classes(tmp_path):
    request = {"target": None, "kinds": {}, "roles": {}, "group": None, "time": None, "allow_bad": False, "task": None}
    table = album(tmp_path, 40)
    first, kind, why = read_for({**request, "data": str(table)})
    assert kind.name == "image-text" and "images and captions in 'caption'" in why and first.target.kind == "text"
    rows = table.read_text().splitlines()
    turned = damage.write(tmp_path / "turned.csv", [",".join(row.split(",")[::-1]) for row in rows])
    assert read_for({**request, "data": str(turned)})[1].name == "image-text"  # whichever column is the last
    own = damage.write(tmp_path / "own.csv", ["photo,what", *[f"{row} of number {i}" for i, row in enumerate(rows[1:])]])
    data, kind, _ = read_for({**request, "data": str(own)})  # by its values, whatever its name
    assert kind.name == "image-text" and data.target.name == "what"
    classes = damage.write(
        tmp_path / "classes.csv", ["photo,what", *[f"{row.split(',')[0]},{i % 3}" for i, row in enumerate(rows[1:])]]
    )
    assert read_for({**request, "data": str(classes)})[1].name == "image-classification"
    two = damage.write(
        tmp_path / "two.csv",
        ["en,de", *[f"the number {i} is written here,die Zahl {i} steht hier geschrieben" for i in range(40)]],
    )
    assert read_for({**request, "data": str(two)})[1].name == "translation"


def test_task_is_inferred_from_the_table(tmp_path):
    table = album(tmp_path / "q", 30, "questions")
    assert infer_task(read(table))[0].name == "visual-question-answering"
    with pytest.raises(DataError, match="one image column"):
        read_for(
            {
                "data": "iris",
                "target": None,
                "kinds": {},
                "roles": {},
                "group": None,
                "time": None,
                "allow_bad": False,
                "task": "image-text",
            }
        )


def test_heatmap_matches_the_weights():
    heat = np.zeros((4, 4))
    heat[1, 2] = 1
    seen = overlay_heatmap(np.full((64, 64, 3), 100, np.uint8), heat + 1e-9).astype(int)
    red = seen[..., 0] - seen[..., 2]
    assert red[24, 40] > 60 and red[40, 24] == 0
    assert [int((red.sum(1 - axis) * np.arange(64)).sum() / red.sum()) for axis in (0, 1)] == pytest.approx([23.5, 39.5], abs=1)


# Damage


def test_missing_image(tmp_path):
    table = album(tmp_path)
    (tmp_path / "photos/003.png").unlink()
    with damage.refused("missing-file", "table.csv:8", "Correct the paths"):
        change(
            table,
            {
                2: "photos/none.png,a red square on the left",
                3: "photos/nope.png,a red square on the left",
                4: "photos/nada.png,a red square on the left",
            },
        )
        read_as(table, "image-text")


def test_truncated_image(tmp_path):
    table, file = album(tmp_path), tmp_path / "photos/005.png"
    file.write_bytes(file.read_bytes()[:-200])
    found = damage.finding(read_as(table, "image-text"), "truncated-image")
    assert found.count == found.unusable == 2 and "table.csv:12" in found.places[0] and "Copy them again" in found.remedy


def test_empty_caption(tmp_path):
    table = change(album(tmp_path), {5: "photos/001.png,", 9: "photos/003.png,  "})
    data = read_as(table, "image-text")
    found = damage.finding(data, "target-missing")
    assert found.count == found.unusable == 2 and found.places == ("table.csv:5", "table.csv:9") and len(data) == 398


def test_shifted_columns(tmp_path):
    table = change(album(tmp_path), {7: "photos/002.png,photos/003.png"})
    found = damage.finding(read_as(table, "image-text"), "caption-is-file")
    assert found.count == 1 and found.places == ("table.csv:7",) and "columns" in found.remedy


def test_rows_with_a_cell_too_many_or_too_few(tmp_path):
    table = change(album(tmp_path), {4: "photos/001.png", 6: "photos/002.png,a red, green or blue square"})
    with pytest.raises(DataError, match=r"2 of 401 lines.*table.csv:4 has 1, table.csv:6 has 3. Quote cells"):
        read_as(table, "image-text")


def test_wrong_encoding(tmp_path):
    table = album(tmp_path)
    table.write_bytes(table.read_text().replace("a red square", "a réd square").encode("latin-1"))
    data = read_as(table, "image-text")
    assert any("réd" in c for c in data.rows["caption"]) and any("encoding" in f.check for f in data.findings)


def test_duplicate_pairs(tmp_path):
    table = album(tmp_path)
    lines = table.read_text().splitlines()
    damage.write(table, [*lines, lines[1], lines[2].upper().replace("PHOTOS/000.PNG", "photos/000.png")])
    found = damage.finding(read_as(table, "image-text"), "duplicate-pair")
    assert found.count == 2 and found.places == ("table.csv:402", "table.csv:403") and "Remove" in found.remedy


def test_missing_questions_and_answers(tmp_path):
    table = album(tmp_path, kind="questions")
    data = read_as(change(table, {3: "photos/000.png,what is it?,", 4: "photos/001.png,,"}), "visual-question-answering")
    assert damage.finding(data, "target-missing").count == 2 and len(data) == 398


def test_conflicting_answers(tmp_path):
    table = album(tmp_path, kind="questions")
    lines = table.read_text().splitlines()
    damage.write(table, [*lines, "photos/000.png,what colour is the square?,mauve"])
    found = damage.finding(read_as(table, "visual-question-answering"), "conflicting-duplicate")
    assert found.count == 1 and "mauve" in found.places[0]


def test_too_many_unusable_rows_are_rejected(tmp_path):
    table = album(tmp_path)
    for i in range(20):
        (tmp_path / f"photos/{i:03}.png").write_bytes(b"")
    with pytest.raises(BadData, match="40 of 400 examples are unusable"):
        read_as(table, "image-text")


# Whole runs

SETTINGS = {"model.patch": 4, "model.dim": 64, "model.depth": 2, "precision": "float32", "lr": 2e-3, "minutes": 0}


@pytest.mark.slow
def test_captions_end_to_end(tmp_path):
    table = album(tmp_path / "data", 400)
    run = fit(
        table,
        task="image-text",
        model="clip-mini",
        out=tmp_path / "run",
        settings={**SETTINGS, "steps": 140, "evaluate": 70, "batch": 64, "model.text_dim": 64},
    )
    best = {b["name"]: b["scores"] for b in run.record["scores"]["baselines"]}
    assert run.scores["text_r1"] > 0.8 and run.scores["text_r1"] > 2 * best["chance"]["text_r1"]
    photo = next(p for p in sorted((tmp_path / "data/photos").iterdir()))
    said = open_run(run.path).predict(str(photo), classes=", ".join(f"a {c} square on the {s}" for c in COLOURS for s in SIDES))
    caption = table.read_text().splitlines()[1].split(",")[1]
    assert said[0]["label"] == caption and sum(said[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert len(open_run(run.path).predict(str(photo))[0]["similarity"]) == 16, "without classes, captions of the training part"
    again = open_run(run.path).evaluate(table)
    assert again["scores"] == pytest.approx(run.scores, abs=1e-6)
    page = (run.path / "report.html").read_text()
    assert "Attention" in page and "Captions retrieved for images" in page


@pytest.mark.slow
def test_questions_end_to_end(tmp_path):
    table = album(tmp_path / "data", 400, "questions")
    run = fit(
        table,
        model="vilt-mini",
        out=tmp_path / "run",
        settings={**SETTINGS, "steps": 160, "evaluate": 40, "batch": 64, "lr": 1e-2, "augment": "none"},
    )
    best = {b["name"]: b["scores"]["accuracy"] for b in run.record["scores"]["baselines"]}
    assert run.scores["accuracy"] > 0.85 > 0.6 > best["bag-of-ngrams"] > best["most frequent answer"]
    photo = str(tmp_path / "data/photos/000.png")
    answer = open_run(run.path).predict(photo, question="what colour is the square?")[0]
    assert answer["answer"] == table.read_text().splitlines()[1].split(",")[2] and answer["input"].endswith("000.png")
    assert len(open_run(run.path).predict(str(table))) == 800
    with pytest.raises(DataError, match="--set question="):
        open_run(run.path).predict(photo)
    page = (run.path / "report.html").read_text()
    assert "Attention" in page and "By question type" in page


def test_the_question_alone_is_the_model_where_the_network_is_worse(tmp_path):
    """After two steps a network knows nothing; a linear model of the question at least knows colors from sides."""
    table = album(tmp_path / "data", 100, "questions")
    run = fit(table, out=tmp_path / "run", settings={**SETTINGS, "steps": 2, "evaluate": 2, "batch": 8})
    assert run.record["model"]["architecture"] == "bag-of-ngrams"
    network = next(rival for rival in run.record["choice"]["rivals"] if rival["network"])
    assert run.record["choice"]["validation"] > network["validation"]
    answer = open_run(run.path).predict(str(tmp_path / "data/photos/000.png"), question="on which side is the square?")[0]
    assert answer["answer"] in SIDES


@pytest.mark.slow
def test_questions_after_training_on_captions(tmp_path):
    """The encoders start from the run, the answer head is new."""
    settings = {**SETTINGS, "steps": 160, "evaluate": 40, "batch": 64, "lr": 1e-2, "augment": "none"}
    table = album(tmp_path / "data", 400, "questions")
    run = fit(table, model="clip-mini", out=tmp_path / "run", settings=settings)
    assert run.scores["accuracy"] > 0.85 > 0.6 > run.record["scores"]["baselines"][1]["scores"]["accuracy"]
    assert "Attention" in (run.path / "report.html").read_text()
    pairs = fit(
        album(tmp_path / "captions", 200),
        task="image-text",
        model="clip-mini",
        out=tmp_path / "pairs",
        settings={**settings, "steps": 20, "evaluate": 20},
    )
    further = fit(
        table,
        task="visual-question-answering",
        weights=pairs.path,
        out=tmp_path / "further",
        settings={"steps": 1, "batch": 16, "lr": 1e-9, "optimizer": "adamw", "precision": "float32"},
    )
    assert {name.partition(".")[0] for name in further.record["model"]["fresh"]} == {"answers"}
    begun, before = further.objective.model.state_dict(), pairs.objective.model.state_dict()
    assert all(torch.allclose(begun[name], x, atol=1e-5) for name, x in before.items() if name.startswith(("vision.", "text.")))


def test_template_needs_a_placeholder(tmp_path):
    with pytest.raises(SettingsError, match=r"no \{\}"):
        learnt(tmp_path, "image-text", template="a photo")


def test_class_column_is_evaluated_zero_shot(tmp_path):
    table = album(tmp_path / "c", 60)
    rows = table.read_text().splitlines()
    damage.write(table, ["image,caption,label", *(f"{r},{next(c for c in COLOURS if c in r)}" for r in rows[1:])])
    kind = task("image-text")
    options = kind.options_from({"template": "a {} square"})
    data = kind.build_examples(kind.select_columns(read_as(table, kind.name)), options)
    it = kind.fit(data, options)
    assert it.classes == sorted(COLOURS) and it.columns[-2].role == "ignored"
    truth = it.targets(data)
    scores = it.score({"probabilities": np.eye(4)[truth["class"]]}, truth)
    assert scores == {"zero_shot_accuracy": 1.0}

    class Words(torch.nn.Module):
        logit_scale = torch.zeros(())
        asked: ClassVar[list] = []

        def encode_text(self, tokens, mask):
            self.asked.append((tokens, mask))
            return torch.eye(4)

        def encode_image(self, image):
            return torch.eye(4)[[2, 0]]

    class Objective:
        model = Words()

    out = it.predict_step(Objective())({"image": torch.zeros(2, 3, 16, 16)})
    assert out["probabilities"].argmax(1).tolist() == [2, 0] and "text" not in out
    tokens, mask = Words.asked[0]
    assert it.text.decode(tokens[0][mask[0]].tolist()).strip().startswith("a blue square")
