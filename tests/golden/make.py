"""Makes the golden run folders of the present schema: python tests/golden/make.py

Run folders of every released schema are kept here and opened by tests/test_run.py, so what a user trained stays readable.
Make a folder once, when its schema is released; never make it anew to please a test.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from base64 import b64encode
from pathlib import Path

import polars as pl
from PIL import Image

import fieldguide
from fieldguide.core.media import Media
from fieldguide.core.run_record import SCHEMA
from fieldguide.data import samples
from fieldguide.tasks.vision import clip_encoder

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import diffusion_pipelines  # noqa: E402
from visual_chats import QUESTION, write_checkpoint, write_digits  # noqa: E402

QUICK = {"steps": 150, "precision": "float32", "batch": 32, "lr": 0.01, "ema": 0, "evaluate": 50}
SMALL_MASK_SET = {
    "model.backbone": "resnet",
    "model.block": "basic",
    "model.widths": (8, 8, 16, 16),
    "model.depths": (1, 1, 1, 1),
    "model.dim": 32,
    "model.hidden": 16,
    "model.decoder_hidden": 32,
    "model.queries": 10,
}
SMALL_STEM = {"model.stem_dims": (8,) * 5, "model.stem_kernels": (10, 8, 4, 4, 4), "model.stem_strides": (5, 4, 2, 2, 2)}
RUNS = {
    "tabular-classification": ("orders", "mlp-s", {"model.dim": 12, "model.embedding": 4}),
    "tabular-regression": ("diabetes", "mlp-s", {"model.dim": 12, "model.embedding": 4}),
    "image-classification": ("digits", "resnet20", {"model.widths": (4, 8), "model.depths": (1, 1)}),
    "text-classification": ("letters", "gru-s", {"model.dim": 8, "model.hidden": 8, "task.vocab": 320, "task.length": 16}),
    "keypoint-detection": ("puppets", "yolov8-pose-test", {"batch": 16, "task.side": 96}),
    "image-to-text": ("described", "blip-test", {"task.side": 16, "task.vocab": 300}),
    "instance-segmentation": ("shapes", "yolov8-seg-test", {"batch": 16, "task.side": 96}),
    "panoptic-segmentation": ("scenery", "mask2former-test", {"batch": 8, "task.side": 96, **SMALL_MASK_SET}),
    "image-compression": ("digits", "vqgan-test", {"model.dim": 12}),
    "image-to-image": ("outlines", "pix2pix-test", {"model.dim": 8, "task.adversarial": 0}),
    "audio-classification": ("words", "resnet20", {"model.widths": (4, 8), "model.depths": (1, 1)}),
    "speech-pretraining": (
        "utterances",
        "hubert-test",
        {"batch": 16, "task.objective": "clusters", "task.clusters": 12, **SMALL_STEM},
    ),
    "anomaly-detection": ("pumps", "conv-autoencoder-test", {"task.length": 16}),
    "anomaly-detection-in-images": ("fabric", "patchcore-test", {"task.side": 24, "model.memory": 40}),
    "text-embedding": ("helpdesk", "bert-test", {"task.vocab_size": 320, "task.length": 24}),
    "reranking": ("shortlist", "bert-test", {"task.vocab_size": 320, "task.length": 48}),
    "preference-tuning": ("replies", "gpt2-test", {"task.vocab_size": 320, "task.length": 48}),
    "text-to-image": ("described", "auto", {"batch": 8, "lora_rank": 2}),
    "image-text-to-text": ("messages", "auto", {"batch": 16, "finetune": "whole", "keep_frozen": False}),
    "video-generation": ("narrated", "latte-pixels-16", {"model.dim": 12, "model.depth": 2, "model.words": 8}),
    "image-generation-of-embeddings": ("described", "ddpm-unet-test", {"task.unclip": "clip", "task.side": 8, "model.dim": 4}),
    "time-series-classification": ("motions", "inceptiontime-test", {"model.lengths": (10, 5)}),
}
KINDS = {  # name of a run -> task, if they differ
    "anomaly-detection-in-images": "anomaly-detection",
    "image-generation-of-embeddings": "image-generation",
}
ASKED = {
    "image-generation-of-embeddings": {"count": 1, "steps": 3, "prior_steps": 3},
    "image-text-to-text": {"prompt": QUESTION, "max_new_tokens": 8},
    "preference-tuning": {"max_new_tokens": 8, "temperature": 0.0},
    "text-to-image": {"steps": 3},
    "video-generation": {"count": 1, "steps": 4, "sampler": "ddim"},
}  # prediction options
MAX_IMAGE_BYTES = 6000
LARGE = "preprocess/matcher.safetensors"  # of captions, which only evaluations use; left out
KEPT = ("run.json", "model.safetensors", "prior.safetensors", "preprocess", "splits.npz", "metrics.jsonl")


def letters(file: Path) -> Path:
    """Texts of our own, about the weather or about cooking; the sample of docstrings belongs to its libraries."""
    weather, kitchen = ("rain", "storm", "sunshine", "fog"), ("soup", "bread", "salad", "coffee")
    when = ("This morning", "Yesterday", "On Friday", "After lunch", "Late at night")
    rows = [
        (f"{w} there was {how} {thing}{end}", topic)
        for topic, things in (("weather", weather), ("kitchen", kitchen))
        for thing in things
        for w in when
        for how in ("some", "little", "plenty of")
        for end in (".", ", we hear.")
    ]
    pl.DataFrame(rows, schema=["text", "topic"], orient="row").write_csv(file)
    return file


def messages(file: Path) -> Path:
    """Conversations about digits, next to a tiny network that answers them."""
    write_checkpoint(file.parent / "checkpoint")
    return write_digits(file.parent)


def write_pipeline(folder: Path) -> None:
    """Write a tiny pipeline of diffusers."""
    narrow = {"block_out_channels": (4, 8), "norm_num_groups": 2}
    made = diffusion_pipelines.stable_diffusion(**narrow)
    made.register_modules(vae=diffusion_pipelines.autoencoder(**narrow))
    made.save_pretrained(folder)


def write_clip(home: Path, out: Path) -> None:
    """Train a tiny CLIP, between whose embeddings a tiny prior will generate."""
    tiny = {"model.dim": 8, "model.text_dim": 8, "model.embed": 10, "model.depth": 1, "model.patch": 4, "model.heads": 2}
    settings = {**QUICK, **tiny, "steps": 30, "task.side": 8, "task.vocab_size": 300, "task.length": 8, "augmentation": "none"}
    fieldguide.fit(home, task="image-text", model="clip-mini", out=out, settings=settings)
    clip_encoder.PRIOR = "unclip-prior-test"


def orders(file: Path) -> Path:
    """A table of our own with every kind of column, and values missing in each."""
    rng = random.Random(0)
    rows = []
    for i in range(240):
        colour, day = rng.choice(["red", "green", "blue", None]), f"2024-{i % 12 + 1:02d}-{i % 28 + 1:02d}"
        size = None if i % 17 == 0 else round(rng.gauss(10, 2), 2)
        rows.append(
            (
                size,
                colour,
                None if i % 19 == 0 else day,
                rng.random() < 0.5,
                "late" if i % 12 > 6 or colour == "red" else "in time",
            )
        )
    pl.DataFrame(rows, schema=["size", "colour", "day", "gift", "arrived"], orient="row").write_csv(file)
    return file


def inputs(task: str, home: Path, folder: Path) -> list[str]:
    """A few raw inputs, stored beside the answers that they got."""
    if task in (
        "image-classification",
        "anomaly-detection-in-images",
        "keypoint-detection",
        "instance-segmentation",
        "panoptic-segmentation",
        "image-to-text",
        "image-text-to-text",
        "image-to-image",
        "image-compression",
    ):
        place, each = (home, 300) if home.is_dir() else (home.parent, 12)
        chosen = sorted(p for p in place.rglob("*.png") if not {"annotations", "B", "ground_truth"} & set(p.parts))[::each]
        names = [f"image-{i}.png" for i in range(len(chosen))]
        for path, name in zip(chosen, names):
            shutil.copy(path, folder / name)
        return names
    if task in ("text-to-image", "image-generation-of-embeddings"):
        return ["a cat", "the dog of a cat"]
    if task in ("audio-classification", "speech-pretraining"):
        chosen = sorted(home.rglob("*.wav"))[::300]
        names = [f"recording-{i}.wav" for i in range(len(chosen))]
        for path, name in zip(chosen, names):
            shutil.copy(path, folder / name)
        return names
    if task == "time-series-classification":
        columns = ["series", "step", "channel_1", "channel_2"]
        rows = fieldguide.data.read(home).rows.filter(pl.col("series").cast(pl.Int64) % 150 == 1)
        rows = rows.with_columns(("recording " + pl.col("series")).alias("series"))
        rows.select(columns).write_csv(folder / "inputs.csv")
        return ["inputs.csv"]
    if task == "video-generation":
        with Image.open(home / "clips" / "0000.png") as strip:
            strip.crop((0, 0, strip.height, strip.height)).save(folder / "image-0.png")
        asked = {"caption": ["a seven moving left", "a two moving up"], "image": ["image-0.png"] * 2}
        pl.DataFrame(asked).write_csv(folder / "inputs.csv")
        return ["inputs.csv"]
    rows = pl.read_csv(home, infer_schema=False)
    if task == "anomaly-detection":
        rows[2540:2580].select(rows.columns[:-1]).write_csv(folder / "inputs.csv")
        return ["inputs.csv"]
    if task == "preference-tuning":
        rows[::300].select("prompt").write_csv(folder / "inputs.csv")
        return ["inputs.csv"]
    if task == "text-embedding":
        rows[::300].select(text="passage").write_csv(folder / "inputs.csv")
        return ["inputs.csv"]
    rows[:: len(rows) // 6].select(rows.columns[:-1]).write_csv(folder / "inputs.csv")
    return ["inputs.csv"]


def remove_root(folder: Path, home: Path) -> None:
    """Make the paths of shown examples in the task's state relative to the sample's folder, and correct the digest."""
    file, run = folder / "preprocess" / "task.json", folder / "run.json"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text(encoding="utf-8").replace(f"{home.parent}/", ""), encoding="utf-8")
    run.write_text(run.read_text().replace(before, hashlib.sha256(file.read_bytes()).hexdigest()))


def drop_large(folder: Path, record: dict) -> None:
    """Remove a large file that predictions do not need, and its digest."""
    (folder / LARGE).unlink(missing_ok=True)
    record["digests"].pop(LARGE, None)


def keeps(value: object) -> bool:
    """Return whether a value is compared: all but large images, which other tests compare."""
    return not isinstance(value, Media) or value.suffix == ".webp" or len(value.content) < MAX_IMAGE_BYTES


def shorten(value: object) -> object:
    """Return a value as JSON."""
    return {"media": value.suffix, "base64": b64encode(value.content).decode()} if isinstance(value, Media) else value


def main() -> None:
    for task in sys.argv[1:] or RUNS:
        sample, model, settings = RUNS[task]
        folder = HERE / f"v{SCHEMA}-{task}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with tempfile.TemporaryDirectory() as work:
            made = {"letters": letters, "orders": orders, "messages": messages}.get(sample)
            home = made(Path(work) / f"{sample}.csv") if made else samples.path(sample)
            names = inputs(task, home, folder)
            weights = Path("checkpoint") if task in ("image-text-to-text", "text-to-image") else None
            os.chdir(work)  # the run holds the path of its checkpoint
            if task == "text-to-image":
                write_pipeline(weights)
            if task == "image-generation-of-embeddings":
                write_clip(home, Path("clip"))
            told = {**QUICK, **settings}
            run = fieldguide.fit(
                home, task=KINDS.get(task, task), model=model, out=Path(work) / "run", settings=told, weights=weights
            )
            for name in KEPT:
                if (run.path / name).is_dir():
                    shutil.copytree(run.path / name, folder / name)
                elif (run.path / name).is_file():  # models that are fitted without steps have no metrics.jsonl
                    shutil.copy(run.path / name, folder / name)
        if (file := folder / "metrics.jsonl").is_file():
            scored = [x for x in file.read_text().splitlines(True) if "scores" in x]
            file.write_text("".join(scored))  # the losses would be half of the folder
        remove_root(folder, home)
        record = json.loads((folder / "run.json").read_text())
        if task == "image-generation-of-embeddings":
            drop_large(folder, record)
        record["data"] |= {"root": sample, "source": sample}  # no path of the machine that made it
        record["request"]["data"] = sample
        if record["request"].get("weights"):
            record["request"]["weights"] = "checkpoint"
        (folder / "run.json").write_text(json.dumps(record, indent=1))
        sources = [str(folder / n) if (folder / n).exists() else n for n in names]
        answers = fieldguide.open_run(folder).predict(sources, **ASKED.get(task, {}))
        plain = lambda answer: {k: shorten(v) for k, v in answer.items() if k != "input" and keeps(v)}
        expected = {"inputs": names, "answers": [plain(a) for a in answers]}
        expected |= {"asked": ASKED[task]} if task in ASKED else {}
        (folder / "expected.json").write_text(json.dumps(expected, indent=1))
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        print(f"{folder.name}: {size / 1024:.0f} KiB, {run.scores}")


if __name__ == "__main__":
    main()
