"""Graphs of encoder-decoders: the encoder, and one step of the decoder with its cache. The program searches with beams."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fieldguide.core.signature import Axis, TensorSpec
from fieldguide.data.text_values import MISSING_MARKERS
from fieldguide.exporting.generation import GrowingCache
from fieldguide.exporting.graph import BATCH, ExportError, Graph
from fieldguide.models.transformer._shared.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor


class EncoderStep(nn.Module):
    """Return the keys and values of a source for all layers of the decoder, layers B heads S d."""

    def __init__(self, network: EncoderDecoder):
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        pairs, _ = self.network.encode_source(inputs[0], None)
        return torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs])


class DecoderStep(nn.Module):
    """Return the log-probabilities of the next token, B vocab, and all keys and values, layers B heads T d."""

    def __init__(self, network: EncoderDecoder):
        super().__init__()
        self.network = network
        network.check_length = lambda *rest: None  # type: ignore[method-assign]  # the program never exceeds it

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens, keys, values, cross_keys, cross_values = inputs
        cache = GrowingCache(keys, values)
        cache.cross = list(zip(cross_keys, cross_values)), None
        logits = self.network.last(tokens, None, cache)
        return logits.float().log_softmax(-1), torch.stack(cache.keys), torch.stack(cache.values)


def build_translation(predictor: TaskPredictor) -> Graph:
    """Return the step graph of an encoder-decoder, with the graph of its encoder. Raises `ExportError` for recurrent ones."""
    task: Any = predictor.task
    network: Any = predictor.objective.model
    if not isinstance(network, EncoderDecoder):
        raise ExportError(f"{predictor.name} is no Transformer; encoder-decoders of other kinds have no step graph yet.")
    network = copy.deepcopy(network).eval().requires_grad_(False).float().cpu()
    frame, text, options = task.frame, task.text, task.PredictOptions()
    if text.target is not None:
        raise ExportError("run.py knows one tokenizer, but this model has another one for its targets. Use --to huggingface.")
    cache = network.new_cache(1, 1)
    heads, width, layers, most = cache.keys[0].shape[1], cache.keys[0].shape[3], len(cache.keys), task.options.length
    block = lambda name, axis: TensorSpec(
        name, "float32", (Axis("layers", layers), BATCH, Axis("heads", heads), axis, Axis("width", width))
    )
    words = Axis("source_tokens", most=max(most // 2, 1))
    past, steps = Axis("past", most=max(most // 2, 1)), Axis("steps", most=max(most // 2, 1))
    ids = lambda name, axis: TensorSpec(name, "int64", (BATCH, axis), low=0, high=text.size - 1)
    encoder = Graph(EncoderStep(network), (ids("source", words),), ("cross_keys", "cross_values"), parts=())
    inputs = (
        ids("tokens", steps),
        block("keys", past),
        block("values", past),
        block("cross_keys", words),
        block("cross_values", words),
    )
    limits = task.for_request(options).limits(torch.arange(most + 1)).clamp(max=most - len(frame.target_start))
    values = {
        "column": task.column,
        "missing": MISSING_MARKERS,
        "limits": limits.tolist(),  # tokens of an answer, by the number of tokens of the source
        "prefix": task.options.prefix,
        "before": list(frame.before),
        "after": list(frame.after),
        "start": list(frame.target_start),
        "end": frame.end,
        "unknown": text.unknown,
        "exact": bool(task.options.tokenizer),
        "length": most,
        "beams": options.effective_beams,
        "length_penalty": options.length_penalty,
        "shape": [layers, heads, width],
    }
    return Graph(
        DecoderStep(copy.deepcopy(network)),
        inputs,
        ("log_probabilities", "keys_after", "values_after"),
        ("tokens", "to_text", "beams"),
        values,
        requires=("tokenizers",),
        files=("tokenizer.json",),
        loop=asdict(predictor.signature.loop) if predictor.signature.loop else {},
        encoder=encoder,
    )
