"""Train what users of another library would: its usual recipe, for the same minutes, on the same rows, with the same test rows.

    python benchmarks/peers.py autogluon|timm|transformers|statsforecast PATH MINUTES [OPTIONS as JSON]

Prints a JSON object with the scores. Validation rows are given to the peers for training, as they have no use for them. No public
weights are used, as `fit` uses none unless it is told to. Time is that of training; reading and scoring come on top.

- autogluon: `TabularPredictor` with its default preset.
- timm: ResNet-18 with timm's own transforms for training, AdamW with weight decay .05, a learning rate of 1e-3 with warmup and
  cosine decay, batches of 64. Small images keep their size (at least 32 pixels), others have 128 pixels.
- transformers: BERT with 4 layers of 256 (BERT mini) and a WordPiece vocabulary of 8,000 that is trained on the texts; AdamW, 5e-4
  with linear decay, batches of 32.
- statsforecast: AutoETS with the season of the data, fitted to at most 2,000 steps before a window; as many test windows, drawn at
  random, as fit in the time.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from common import HERE  # noqa: F401  # finds the module `tv` of the tests

import fieldguide
from fieldguide.data.splits import split

MAX_STEPS = 2000  # before a window, to which statsforecast fits


class Clock:
    """The time that a recipe has, and a learning rate that follows it."""

    def __init__(self, minutes: float, warmup: float = 0.05):
        self.seconds, self.warmup, self.begun = 60 * minutes, warmup, time.monotonic()

    @property
    def share(self) -> float:
        """The fraction of the time that has passed."""
        return (time.monotonic() - self.begun) / self.seconds

    def factor(self, cosine: bool) -> float:
        """Return the learning rate as a fraction of the highest."""
        share = min(1.0, self.share)
        if share < self.warmup:
            return max(share / self.warmup, 0.01)
        left = (1 - share) / (1 - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * (1 - left))) if cosine else left


def draw_batches(count: int, batch: int, clock: Clock) -> Iterator[np.ndarray]:
    """Yield shuffled row numbers until the time is over."""
    rng = np.random.default_rng(0)
    while clock.share < 1:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            if clock.share >= 1:
                return
            yield order[start : start + batch]


def read_parts(path: str, options: dict[str, Any]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Return the data, the rows for training, and those of the test."""
    data = fieldguide.read(path, **{name: value for name, value in options.items() if name == "target"})
    parts = split(data, seed=0)
    return data, np.concatenate([parts.train, parts.validation]), parts.test


def run_autogluon(path: str, minutes: float, options: dict[str, Any]) -> dict[str, Any]:
    """Fit AutoGluon's default."""
    from autogluon.tabular import TabularPredictor

    data, train, test = read_parts(path, options)
    rows, target = data.rows.to_pandas(), options["target"]
    with tempfile.TemporaryDirectory() as folder:
        predictor = TabularPredictor(target, path=folder, verbosity=0).fit(rows.iloc[train], time_limit=60 * minutes)
        found = predictor.evaluate(rows.iloc[test], auxiliary_metrics=True)
    return {name: float(value) for name, value in found.items()}


def run_timm(path: str, minutes: float, options: dict[str, Any]) -> dict[str, Any]:
    """Train timm's ResNet-18 on images in folders."""
    import torch
    from PIL import Image

    from tv import timm

    data, train, test = read_parts(path, options)
    paths, labels = data.rows["image"].to_list(), data.rows["label"].to_list()
    classes = sorted(set(labels))
    number = {name: i for i, name in enumerate(classes)}
    with Image.open(paths[0]) as first:
        side = 128 if max(first.size) > 64 else max(32, *first.size)
    augment = timm.data.create_transform(side, is_training=True, color_jitter=0.4, hflip=0.5, scale=(0.35, 1.0))
    plain = timm.data.create_transform(side, is_training=False, crop_pct=1.0)

    def load(rows: np.ndarray, transform: Callable[[Any], Any]) -> Any:
        return torch.stack([transform(Image.open(paths[i]).convert("RGB")) for i in rows])

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=len(classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps, clock = 0, Clock(minutes)
    for batch in draw_batches(len(train), 64, clock):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * clock.factor(cosine=True)
        rows = train[batch]
        loss = torch.nn.functional.cross_entropy(
            model(load(rows, augment)), torch.tensor([number[labels[i]] for i in rows]), label_smoothing=0.1
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    model.eval()
    with torch.inference_mode():
        found = [model(load(test[i : i + 256], plain)).argmax(1) for i in range(0, len(test), 256)]
    wanted = torch.tensor([number[labels[i]] for i in test])
    return {"accuracy": float((torch.cat(found) == wanted).float().mean()), "steps": steps}


def run_transformers(path: str, minutes: float, options: dict[str, Any]) -> dict[str, Any]:
    """Train a small BERT of transformers on texts."""
    import torch
    from tokenizers import BertWordPieceTokenizer

    from tv import transformers

    data, train, test = read_parts(path, options)
    text = next(column.name for column in data.columns.values() if column.kind == "text")
    texts, labels = data.rows[text].to_list(), data.rows[data.target.name].to_list()
    classes = sorted(set(labels))
    number = {name: i for i, name in enumerate(classes)}
    tokenizer = BertWordPieceTokenizer()
    tokenizer.train_from_iterator([texts[i] for i in train], vocab_size=8000, show_progress=False)
    tokenizer.enable_truncation(256)
    encoded = [row.ids for row in tokenizer.encode_batch(texts)]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=len(classes),
    )
    model = transformers.BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)

    def load(rows: np.ndarray) -> dict[str, Any]:
        longest = max(len(encoded[i]) for i in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for place, i in enumerate(rows):
            tokens[place, : len(encoded[i])] = torch.tensor(encoded[i])
            mask[place, : len(encoded[i])] = 1
        return {"input_ids": tokens, "attention_mask": mask}

    steps, clock = 0, Clock(minutes)
    model.train()
    for batch in draw_batches(len(train), 32, clock):
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * clock.factor(cosine=False)
        rows = train[batch]
        loss = model(**load(rows), labels=torch.tensor([number[labels[i]] for i in rows])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    model.eval()
    with torch.inference_mode():
        order = sorted(test, key=lambda i: len(encoded[i]))
        found = {
            row: int(label)
            for i in range(0, len(order), 64)
            for row, label in zip(order[i : i + 64], model(**load(np.array(order[i : i + 64]))).logits.argmax(1))
        }
    return {"accuracy": float(np.mean([classes[found[i]] == labels[i] for i in test])), "steps": steps}


def run_statsforecast(path: str, minutes: float, options: dict[str, Any]) -> dict[str, Any]:
    """Forecast test windows by statsforecast's AutoETS."""
    from statsforecast.models import AutoETS

    from fieldguide.data.timeseries.windows import CUT, SERIES
    from fieldguide.tasks import tasks

    kind = tasks()["time-series-forecasting"]
    data = kind.build_examples(kind.select_columns(fieldguide.read(path, column_spec=kind.column_spec)), kind.options_from({}))
    parts, found, settings = split(data, seed=0), data.context.panel, data.context.options
    task, clock, values, tested = kind.fit(data, kind.options_from({})), Clock(minutes), [], []
    for row in np.random.default_rng(0).permutation(parts.test):
        if clock.share >= 1:
            break
        series, cut = int(data.rows[SERIES][int(row)]), int(data.rows[CUT][int(row)])
        before = found.filled[max(int(found.low[series]), cut - MAX_STEPS) : cut, found.column[series]]
        values.append(AutoETS(season_length=settings.season).forecast(before.astype(float), h=settings.horizon)["mean"])
        tested.append(int(row))
    chosen = data.take(np.array(tested))
    targets = task.targets(chosen)
    scaled = (np.array(values) - targets["mean"][:, None]) / targets["std"][:, None]
    scores = task.aggregate(task.window_errors({"values": scaled[:, :, None, None]}, targets))
    return {**{name: float(value) for name, value in scores.items()}, "windows": len(tested)}


RECIPES: dict[str, Callable[[str, float, dict[str, Any]], dict[str, Any]]] = {
    "autogluon": run_autogluon,
    "timm": run_timm,
    "transformers": run_transformers,
    "statsforecast": run_statsforecast,
}

if __name__ == "__main__":
    name, path, minutes, *rest = sys.argv[1:]
    print(json.dumps(RECIPES[name](path, float(minutes), json.loads(rest[0]) if rest else {})))
