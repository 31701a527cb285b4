"""Text-to-image generation: reading images with captions, recognition of captions, the caption matcher, and a run."""

from __future__ import annotations

from itertools import product

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from damage import finding
from fieldguide.automl.advisor import build_config
from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read
from fieldguide.data.validation.checks import BadData
from fieldguide.metrics import generative
from fieldguide.models.registry import find
from fieldguide.tasks.base import Media
from fieldguide.tasks.vision.image_generation import ImageGeneration
from fieldguide.tasks.vision.image_generation_conditions import infer_target_kind

LIGHTS, HEIGHTS, SIDES = {"dim": 90, "grey": 160, "bright": 250}, ("top", "middle", "bottom"), ("left", "centre", "right")
SCENES = list(product(LIGHTS, HEIGHTS, SIDES))


def caption(light, height, side):
    return f"A {light} block at the {height} {side}"


def picture(scene, seed):
    light, height, side = scene
    array = np.random.default_rng(seed).integers(0, 30, (8, 8))
    top, left = 3 * HEIGHTS.index(height), 3 * SIDES.index(side)
    array[top : top + 2, left : left + 2] = LIGHTS[light]
    return Image.fromarray(array.astype(np.uint8))


def folder(root, each=5):
    """Write an image with a text file for each of 27 captions, `each` times."""
    root.mkdir(parents=True, exist_ok=True)
    for i in range(each * len(SCENES)):
        picture(SCENES[i % 27], i).save(root / f"p{i:03d}.png")
        (root / f"p{i:03d}.txt").write_text(caption(*SCENES[i % 27]) + "\n")
    return root


def asked(path, **more):
    return read_for(
        {
            "data": str(path),
            "target": None,
            "kinds": {},
            "roles": {},
            "group": None,
            "time": None,
            "allow_bad": False,
            "task": "image-generation",
            **more,
        }
    )


def test_captions_are_distinguished_from_classes():
    phrases = pl.Series("c", [caption(*s) for s in SCENES])
    assert (
        infer_target_kind(phrases) == "text" and infer_target_kind(phrases[:20]) is None
    )  # so few are classes with long names
    assert (
        infer_target_kind(pl.Series("c", [f"breed-{i}" for i in range(100)])) is None
        and infer_target_kind(pl.Series("c", range(100))) is None
    )
    assert (
        infer_target_kind(pl.Series("c", [None, "", "?"])) is None
        and infer_target_kind(pl.Series("c", [], dtype=pl.String)) is None
    )
    assert infer_target_kind(pl.Series("c", [f"一只棕色的狗在草地上奔跑{i}" for i in range(30)])) == "text"


def test_table_of_images_and_captions(tmp_path):
    folder(tmp_path / "images")
    rows = [f"images/p{i:03d}.png,{caption(*SCENES[i % 27])}" for i in range(135)]
    (tmp_path / "table.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    data, kind, _ = asked(tmp_path / "table.csv")
    assert kind is ImageGeneration and data.target.kind == "text"
    task = kind.fit(data, kind.Options())
    tokens = task.codes(data)
    assert tokens.shape == (135, task.options.length) and task.labels == [] and len(np.unique(tokens, axis=0)) == 27
    assert task.decode_caption(tokens[0]) == caption(*SCENES[0]).lower() and task.model_dims()["vocab_size"] == task.text.size
    assert task.codes(data.take([3]).__class__(**{**vars(data.take([3])), "rows": data.rows[[3]].drop("caption")})).sum() == 0
    forced, *_ = asked(tmp_path / "table.csv", kinds={"caption": "category"})
    assert len(kind.fit(forced, kind.Options()).labels) == 27
    with pytest.raises(SettingsError, match="dcgan reads no text, but this data has texts"):
        build_config(*find("dcgan-32"), task.model_dims())
    with pytest.raises(SettingsError, match=r"dcgan-32 cannot be built .* reads no text"):
        fit(str(tmp_path / "table.csv"), task="image-generation", model="dcgan-32", out=tmp_path / "run", settings={"steps": 1})


def test_captions_next_to_images(tmp_path):
    data = read(folder(tmp_path / "flat"))
    assert data.target.name == "caption" and data.target.kind == "text" and data.rows["caption"][28] == caption(*SCENES[1])
    assert {f.path for f in data.manifest.files} == {f"p{i:03d}.{e}" for i in range(135) for e in ("png", "txt")}
    assert sum(f.rows for f in data.manifest.files) == 135
    for part in ("train", "val", "test"):
        folder(tmp_path / "parts" / part, 2)
    splits = read(tmp_path / "parts").splits
    assert [int((splits == s).sum()) for s in ("train", "val", "test")] == [54] * 3
    for i in range(135):  # boxes, as darknet writes them, are no captions
        (tmp_path / "flat" / f"p{i:03d}.txt").write_text("0 0.5 0.5 0.25 1e-1\n")
    assert "caption" not in read(tmp_path / "flat").columns


def test_damaged_captions(tmp_path):
    root = folder(tmp_path, 8)
    (root / "p001.txt").unlink()
    (root / "p002.png").unlink()
    found = read(root).findings
    assert finding(found, "no-caption").places == ("p001.png",) and finding(found, "no-caption").unusable == 1
    assert finding(found, "no-picture").places == ("p002.txt",) and finding(found, "no-picture").remedy
    root = folder(tmp_path, 8)
    (root / "p003.txt").write_text(" \n")
    data = read(root)
    assert finding(data, "target-missing").count == 1 and "p003.png" in finding(data, "target-missing").places[0]
    (root / "p003.txt").write_bytes(b"")
    assert finding(read(root), "target-missing").unusable == 1 and len(data) == 215
    (root / "p003.txt").write_bytes(b"a caf\xe9 at the top left, seen at night")
    odd = read(root)
    assert finding(odd, "encoding").count == 1 and "p003.txt" in finding(odd, "encoding").places[0]
    assert odd.rows["caption"][3].startswith("a café")
    (root / "p003.txt").write_bytes(b"a block\0\0")
    assert "p003.txt" in finding(read(root), "unreadable-file").places[0]
    root = folder(tmp_path, 8)
    good = (root / "p004.png").read_bytes()
    (root / "p004.png").write_bytes(good[: len(good) // 2])
    assert any(f.unusable and "p004.png" in f.places[0] for f in read(root).findings)
    root = folder(tmp_path, 8)
    for i in range(10):
        (root / f"p{i:03d}.txt").unlink()
    with pytest.raises(BadData, match="10 of 216 examples are unusable"):
        read(root)
    assert len(read(root, allow_bad=True)) == 206


def test_caption_matcher_equals_its_definition():
    torch.manual_seed(0)
    judge, x, pool = generative.CaptionMatcher(1, 40).eval(), torch.randn(100, 1, 8, 8), torch.randint(1, 6, (150, 5))
    pool[:, 3:] *= torch.randint(0, 2, (150, 1))
    with torch.no_grad():  # own captions are some of the best, or hardly any would be picked
        best = (judge.embed_images(x) @ judge.embed_captions(pool).T).topk(12, 1).indices
    tokens = pool[best[torch.arange(100), torch.randint(12, (100,))]]
    got, rng = generative.match_captions(judge, x, tokens, pool), np.random.default_rng(0)
    distinct = torch.unique(pool, dim=0)
    with torch.no_grad():
        seen, own, rest = judge.embed_images(x), judge.embed_captions(tokens), judge.embed_captions(distinct)
    for i in range(100):
        others = [j for j in range(len(distinct)) if distinct[j].tolist() != tokens[i].tolist()]
        drawn = rng.permutation(np.array(others))[:9]
        assert len(drawn) == 9 and got[i] == all(float(seen[i] @ own[i]) > float(seen[i] @ rest[j]) for j in drawn)
    assert 20 < got.sum() < 100
    assert torch.allclose(seen.norm(dim=1), torch.ones(100)) and torch.allclose(own.norm(dim=1), torch.ones(100))
    longer = torch.nn.functional.pad(tokens, (0, 4))
    torch.testing.assert_close(judge.embed_captions(longer), own)  # what is beyond the end says nothing
    assert not torch.allclose(
        judge.embed_captions(torch.tensor([[5, 6, 7, 0]])), judge.embed_captions(torch.tensor([[7, 6, 5, 0]]))
    )


def test_caption_matcher_learns_without_side_effects():
    tokens = torch.tensor([[1 + HEIGHTS.index(h), 10 + SIDES.index(s)] for _, h, s in SCENES]).repeat(6, 1)
    x = torch.stack([torch.from_numpy(np.asarray(picture(SCENES[i % 27], i)).copy()) for i in range(162)])[:, None] / 127.5 - 1
    before = torch.random.get_rng_state()
    with torch.inference_mode():  # as it is called when a run is tested
        judge = generative.train_caption_matcher(x[:120], tokens[:120], 20, steps=100)
    assert torch.equal(before, torch.random.get_rng_state())
    assert generative.match_captions(judge, x[120:], tokens[120:], tokens).mean() > 0.9  # nine captions in all
    assert generative.match_captions(judge, x[120:], tokens[120:].roll(1, 0), tokens).mean() < 0.2
    again = generative.load_state(judge.state_dict())
    assert torch.equal(again.embed_captions(tokens), judge.embed_captions(tokens)) and again.vocab == 20


@pytest.mark.slow
def test_images_are_generated_from_captions(tmp_path):
    run = fit(
        str(folder(tmp_path / "data", 7)),
        task="image-generation",
        out=tmp_path / "run",
        settings={
            "steps": 180,
            "batch": 32,
            "lr": 3e-3,
            "precision": "float32",
            "evaluate": 180,
            "ema": 0.95,
            "model.dim": 16,
            "model.words": 32,
        },
    )
    scores, baselines = run.scores, {b["name"]: b["scores"] for b in run.record["scores"]["baselines"]}
    assert baselines["training images"]["caption_match"] > 0.9 and baselines["shuffled captions"]["caption_match"] < 0.35
    assert scores["caption_match"] > 0.3 and "classifier_accuracy" not in scores
    assert set(baselines["shuffled captions"]) == {"caption_match"}
    low, high = run.record["scores"]["intervals"]["caption_match"]
    assert low < scores["caption_match"] < high
    first = run.predict("A bright block at the top left", count=3, steps=5)
    assert [a["caption"] for a in first] == ["a bright block at the top left"] * 3 and isinstance(first[0]["image"], Media)
    assert run.predict(["A bright block at the top left"], count=2, steps=5) == first[:2]
    assert run.predict(["a dim block at the bottom right"], count=1, steps=5)[0]["image"] != first[0]["image"]
    several = run.predict(count=4, steps=2)
    assert len({a["caption"] for a in several}) == 4  # some that it learnt from
    assert run.evaluate(str(tmp_path / "data"))["scores"]["caption_match"] > 0.3
    assert "By caption" in (run.path / "report.html").read_text()
    with pytest.raises(DataError):
        run.evaluate(str(tmp_path / "nowhere"))
