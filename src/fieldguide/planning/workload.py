"""A typical step of an architecture: its objective and a batch, as the task for its output type builds them.

Floating-point tensors may be on the meta device, where they take no memory. Integer tensors of ordinary sizes are real,
because their values decide how much work there is (padding, experts, masked tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.core.card import SAMPLES_PER_FRAME, Card
from fieldguide.core.settings import Settings
from fieldguide.models import registry
from fieldguide.models.initialization import make_on_meta
from fieldguide.objectives import (
    CTC,
    Classification,
    Diffusion,
    Forecast,
    MaskedLM,
    NextToken,
    Objective,
    Regression,
    SpanPrediction,
    Supervised,
    TokenClassificationObjective,
)
from fieldguide.objectives.adversarial import build_adversarial as build_gan
from fieldguide.objectives.contrastive import IMAGE_TEXT_OBJECTIVES, build_contrastive
from fieldguide.objectives.contrastive_frames import DISTRACTORS, ContrastiveFrames, sample_distractors
from fieldguide.objectives.detection import decode
from fieldguide.objectives.detectors import DETECTORS
from fieldguide.objectives.hidden_frames import sample_hidden_frames
from fieldguide.objectives.image_translation import PairedTranslation, TranslationDiffusion
from fieldguide.objectives.mask_set import MaskSetInstances
from fieldguide.objectives.masked_clusters import MaskedClusters
from fieldguide.objectives.pose_detection import PoseDetection
from fieldguide.objectives.prototype_masks import PrototypeDetection
from fieldguide.objectives.recommenders import RECOMMENDERS
from fieldguide.objectives.segmentation import Segmentation
from fieldguide.planning.trace import MAX_KNOWN_VALUES

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BOXES_PER_IMAGE = 8
MASKED_SHARE = 0.15  # of the tokens in masked language modeling
SYMBOLS_PER_FRAME = 0.1  # of a transcript


@dataclass
class Workload:
    """An objective, a batch for it, and how it predicts. `calls` is the number of calls of `predict` for one prediction."""

    objective: Objective
    batch: dict[str, Tensor]
    predict: Callable[[Any, dict[str, Tensor]], Any] = lambda objective, batch: objective.outputs(batch)
    calls: int = 1
    labels: tuple[str, ...] = field(default=())  # tensors that only training has


class MeanSquare(Objective):
    """Mean square of a network's output: stands for the loss of a network that has no objective of its own."""

    def __init__(self, model: nn.Module, inputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs = model, tuple(inputs)

    def forward(self, batch: dict[str, Tensor], phase: str = "train") -> dict[str, Tensor]:
        return {"loss": self.outputs(batch)["values"].square().mean()}

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"values": self.model(*(batch[name] for name in self.inputs)).float()}


@dataclass(frozen=True)
class Shape:
    """The sizes of a batch, for axes that the config leaves open."""

    batch: int = 1
    length: int = 64
    side: int = 224
    device: str = "meta"  # of floating-point tensors


def build_network(card: Card, config: Any, device: str = "meta") -> nn.Module:
    if device == "meta":
        return make_on_meta(card, config)
    with torch.device(device):
        return card.make(config)


def build_workload(card: Card, config: Any, shape: Shape, network: nn.Module | None = None) -> Workload:
    """Return the training objective and a batch of an architecture.

    `network` is an existing network of this config; by default one is made on `shape.device`.
    """
    network = build_network(card, config, shape.device) if network is None else network

    def get(word: str, default: Any = None) -> Any:
        return getattr(config, card.names.get(word, word), default)

    inputs = build_inputs(card, config, shape)
    output: str = get("output_type") if get("output_type") in card.output_types else card.output_types[0]
    return BUILDERS.get(output, build_mean_square)(card, network, inputs, shape, get)


def build_inputs(card: Card, config: Any, shape: Shape) -> dict[str, Tensor]:
    """Return the inputs of a network by name. The sizes are those of the config where it has them."""

    def get(word: str, default: Any) -> Any:
        value = getattr(config, card.names.get(word, word), None)
        return default if value is None else value

    rows, device = shape.batch, shape.device
    side, channels = get("image", shape.side), get("channels", 3)
    length = shape.length if card.endless else min(shape.length, get("length", shape.length))
    floats = lambda *sizes: torch.randn(rows, *sizes) if device != "meta" else torch.empty(rows, *sizes, device="meta")
    vocabulary = get("vocab_size", 0) or get("items", 0) or 2
    place = lambda width: "meta" if device == "meta" and rows * width > MAX_KNOWN_VALUES else "cpu"
    whole = lambda width: torch.ones(rows, width, dtype=torch.bool, device=place(width))
    text = lambda width: torch.randint(1, max(vocabulary, 2), (rows, width), device=place(width))
    if card.input_type == "image":
        return {"image": floats(channels, side, side)}
    if card.input_type == "tokens":
        return {"tokens": text(length), "mask": whole(length)}
    if card.input_type == "pair":
        return {"source": text(length), "source_mask": whole(length), "tokens": text(length), "mask": whole(length)}
    if card.input_type == "items":
        return {"items": text(length), "mask": whole(length)}
    if card.input_type == "table":
        categories = [torch.randint(1, max(size, 2), (rows,)) for size in get("categories", ())]
        codes = torch.stack(categories, 1) if categories else torch.zeros(rows, 0, dtype=torch.int64)
        return {"numbers": floats(get("numbers", 8)), "categories": codes}
    if card.input_type == "sequence":
        return {"sequence": floats(shape.length, get("dim", None) or get("d_model", 64))}
    if card.input_type == "series":
        return {"series": floats(get("length", shape.length), get("channels", 1))}
    if card.input_type in ("covariates", "static-covariates"):
        past, horizon = get("length", shape.length), get("horizon", 1)
        inputs = {
            "series": floats(past, get("channels", 1)),
            "past": floats(past, get("past", 0)),
            "known": floats(past + horizon, get("known", 0)),
            "static": floats(get("static", 0)),
        }
        return {name: inputs[name] for name in card.inputs}
    if card.input_type == "speech":
        return {"features": floats(shape.length, get("features", 80)), "lengths": torch.full((rows,), shape.length)}
    if card.input_type == "waveform":
        samples = SAMPLES_PER_FRAME * shape.length
        return {"waveform": floats(samples), "lengths": torch.full((rows,), samples)}
    if card.input_type == "speech-text":
        frames = 2 * get("source_length", shape.length)
        return {"features": floats(frames, get("features", 80)), "tokens": text(length), "mask": whole(length)}
    if card.input_type == "image-text":
        return {"image": floats(channels, side, side), "tokens": text(length), "mask": whole(length)}
    if card.input_type == "prompted-image":
        labels = torch.ones(rows, 1, 2, dtype=torch.int64, device="meta" if device == "meta" else "cpu")
        return {"image": floats(channels, side, side), "points": floats(1, 2, 2), "point_labels": labels}
    if card.input_type == "captioned":
        return {"image": floats(channels, side, side), **build_caption(get, rows, length, text, whole)}
    if card.input_type == "noisy-target":
        return {"target": floats(get("outputs", 3), side, side), "time": floats(), "image": floats(channels, side, side)}
    if card.input_type in ("noisy", "noisy-video"):
        plain = floats(get("embedding", 0)) if get("embedding", 0) else torch.ones(rows, dtype=torch.int64)
        label = text(length) if get("vocab_size", 0) else plain
        data = floats(channels, side, side) if card.input_type == "noisy" else floats(get("frames", 16), channels, side, side)
        name = "image" if card.input_type == "noisy" else "video"
        return {name: data, "time": torch.ones(rows) if device != "meta" else torch.empty(rows, device="meta"), "label": label}
    if card.input_type == "video":
        return {"video": floats(get("frames", 16), channels, side, side)}
    if "latent" in card.inputs:
        frames = (get("frames", 16),) if "video" in card.input_type else ()
        inputs = {
            "latent": floats(*frames, channels + get("extra", 0), side, get("width", side)),
            "time": floats(),
            "text": floats(min(shape.length, get("length", shape.length)), get("text_dim", 768)),
            "pooled": floats(get("pooled_dim", 768)),
        }
        return {name: inputs[name] for name in card.inputs}
    width = {"vector": get("features", 784), "noise": get("noise", 100)}[card.input_type]
    return {card.input_type: floats(width)}


def build_caption(get: Callable[..., Any], rows: int, length: int, text: Any, whole: Any) -> dict[str, Tensor]:
    """Return the tokens of images' texts. Networks that place the image among the tokens get its tokens too."""
    tokens = text(length)
    if (picture := get("picture", None)) is not None:
        patches = (get("image", 224) // (get("patch", 14) * get("merge", 1))) ** 2
        tokens = torch.where(tokens == picture, 1, tokens)
        tokens = torch.cat([tokens[:, :1], torch.full((rows, patches), picture, device=tokens.device), tokens[:, 1:]], 1)
    elif (end := get("end", None)) is not None:
        tokens = torch.where(tokens == end, 1, tokens)
        tokens[:, -1] = end
    return {"tokens": tokens, "mask": whole(tokens.shape[1])}


# By output type: (card, network, inputs, shape, get) -> workload


def build_supervised(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    classes = get("num_classes", 2)
    if classes == 1:
        inputs["target"] = torch.empty(shape.batch, 1, device=shape.device)
        return Workload(Supervised(network, card.inputs, Regression()), inputs, labels=("target",))
    inputs["target"] = torch.randint(classes, (shape.batch,))
    return Workload(Supervised(network, card.inputs, Classification()), inputs, labels=("target",))


def build_next_token(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    inputs["target"] = inputs["tokens"].clone()
    return Workload(NextToken(network, card.inputs), inputs)


def build_masked(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    tokens = inputs["tokens"]
    place = torch.arange(tokens.shape[1], device=tokens.device)
    chosen = (place * MASKED_SHARE).ceil() < ((place + 1) * MASKED_SHARE).ceil()  # evenly, so that batches differ in rows only
    inputs["target"] = torch.where(chosen, tokens, -1)
    return Workload(MaskedLM(network, card.inputs), inputs)


def build_tags(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    inputs["target"] = torch.randint(max(get("num_classes", 2), 1), inputs["tokens"].shape)
    return Workload(TokenClassificationObjective(network, card.inputs), inputs, labels=("target",))


def build_span(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    inputs["answerable"] = torch.ones_like(inputs["mask"])
    inputs["first"] = inputs["last"] = torch.zeros(shape.batch, dtype=torch.int64)
    return Workload(SpanPrediction(network, card.inputs), inputs, labels=("first", "last"))


def build_segmentation(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    from fieldguide.objectives.segmentation import find_padding

    classes, (height, width) = get("num_classes", 2), inputs["image"].shape[-2:]
    place = shape.device if shape.batch * height * width > MAX_KNOWN_VALUES else "cpu"
    inputs["target"] = torch.randint(classes, (shape.batch, height, width), device=place)
    inputs["size"] = inputs["inner"] = torch.tensor([[height, width]] * shape.batch)
    objective = Segmentation(network, classes)
    objective.paddings[height, width] = find_padding(network, get("channels", 3), height, width)
    return Workload(objective, inputs, labels=("target",))


def add_objects(inputs: dict[str, Tensor], shape: Shape, get: Any) -> None:
    """Add boxes and labels of objects to a batch."""
    side = inputs["image"].shape[-1]
    corner = torch.rand(shape.batch, BOXES_PER_IMAGE, 2) * side / 2
    boxes = torch.cat([corner, corner + side / 4], -1)
    inputs["boxes"] = boxes.to(shape.device)
    inputs["labels"] = torch.randint(get("num_classes", 80), (shape.batch, BOXES_PER_IMAGE))


def build_detection(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    add_objects(inputs, shape, get)
    output = get("output_type") if get("output_type") in card.output_types else card.output_types[0]
    objective: Any = DETECTORS[output](network, card.inputs)
    predict = find_candidates if output == "boxes" else lambda objective, batch: objective.model(batch["image"])
    if hasattr(objective, "match"):  # of a set of queries
        objective.match = match_in_order
    return Workload(objective, inputs, predict, labels=("boxes", "labels"))


def build_poses(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    add_objects(inputs, shape, get)
    count = get("keypoints", 17)
    inputs["keypoints"] = inputs["boxes"][:, :, None, :2].expand(-1, -1, count, -1).clone()
    objective = PoseDetection(network, card.inputs, sigmas=[0.05] * count)

    def find_poses(objective: Any, batch: dict[str, Tensor]) -> Any:
        raw, poses, points, strides = objective.split_grid(batch)
        return poses, *find_best(objective, raw, points, strides)

    return Workload(objective, inputs, find_poses, labels=("boxes", "labels", "keypoints"))


def add_masks(inputs: dict[str, Tensor], shape: Shape, size: tuple[int, int]) -> None:
    """Add masks of objects to a batch."""
    inputs["masks"] = torch.zeros(shape.batch, BOXES_PER_IMAGE, *size, device=shape.device)


def build_prototypes(card: Card, network: Any, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    add_objects(inputs, shape, get)
    height, width = (2 * -(-side // min(network.strides)) for side in inputs["image"].shape[-2:])
    add_masks(inputs, shape, (height, width))
    objective = PrototypeDetection(network, card.inputs)

    def find_masks(objective: Any, batch: dict[str, Tensor]) -> Any:
        raw, coefficients, prototypes = objective.predict_parts(batch)
        boxes, scores, best = find_best(objective, raw, *objective.make_grid(batch))
        chosen = coefficients[:, : objective.max_detections]
        return boxes, scores, best, torch.einsum("bdp,bphw->bdhw", chosen, prototypes)

    return Workload(objective, inputs, find_masks, labels=("boxes", "labels", "masks"))


def build_mask_queries(card: Card, network: Any, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    add_objects(inputs, shape, get)
    height, width = inputs["image"].shape[-2:]
    add_masks(inputs, shape, network.mask_size(height, width))
    objective: Any = MaskSetInstances(network, card.inputs)
    objective.measure.match = lambda logits, masks, labels, true, known: match_in_order(logits, true, labels)
    return Workload(objective, inputs, labels=("boxes", "labels", "masks"))


def match_in_order(predictions: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Match the first queries with the objects, in each layer. The optimal matching depends on values, and has the same size."""
    layers, rows, queries = predictions.shape[:3]
    pairs = torch.cartesian_prod(torch.arange(layers), torch.arange(rows), torch.arange(min(queries, labels.shape[1])))
    layer, image, item = pairs.unbind(1)
    return layer, image, item, item


def find_candidates(objective: Any, batch: dict[str, Tensor]) -> Any:
    """Return the candidates of a detector, without non-maximum suppression: its loops depend on values, and are small."""
    return find_best(objective, *objective.run_network(batch))


def find_best(objective: Any, raw: Tensor, points: Tensor, strides: Tensor) -> Any:
    """Return boxes and scores of all points, and the highest of these scores."""
    boxes, _, logits = decode(raw, objective.model.bins, points, strides)
    scores = logits.sigmoid()
    return boxes, scores, scores.flatten(1).topk(min(objective.candidates, scores[0].numel()))


def build_pairs(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    return Workload(build_contrastive(network, card), inputs)


def build_forecast(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    values = get("values", 1)
    quantiles = QUANTILES[: values - 1]
    channels = inputs["series"].shape[-1]
    inputs["target"] = torch.zeros(shape.batch, get("horizon", 1), channels, device=shape.device)
    return Workload(Forecast(network, card.inputs, quantiles), inputs, labels=("target",))


def build_next_item(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    inputs["target"] = inputs["seen"] = inputs["items"].clone()
    output = get("output_type") if get("output_type") in card.output_types else card.output_types[0]
    if "times" in card.optional_inputs:
        inputs["times"] = torch.zeros(*inputs["items"].shape, 2, dtype=torch.int64, device=inputs["items"].device)
    if "profile" in card.optional_inputs:
        rows, device = len(inputs["items"]), inputs["items"].device
        inputs["profile"] = torch.zeros(rows, len(get("user_categories", ())), dtype=torch.int64, device=device)
        inputs["profile_numbers"] = torch.zeros(rows, get("user_numbers", 0), device=device)
    names = (*card.inputs, *card.optional_inputs)
    return Workload(RECOMMENDERS[output](network, names), inputs, labels=("target",))


def build_ctc(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    symbols = max(1, int(SYMBOLS_PER_FRAME * shape.length))
    inputs["target"] = torch.randint(1, get("vocab_size", 2), (shape.batch, symbols))
    inputs["target_lengths"] = torch.full((shape.batch,), symbols)
    return Workload(CTC(network, card.inputs), inputs, labels=("target", "target_lengths"))


def build_contrastive_frames(card: Card, network: Any, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    counts = network.frames(torch.full((shape.batch,), inputs["waveform"].shape[1]))
    inputs["hidden"] = sample_hidden_frames(counts, int(counts[0]))
    inputs["distractors"] = sample_distractors(inputs["hidden"], DISTRACTORS)
    return Workload(ContrastiveFrames(network, card.inputs), inputs)


def build_masked_clusters(card: Card, network: Any, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    counts = network.frames(torch.full((shape.batch,), inputs["waveform"].shape[1]))
    width = int(counts[0])
    inputs["hidden"] = sample_hidden_frames(counts, width, share=MaskedClusters.share)
    inputs["clusters"] = torch.randint(get("clusters", 100), (shape.batch, width))
    objective = MaskedClusters(network, card.inputs, first=network.field / 2, step=network.stride)
    return Workload(objective, inputs, labels=("clusters",))


def build_image(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    if card.input_type == "noise":
        return build_adversarial(card, network, shape, get)
    if "latent" in inputs:  # the error of a prediction, as of noise
        return build_mean_square(card, network, inputs, shape, get)
    if card.input_type == "image":
        return build_translation(card, network, inputs, shape, get)
    if card.input_type == "noisy-target":
        del inputs["time"]
        return Workload(TranslationDiffusion(network), inputs, labels=("target",))
    data = "video" if "video" in inputs else "image"
    del inputs["time"]

    def predict(objective: Any, batch: dict[str, Tensor]) -> Tensor:
        time = torch.ones(len(batch[data]))
        return objective.model(batch[data], time, batch["label"])

    return Workload(Diffusion(network, data=data), inputs, predict, calls=50)


def build_adversarial(card: Card, network: nn.Module, shape: Shape, get: Any) -> Workload:
    side, channels = get("image", 64), get("channels", 3)
    if "critic" not in card.parts:
        return build_mean_square(card, network, build_inputs(card, network.config, shape), shape, get)
    critic_card, size = registry.find(card.parts["critic"])
    needs = {key: value for key, value in (("image", side), ("channels", channels)) if critic_card.accepts(key)}
    critic = build_network(critic_card, critic_card.resolve_config(size, **needs), shape.device)
    batch = {"image": torch.zeros(shape.batch, channels, side, side, device=shape.device)}
    settings = Settings().with_(card.recipe)
    return Workload(build_gan(network, critic, settings, noise=get("noise", 100), real="image"), batch)


def build_translation(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    critic_card, size = registry.find(card.parts["critic"])
    needs = {"channels": get("channels", 3), "outputs": get("outputs", 3), "image": inputs["image"].shape[-1], "paired": True}
    adapted = critic_card.adapt(needs) if critic_card.adapt else {}
    critic = build_network(critic_card, critic_card.resolve_config(size, **adapted), shape.device)
    inputs["target"] = inputs["image"].new_zeros(shape.batch, needs["outputs"], *inputs["image"].shape[2:])
    return Workload(PairedTranslation(network, critic), inputs, labels=("target",))


def build_mean_square(card: Card, network: nn.Module, inputs: dict[str, Tensor], shape: Shape, get: Any) -> Workload:
    return Workload(MeanSquare(network, card.inputs), inputs)


BUILDERS: dict[str, Callable[..., Workload]] = {
    "label": build_supervised,
    "tokens": build_next_token,
    "words": build_masked,
    "labels": build_tags,
    "span": build_span,
    "mask": build_segmentation,
    **dict.fromkeys(DETECTORS, build_detection),
    "poses": build_poses,
    "prototypes": build_prototypes,
    "mask-queries": build_mask_queries,
    **dict.fromkeys(IMAGE_TEXT_OBJECTIVES, build_pairs),
    "forecast": build_forecast,
    **dict.fromkeys(RECOMMENDERS, build_next_item),
    "ctc": build_ctc,
    "contexts": build_contrastive_frames,
    "clusters": build_masked_clusters,
    "image": build_image,
    "video": build_image,
}
