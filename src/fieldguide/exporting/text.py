"""Graphs of tasks that read texts: token ids -> classes, tags of words, spans of answers. Texts are tokenized outside the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fieldguide.core.signature import TensorSpec
from fieldguide.core.words import WORD
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.graph import Graph, PassTensors, build_pipeline
from fieldguide.exporting.supervised import finish
from fieldguide.metrics.entities import parse_tags
from fieldguide.tasks.text.windows import PairTemplate, pair_template

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

FRAME_PARTS = ("before", "between", "behind", "segments")
TOKENIZER: dict[str, Any] = {"requires": ("tokenizers",), "files": ("tokenizer.json",)}


def build_text_classification(predictor: TaskPredictor) -> Graph:
    """Return the graph of text classification: token ids."""
    task: Any = predictor.task
    around, template = bool(predictor.card.has_class_token), None
    if around or task.second:
        template = PairTemplate((), (task.text.sep,), ())
        if around:
            single = PairTemplate((task.text.cls,), (), (task.text.sep,))
            template = pair_template(task.text) if task.second else single
    inputs, values = describe_texts(predictor, template)
    front, parts = (
        PassTensors([spec.name for spec in inputs]),
        ("tokens", "padded", "classes", "to_text", "texts", "text_classes"),
    )
    return finish(predictor, front, inputs, parts=parts, values=values, **TOKENIZER)


def describe_texts(predictor: TaskPredictor, template: PairTemplate | None) -> tuple[tuple[TensorSpec, ...], dict[str, Any]]:
    """Return the inputs of a network that reads a text, or two in a frame of special tokens, and what the program needs for them."""
    task: Any = predictor.task
    objective: Any = predictor.objective
    specs = {spec.name: spec for spec in predictor.signature.forward_tensors}
    frame = None if template is None else {name: list(getattr(template, name)) for name in FRAME_PARTS}
    values = {
        "columns": [name for name in (task.column, task.second) if name],
        "inputs": list(objective.inputs),
        "frame": frame,
        "length": task.options.length,
        "pad": task.text.pad,
        "unknown": task.text.unknown,
        "missing": MISSING_MARKERS,
    }
    return tuple(specs[name] for name in objective.inputs), values


class Probability(nn.Module):
    """Turn logits of pairs into scores: probabilities if the loss was pointwise."""

    def __init__(self, pointwise: bool):
        super().__init__()
        self.pointwise = pointwise

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logit = outputs["logit"].float()
        return {"logit": logit, "score": logit.sigmoid() if self.pointwise else logit}


def build_reranking(predictor: TaskPredictor) -> Graph:
    """Return the graph of reranking: the token ids of a query with a passage -> its score. Ranks are made outside the graph."""
    task: Any = predictor.task
    inputs, values = describe_texts(predictor, task.frame)
    compute: Callable[[Any], Any] = lambda network: lambda batch: {"logit": network.compute_logits(batch)}
    outputs, back = ("score", "logit"), Probability(task.options.loss == "pointwise")
    module = build_pipeline(predictor, PassTensors([spec.name for spec in inputs]), back, outputs, compute)
    return Graph(module, inputs, outputs, ("tokens", "padded", "to_text", "texts", "ranks"), values, **TOKENIZER)


def build_text_vectors(predictor: TaskPredictor) -> Graph:
    """Return the graph of embeddings: token ids -> a vector of length 1."""
    task: Any = predictor.task
    specs = {spec.name: spec for spec in predictor.signature.forward_tensors}
    inputs = (specs["tokens"], specs["mask"])
    values = {
        "prompts": task.prompts,
        "length": task.max_tokens,
        **{name: getattr(task.text, name) for name in ("cls", "sep", "pad")},
    }
    module = build_pipeline(predictor, PassTensors(["tokens", "mask"]), nn.Identity(), ("vector",))
    return Graph(module, inputs, ("vector",), ("tokens", "padded", "vectors"), values, **TOKENIZER)


class NameTags(nn.Module):
    """Rename the number of each word's tag to `code`."""

    def forward(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"code": outputs["label"], "probability": outputs["probability"]}


def build_token_classification(predictor: TaskPredictor) -> Graph:
    """Return the graph of token classification: token ids and the place of each word -> a tag for each word."""
    task: Any = predictor.task
    objective: Any = predictor.objective
    specs = {spec.name: spec for spec in predictor.signature.tensors}
    names = [name for name in (*objective.inputs, "words") if name in specs]
    letters, kinds, types = parse_tags(task.tags)
    values = {
        "column": task.column,
        "inputs": names,
        "tags": task.tags,
        "letters": letters.tolist(),
        "kinds": kinds.tolist(),
        "types": types,
        "outside": "O" if "O" in task.tags else "",
        "length": task.options.length,
        **{name: getattr(task.text, name) for name in ("cls", "sep", "pad", "unknown")},
    }
    outputs = ("code", "probability")
    module = build_pipeline(predictor, PassTensors(names), NameTags(), outputs)
    return Graph(module, tuple(specs[name] for name in names), outputs, ("tokens", "padded", "words"), values, **TOKENIZER)


def build_question_answering(predictor: TaskPredictor) -> Graph:
    """Return the graph of question answering: the token ids of a window -> its best span, with log-probabilities."""
    task: Any = predictor.task
    objective: Any = predictor.objective
    specs = {spec.name: spec for spec in predictor.signature.tensors}
    names = [name for name in (*objective.inputs, "answerable") if name in specs]
    values = {
        "columns": [task.options.context, task.options.question],
        "inputs": names,
        "frame": {name: list(getattr(task.frame, name)) for name in FRAME_PARTS},
        "length": task.options.length,
        "stride": task.options.stride,
        "longest": task.options.longest,
        "question": task.max_question_tokens,
        "pad": task.text.pad,
        "threshold": task.threshold if task.silent else None,
        "word": WORD.pattern if task.whole else "",
    }
    outputs = ("place", "score", "none")
    # Windows of one question are joined by the program: a graph has no rows of rows.
    find_spans: Callable[[Any], Any] = lambda network: network.find_best_spans
    module = build_pipeline(predictor, PassTensors(names), nn.Identity(), outputs, find_spans)
    files = TOKENIZER | {"requires": ("tokenizers", "regex")}
    return Graph(module, tuple(specs[name] for name in names), outputs, ("tokens", "padded", "answers"), values, **files)
