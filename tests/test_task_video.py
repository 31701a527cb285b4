"""Video generation: all formats, complete and damaged; evaluation features; a run whose videos can be played."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from fieldguide.automl.fit import fit
from fieldguide.automl.request import read_for
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.data import read
from fieldguide.data.media import video
from fieldguide.data.validation.checks import BadData
from fieldguide.metrics import generative
from fieldguide.models.registry import find
from fieldguide.report.pages import summarize_result
from fieldguide.tasks.vision.video_evaluator import (
    compute_feature_scores,
    decibels,
    find_attributes,
    gap_interval,
    mean_consistency,
    motion_image,
)
from fieldguide.tasks.vision.video_generation import VideoGeneration
from fieldguide.tasks.vision.video_report import encode_webp, psnr
from fieldguide.tasks.vision.video_requests import read_requests


def strip(path, seed=0, frames=5, side=16, step=1):
    """Return a strip with a bright square that moves `step` pixels per frame."""
    rng = np.random.default_rng(seed)
    y, x = rng.integers(0, side - 4), 5
    array = rng.integers(0, 30, (side, side * frames)).astype(np.uint8)
    for f in range(frames):
        array[y : y + 4, f * side + x + step * f : f * side + x + step * f + 4] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def folder(root, each=12):
    for name, step in (("left", -1), ("right", 1)):
        for i in range(each):
            strip(root / name / f"{i}.png", seed=i, step=step)
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
            "task": "video-generation",
            **more,
        }
    )


@pytest.mark.parametrize("form", ["strip", "gif", "webp"])
def test_videos_in_every_format(tmp_path, form):
    array = strip(tmp_path / "a.png")
    frames = [Image.fromarray(array[:, 16 * f : 16 * f + 16]) for f in range(5)]
    path = tmp_path / "a.png"
    if form != "strip":
        path = tmp_path / f"a.{form}"
        how = {"lossless": True} if form == "webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **how)
    found = video.check([path])[0]
    assert found.problem == "" and (found.frames, found.width, found.height) == (5, 16, 16)
    film = video.load([path], 16, 1)[0]
    wanted = np.stack([np.asarray(f) for f in frames]).astype(int)
    assert film.shape == (5, 1, 16, 16) and np.abs(film[:, 0] - wanted).max() <= 3


def test_accepted_data(tmp_path):
    data, kind, _ = asked(folder(tmp_path / "videos"))
    assert kind is VideoGeneration and data.features("video") and data.target.name == "label"
    task = kind.fit(data, kind.options_from({"frames": 4}))
    assert task.labels == ["left", "right"] and task.model_dims() == {"image": 16, "channels": 1, "num_classes": 2, "frames": 4}
    film = np.arange(10)
    assert task.cut_frames(film, 0.0).tolist() == [0, 1, 2, 3] and task.cut_frames(film, 0.999).tolist() == [6, 7, 8, 9]
    assert task.cut_frames(film[:2], 0.5).tolist() == [0, 1, 1, 1]
    rows = "\n".join(f"{name}/{i}.png,{name}" for name in ("left", "right") for i in range(12))
    (tmp_path / "videos" / "list.csv").write_text("film,move\n" + rows)
    data, *_ = asked(tmp_path / "videos" / "list.csv", target="move")
    assert data.columns["film"].kind == "video" and len(data) == 24


def filmed(path, frames=8, side=32, seed=0):
    """Write an MP4 of a moving bright square and return its frames."""
    row, said = np.random.default_rng(seed).integers(0, side - 8), np.zeros((frames, side, side, 3), np.uint8)
    for f in range(frames):
        said[f, row : row + 8, 2 * f : 2 * f + 8] = 240
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=8, options={"qscale": "2"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        for picture in said:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        film.mux(stream.encode())
    return said


def test_video_files(tmp_path):
    said = [filmed(tmp_path / "walks" / f"{i}.mp4", seed=i) for i in range(120)]
    data = read(tmp_path, column_spec=VideoGeneration.column_spec)
    assert len(data) == 120 and data.rows["#frames"].unique().to_list() == [8]
    first = data.rows[data.features("video")[0].name].to_list()
    for path, picture in zip(first[:3], (said[int(Path(p).stem)] for p in first[:3])):
        film = video.load([path], 32, 1)[0][:, 0]
        assert film.shape == (8, 32, 32) and np.abs(film.astype(int) - picture[..., 0]).mean() < 8
    whole = (tmp_path / "walks" / "7.mp4").read_bytes()
    for content, check in ((whole[: len(whole) // 2], "truncated-video"), (b"", "empty-file"), (b"no film", "truncated-video")):
        (tmp_path / "walks" / "7.mp4").write_bytes(content)
        found = {f.check: f for f in read(tmp_path, column_spec=VideoGeneration.column_spec).findings if f.unusable}
        assert found[check].count == 1 and found[check].places[0].startswith("walks/7.mp4")


def test_damaged_videos(tmp_path):
    root = folder(tmp_path, 110)
    good = (root / "left" / "3.png").read_bytes()
    cases = {"empty-file": b"", "not-a-video": b"no film at all", "truncated-video": good[: len(good) // 2]}
    for check, content in cases.items():
        (root / "left" / "3.png").write_bytes(content)
        data = read(root, column_spec=VideoGeneration.column_spec)
        found = {f.check: f for f in data.findings}
        assert found[check].unusable == 1 and found[check].places[0].startswith("left/3.png") and found[check].remedy
        assert len(data) == 219
    Image.fromarray(np.zeros((16, 37), np.uint8)).save(root / "left" / "3.png")
    found = {f.check: f for f in read(root, column_spec=VideoGeneration.column_spec).findings}
    assert "37 x 16 pixels are not a row of square frames" in found["no-strip"].places[0]
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(root / "left" / "3.png")
    assert any(f.check == "no-strip" for f in read(root, column_spec=VideoGeneration.column_spec).findings)
    (root / "left" / "3.png").write_bytes((root / "left" / "4.png").read_bytes())
    assert any(f.check == "duplicate" for f in read(root, column_spec=VideoGeneration.column_spec).findings)
    for i in range(5):
        (root / "left" / f"{i}.png").write_bytes(b"")
    with pytest.raises(BadData, match="5 of 220"):
        read(root, column_spec=VideoGeneration.column_spec)
    with pytest.raises(DataError, match="a video column"):
        asked("iris")


SHADES = {"dark": 0.4, "bright": 1.0}


def described(root, each=6):
    """Write strips of a dark or bright square that moves left or right, and a table of captions with what they say."""
    rows = ["video,caption,shade,way,camera"]
    for i in range(4 * each):
        shade, way = list(SHADES)[i // 2 % 2], ("left", "right")[i % 2]
        array = strip(root / "clips" / f"{i}.png", seed=i, step=1 if way == "right" else -1)
        Image.fromarray((array * SHADES[shade]).astype(np.uint8)).save(root / "clips" / f"{i}.png")
        rows.append(f"clips/{i}.png,a {shade} block moving {way},{shade},{way},{'ab'[i // 4 % 2]}")
    (root / "captions.csv").write_text("\n".join(rows))
    return root


def test_captions_in_two_formats(tmp_path):
    root = described(tmp_path / "videos")
    data, kind, _ = asked(root)
    assert kind is VideoGeneration and data.target.name == "caption" and data.required_target.kind == "text" and len(data) == 24
    task = kind.fit(kind.select_columns(data), kind.options_from({"vocab_size": 300}))
    dims = task.model_dims()
    assert (
        dims["vocab_size"] == task.text.size
        and dims["num_classes"] == 0
        and dims["frames"] == 5
        and dims["length"] == task.options.length
    )
    # Equal captions have equal shades and ways; cameras differ, so captions say nothing of them.
    assert task.attributes == {"shade": ["bright", "dark"], "way": ["left", "right"]}
    assert [m.name for m in task.metrics][-2:] == ["recognised_shade", "recognised_way"]
    assert [m.name for m in task.metrics][:-2] == [m.name for m in kind.metrics]
    batch = task.batches(data, find("latte")[0]).make(np.arange(4), None)
    assert batch["video"].shape == (4, 5, 1, 16, 16) and batch["label"].shape == (4, task.options.length)
    assert [task.decode_caption(row) for row in batch["label"].numpy()] == data.rows["caption"][:4].to_list()
    assert not task.tokens([""]).any()
    lines = [
        json.dumps({"file": f"clips/{i}.png", "prompt": text}) for i, text in enumerate(data.rows.sort("video")["caption"])
    ]
    (root / "list.jsonl").write_text("\n".join(lines))
    listed, *_ = asked(root / "list.jsonl")
    assert listed.columns["file"].kind == "video" and listed.target.name == "prompt" and len(listed) == 24
    assert kind.fit(kind.select_columns(listed), kind.options_from({})).attributes == {}


def test_video_files_with_captions(tmp_path):
    for i in range(4):
        filmed(tmp_path / "walks" / f"{i}.mp4", seed=i)
    (tmp_path / "captions.csv").write_text("\n".join(["name,caption", *(f"{i}.mp4,walk number {i % 2}" for i in range(4))]))
    data = read(tmp_path, column_spec=VideoGeneration.column_spec)
    assert [c.name for c in data.features("video")] == ["name"] and data.target.name == "caption" and len(data) == 4


def test_captions_that_occur_once_have_no_attributes(tmp_path):
    data, kind, _ = asked(described(tmp_path))
    unique = replace(data, rows=data.rows.with_columns(pl.col("caption") + pl.Series([f" {i}" for i in range(len(data))])))
    assert find_attributes(data, "caption").keys() == {"shade", "way"} and find_attributes(unique, "caption") == {}
    other = replace(data, rows=data.rows.with_columns(shade=pl.lit("grey")))
    task = kind.fit(kind.select_columns(data), kind.options_from({}))
    with pytest.raises(DataError, match="column 'shade' holds values that were not in the training data"):
        task.attribute_codes(other)
    assert task.attribute_codes(replace(data, rows=data.rows.drop("way"))) is None


def test_requests(tmp_path):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "b.png")
    one, two = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    plain = lambda sources: [(r.text, r.image) for r in read_requests(sources, "caption")]
    assert plain([]) == [] and plain(["x", "y"]) == [("x", ""), ("y", "")] and plain([one]) == [("", one)]
    assert plain(["x", one, "y", two]) == [("x", one), ("x", two), ("y", one), ("y", two)]
    assert plain([pl.DataFrame({"caption": ["x", None], "image": [None, two]})]) == [("x", ""), ("", two)]
    assert plain([{"caption": "x.png"}]) == [("x.png", "")]  # a text in a row is never a path
    (tmp_path / "list.csv").write_text("caption,image\nx,a.png\ny,\n,b.png\n")
    (tmp_path / "list.jsonl").write_text('{"caption": "x", "image": "a.png"}\n{"caption": "y"}\n{"image": "b.png"}\n')
    for name in ("list.csv", "list.jsonl"):
        assert plain([str(tmp_path / name)]) == [("x", one), ("y", ""), ("", two)]
    with pytest.raises(DataError, match=r"column 'prompt' .* Columns are: caption, image"):
        plain([{"prompt": "x"}])
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c\.png: not a readable image"):
        plain([str(tmp_path / "c.png")])
    task = VideoGeneration([], VideoGeneration.options_from({"first_frame": 0}))
    task.labels = ["left"]
    with pytest.raises(DataError, match="trained without given first frames"):
        task.read(["left", one])
    with pytest.raises(DataError, match="unknown class 'lift'"):
        task.read(["lift"])


def test_scores_of_captions():
    """A judge that knows the real videos: what it recognizes, of requests and of attributes."""
    task = VideoGeneration([], VideoGeneration.options_from({"first_frame": 0.25}))
    task.labels = []
    task.set_attributes({"size": ["big", "small"], "way": ["left", "right", "up"]})
    real = np.random.default_rng(0).uniform(-1, 1, (4, 3, 1, 8, 8)).astype(np.float32)
    task.judge, task.motion = generative.FeatureClassifier(1, 4).eval(), generative.FeatureClassifier(3, 4).eval()
    seen = np.array([[0, 0], [0, 1], [1, 2], [1, 0]])
    task.recognise = lambda videos: seen[: len(videos)]
    targets = {"real": real, "label": np.zeros((4, 2)), "attributes": np.array([[0, 0], [1, 1], [1, 2], [1, 1]])}
    still = np.repeat(real[:, :1], 3, 1)
    outputs = {"samples": real.copy(), "label": np.zeros((4, 2)), "continued": still, "next": real[:, -1]}
    scores = task.score(outputs, targets)
    assert scores["recognised_size"] == 0.75 and scores["recognised_way"] == 0.75 and scores["recognised"] == 0.5
    mean = np.mean([psnr(still[i, 1:], real[i, 1:]) for i in range(4)])
    assert (
        scores["continuation_psnr"] == pytest.approx(mean) and scores["next_frame_psnr"] > 99 and "caption_match" not in scores
    )
    ranges = task.intervals(outputs, targets)
    assert ranges.keys() == scores.keys() and ranges["recognised_size"][0] < 0.75 < ranges["recognised_size"][1]
    blind = task.score({**outputs, "samples": real.copy(), "blind": np.ones(4)}, targets)
    assert "frame_distance" not in blind and blind["recognised"] == 0.5
    task.recognise = lambda videos: np.repeat(seen, 2, 0)
    double = {"samples": np.repeat(real, 2, 0), "label": np.zeros((8, 2))}  # two videos for each caption
    assert task.score(double, targets)["recognised_size"] == 0.75


def test_video_distance_sees_motion():
    """Frames in another order have the same frame distance to the real videos, and a larger video distance."""
    rng = np.random.default_rng(0)
    steps = np.arange(6)[None, :, None] + rng.integers(0, 6, (60, 1, 1))
    real = -np.ones((60, 6, 1, 12, 12), dtype=np.float32)
    for i, f in np.ndindex(60, 6):
        real[i, f, 0, 4:7, steps[i, f, 0] : steps[i, f, 0] + 2] = 1
    one, other = torch.from_numpy(real[:30]), torch.from_numpy(real[30:])
    shuffled = other[:, [3, 0, 4, 1, 5, 2]]
    torch.manual_seed(0)
    judge, motion = generative.FeatureClassifier(1, 4).eval(), generative.FeatureClassifier(3, 4).eval()

    def compute(made):
        see = lambda x: generative.extract_features(judge, x.flatten(0, 1)).reshape(len(x), 6, -1)
        found = {"real": see(one), "made": see(made)}
        found |= {
            f"{k}_motion": generative.extract_features(motion, motion_image(x)) for k, x in (("real", one), ("made", made))
        }
        return compute_feature_scores(found)

    right, wrong = compute(other), compute(shuffled)
    assert wrong["frame_distance"] == pytest.approx(right["frame_distance"], rel=1e-4, abs=1e-6)
    assert wrong["video_distance"] > 2 * right["video_distance"]


def test_judge_of_several_attributes():
    rng = np.random.default_rng(0)
    label = rng.integers(0, (2, 3), (240, 2))
    images = torch.from_numpy(rng.normal(0, 0.1, (240, 1, 8, 8)).astype(np.float32))
    for i, (first, second) in enumerate(label):
        images[i, 0, :4] += (-1.0, 1.0)[first]
        images[i, 0, 4:, 3 * second : 3 * second + 2] += 1.0
    judge = generative.train_classifier(images[:200], torch.from_numpy(label[:200]), (2, 3), steps=60)
    assert (generative.classify_attributes(judge, images[200:], (2, 3)) == label[200:]).mean(0).min() > 0.9
    again = generative.load_state(judge.state_dict())
    torch.testing.assert_close(again(images), judge(images))


def test_evaluation_features():
    still = torch.rand(2, 1, 1, 8, 8).expand(2, 6, 1, 8, 8)
    seen = motion_image(still)
    assert seen.shape == (2, 3, 8, 8) and seen[:, 1:].abs().max() < 1e-6 and torch.equal(seen[:, 0], still[:, 0, 0])
    backwards = torch.rand(1, 6, 1, 8, 8)
    torch.testing.assert_close(motion_image(backwards)[:, 2], -motion_image(backwards.flip(1))[:, 2])
    features = np.random.default_rng(0).normal(size=(1, 4, 5))
    cosines = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(features[0, :-1], features[0, 1:])]
    assert mean_consistency(features) == pytest.approx(np.mean(cosines))
    assert psnr(np.zeros(4), np.full(4, 0.2)) == pytest.approx(-10 * np.log10(0.01))
    playing = Image.open(io.BytesIO(encode_webp(np.random.default_rng(0).uniform(-1, 1, (4, 1, 16, 16)))))
    assert playing.n_frames == 4 and playing.format == "WEBP"


def test_intervals_of_gaps_and_decibels():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, 400), rng.normal(0.4, 0.1, 300)
    low, high = gap_interval(a, b)
    wide = 1.96 * (0.01 / 400 + 0.01 / 300) ** 0.5
    assert (high - low) / 2 == pytest.approx(wide, rel=0.15) and low < abs(a.mean() - b.mean()) < high
    assert gap_interval(b, a) == pytest.approx((low, high), abs=0.005) and low > 0
    assert gap_interval(a, a[::-1])[0] == 0 and gap_interval(a, a[::-1])[1] < 0.02
    x, y = rng.uniform(-1, 1, (2, 5, 1, 4, 4))
    assert decibels(x, y) == pytest.approx([psnr(p, q) for p, q in zip(x, y)])


@pytest.mark.slow
def test_network_learns_to_generate_videos(tmp_path):
    run = fit(
        folder(tmp_path / "videos", 40),
        task="video-generation",
        model="latte-pixels-16",
        out=tmp_path / "run",
        settings={
            "steps": 60,
            "batch": 16,
            "precision": "float32",
            "evaluate": 30,
            "task.frames": 4,
            "model.dim": 64,
            "model.depth": 2,
            "ema": 0.9,
        },
    )
    others = {b["name"]: b["scores"] for b in run.record["scores"]["baselines"]}
    assert run.scores["frame_distance"] < 0.3 * others["noise"]["frame_distance"]
    assert (
        set(others["copy-last"]) == {"next_frame_psnr", "continuation_psnr"} and others["training videos"]["recognised"] > 0.9
    )
    made = run.outputs(
        read(tmp_path / "videos", column_spec=VideoGeneration.column_spec).take(np.arange(3))
    )  # asked one for one
    assert made["samples"].shape == (3, 4, 1, 16, 16) and len(made["label"]) == 3
    low, high = run.record["scores"]["intervals"]["recognised"]
    assert high - low < 0.25  # though the test part is of 8 films
    first = run.predict(["left"], count=2, steps=4)
    assert [a["class"] for a in first] == ["left", "left"] and first[0]["video"].suffix == ".webp"
    assert run.predict(["left"], count=1, steps=4)[0] == first[0]
    page = (run.path / "report.html").read_text()
    assert "data:image/webp" in page and "Next frame" in page and "nearest training videos" in page
    assert run.evaluate(tmp_path / "videos")["scores"] == pytest.approx(run.scores, rel=1e-4)
    with pytest.raises(SettingsError, match="sampler='magic'"):
        run.predict(["left"], sampler="magic")
    assert "copy-last" not in summarize_result(run.record, VideoGeneration.metrics[0])  # which has no such score
