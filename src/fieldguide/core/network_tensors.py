"""The tensors that a network takes and returns, from its card and its config: what is known without a task.

A dynamic axis may have any size from its least on, up to the limit of the config. Tasks narrow these descriptions: their
preprocessing fixes the size of images, for example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fieldguide.core.card import OPTIONAL_INPUTS, Card
from fieldguide.core.signature import Axis, CacheFormat, Loop, Signature, TensorSpec, TokenRule

BATCH = Axis("batch")
MIN_IMAGE_SIDE = 64  # pixels per side that every convolutional network accepts
TIMESTEPS = 1000  # of the noise processes that denoising networks are trained with
Get = Callable[..., Any]  # (word of the common vocabulary, default) -> value of the config


def make_getter(card: Card, config: Any) -> Get:
    """Return a function that looks up a word of the common vocabulary in a config."""

    def get(word: str, default: Any = None) -> Any:
        value = getattr(config, card.names.get(word, word), None)
        return default if value is None else value

    return get


def fix(name: str, size: int | None) -> Axis:
    """Return an axis of a fixed size."""
    return Axis(name, int(size)) if size is not None else Axis(name)


def describe_network(card: Card, config: Any, network: Any) -> Signature:
    """Return the signature of a network without preprocessing: its tensors and its loop."""
    return Signature(
        architecture=card.name,
        tensors=describe_network_inputs(card, config),
        outputs=describe_network_outputs(card, config, network),
        loop=describe_network_loop(card, config, network),
    )


def describe_network_inputs(card: Card, config: Any) -> tuple[TensorSpec, ...]:
    """Return the arguments of `forward`, in order; optional ones last."""
    get = make_getter(card, config)
    found = INPUTS[card.input_type](get, card)
    names = [name for name in card.optional_inputs if name != "image_states" or get("image_dim")]
    optional = [describe_optional_input(get, name, found) for name in names]
    return (*found, *optional)


def describe_optional_input(get: Get, name: str, others: list[TensorSpec]) -> TensorSpec:
    """Return an optional argument, which has the axes of the tokens or items, or belongs to the row."""
    if name == "profile":
        sizes = tuple(get("user_categories", ()))
        axes = BATCH, fix("profile_columns", len(sizes))
        return TensorSpec(name, "int64", axes, OPTIONAL_INPUTS[name], required=False, codes=sizes)
    if name == "profile_numbers":
        axes = BATCH, fix("profile_numbers", get("user_numbers", 0))
        return TensorSpec(name, "float32", axes, OPTIONAL_INPUTS[name], required=False)
    if name == "grid":
        patches = get("image", 224) // get("patch", 14)
        return TensorSpec(
            name, "int64", (BATCH, fix("sides", 2)), OPTIONAL_INPUTS[name], required=False, low=patches, high=patches
        )
    if name == "sizes":
        return TensorSpec(name, "float32", (BATCH, fix("sizes", get("sizes", 6))), OPTIONAL_INPUTS[name], required=False)
    if name == "guidance":
        return TensorSpec(name, "float32", (BATCH,), OPTIONAL_INPUTS[name], required=False)
    if name == "image_states":
        states = BATCH, Axis("image_positions"), fix("image_features", get("image_dim"))
        return TensorSpec(name, "float32", states, OPTIONAL_INPUTS[name], required=False)
    if name == "text_mask":
        words = next(spec for spec in others if spec.name == "text").axes[1]
        return TensorSpec(name, "bool", (BATCH, words), OPTIONAL_INPUTS[name], required=False, counts="tokens")
    first = next(spec for spec in others if spec.name in ("tokens", "items"))
    if name == "times":
        return TensorSpec(name, "int64", (*first.axes, fix("moments", 2)), OPTIONAL_INPUTS[name], required=False)
    return TensorSpec(name, "int64", first.axes, OPTIONAL_INPUTS[name], required=False, low=0, high=1)


def describe_text(get: Get, card: Card, tokens: str = "tokens", mask: str = "mask", *, masked: bool = True) -> list[TensorSpec]:
    """Return token ids and the mask of real tokens."""
    axis = Axis(tokens, most=None if card.endless else get("length"))
    about = "True for real tokens, False for padding"
    return [
        TensorSpec(tokens, "int64", (BATCH, axis), "token ids", low=0, high=get("vocab_size", 2) - 1),
        TensorSpec(mask, "bool", (BATCH, axis), about, required=masked, counts=tokens),
    ]


def describe_tokens(get: Get, card: Card) -> list[TensorSpec]:
    return describe_text(get, card, masked="tokens" not in card.output_types)


def describe_pair(get: Get, card: Card) -> list[TensorSpec]:
    return [
        *describe_text(get, card, "source", "source_mask"),
        *describe_text(get, card, masked=False),
    ]


def describe_image(get: Get, card: Card) -> list[TensorSpec]:
    side = get("image")
    axes = [Axis(name, side, least=MIN_IMAGE_SIDE if side is None else 1) for name in ("height", "width")]
    return [TensorSpec("image", "float32", (BATCH, fix("channels", get("channels", 3)), *axes), "standardized pixels")]


def describe_captioned(get: Get, card: Card) -> list[TensorSpec]:
    """Return an image and a text. Tokens that stand for the image, or end the text, are rules of the tokens."""
    tokens, mask = describe_text(get, card)
    rules: tuple[TokenRule, ...] = ()
    most = get("length")
    if (picture := get("picture")) is not None:
        patches = (get("image", 224) // (get("patch", 14) * get("merge", 1))) ** 2
        rules = (TokenRule(picture, patches, "inside"),)
        axis = Axis("tokens", least=patches + 1, most=most)
    else:
        axis = Axis("tokens", least=2, most=most)
        rules = (TokenRule(get("end")),) if get("end") is not None else ()
    replaced = [
        TensorSpec(spec.name, spec.dtype, (BATCH, axis), spec.about, low=spec.low, high=spec.high, counts=spec.counts)
        for spec in (tokens, mask)
    ]
    words = TensorSpec("tokens", "int64", (BATCH, axis), "token ids", low=0, high=replaced[0].high, tokens=rules)
    return [*describe_image(get, card), words, replaced[1]]


def describe_table(get: Get, card: Card) -> list[TensorSpec]:
    sizes = tuple(int(size) for size in get("categories", ()))
    columns, about = fix("columns", len(sizes)), "codes of categories; 0 was not seen in training"
    return [
        TensorSpec("numbers", "float32", (BATCH, fix("numbers", get("numbers", 0))), "standardized numbers"),
        TensorSpec("categories", "int64", (BATCH, columns), about, codes=sizes),
    ]


def describe_vector(get: Get, card: Card) -> list[TensorSpec]:
    return [TensorSpec("vector", "float32", (BATCH, fix("features", get("features"))), "features")]


def describe_sequence(get: Get, card: Card) -> list[TensorSpec]:
    return [TensorSpec("sequence", "float32", (BATCH, Axis("time"), fix("features", get("dim") or get("d_model"))), "vectors")]


def describe_noise(get: Get, card: Card) -> list[TensorSpec]:
    return [TensorSpec("noise", "float32", (BATCH, fix("noise", get("noise"))), "standard normal noise")]


def describe_series(get: Get, card: Card) -> list[TensorSpec]:
    axes = BATCH, fix("time", get("length")), fix("channels", get("channels", 1))
    return [TensorSpec("series", "float32", axes, "the last steps of series")]


def describe_covariates(get: Get, card: Card) -> list[TensorSpec]:
    length, horizon = get("length"), get("horizon", 1)
    ahead = BATCH, fix("time_and_horizon", length + horizon), fix("known_features", get("known", 0))
    past = BATCH, fix("time", length), fix("past_features", get("past", 0))
    return [
        *describe_series(get, card),
        TensorSpec("past", "float32", past, "covariates known for the past"),
        TensorSpec("known", "float32", ahead, "covariates known for the past and the future"),
    ]


def describe_static_covariates(get: Get, card: Card) -> list[TensorSpec]:
    axes = BATCH, fix("static_features", get("static", 0))
    return [*describe_covariates(get, card), TensorSpec("static", "float32", axes, "properties of the series")]


def describe_noisy(get: Get, card: Card) -> list[TensorSpec]:
    """Return noisy images or videos, the noise level, and a class, caption or embedding."""
    video = card.input_type == "noisy-video"
    frames = (fix("frames", get("frames", 16)),) if video else ()
    sides = (fix(name, get("image", 32)) for name in ("height", "width"))
    axes = (BATCH, *frames, fix("channels", get("channels", 3)), *sides)
    if get("vocab_size", 0):
        words = BATCH, fix("tokens", get("length"))
        label = TensorSpec("label", "int64", words, "caption tokens; 0 is none", low=0, high=get("vocab_size") - 1)
    elif get("embedding", 0):
        label = TensorSpec("label", "float32", (BATCH, fix("embedding", get("embedding"))), "embedding; 0 is unconditional")
    else:
        label = TensorSpec("label", "int64", (BATCH,), "class; 0 is unconditional", low=0, high=get("num_classes", 0))
    return [
        TensorSpec("video" if video else "image", "float32", axes, "noisy data, -1 to 1 without noise"),
        TensorSpec("time", "float32", (BATCH,), "noise level", low=0, high=TIMESTEPS - 1),
        label,
    ]


def describe_video(get: Get, card: Card) -> list[TensorSpec]:
    sides = (fix(name, get("image")) for name in ("height", "width"))
    axes = (BATCH, fix("frames", get("frames")), fix("channels", get("channels", 3)), *sides)
    return [TensorSpec("video", "float32", axes, "frames, -1 to 1")]


def describe_noisy_target(get: Get, card: Card) -> list[TensorSpec]:
    """Return noisy targets, the noise level, and the images that they belong to."""
    sides = tuple(fix(name, get("image", 32)) for name in ("height", "width"))
    target = (BATCH, fix("outputs", get("outputs", 3)), *sides)
    return [
        TensorSpec("target", "float32", target, "noisy targets, -1 to 1 without noise"),
        TensorSpec("time", "float32", (BATCH,), "noise level", low=0, high=TIMESTEPS - 1),
        TensorSpec("image", "float32", (BATCH, fix("channels", get("channels", 3)), *sides), "images, standardized"),
    ]


def describe_noisy_latent(get: Get, card: Card) -> list[TensorSpec]:
    """Return noisy latents, the noise level, and what text encoders return for a text."""
    height = get("image", 64)
    sides = fix("height", height), fix("width", get("width", height))
    frames = (fix("frames", get("frames")),) if "video" in card.input_type else ()
    channels = fix("channels", get("channels", 4) + get("extra", 0))
    tokens = fix("tokens", get("length")) if get("length") else Axis("tokens")
    text = BATCH, tokens, fix("text_features", get("text_dim"))
    found = [
        TensorSpec("latent", "float32", (BATCH, *frames, channels, *sides), "noisy latents, normalized"),
        TensorSpec("time", "float32", (BATCH,), "noise level", low=0, high=TIMESTEPS),
        TensorSpec("text", "float32", text, "states of the text encoder"),
    ]
    if "pooled" in card.inputs:
        axes = BATCH, fix("pooled_features", get("pooled_dim"))
        found.append(TensorSpec("pooled", "float32", axes, "one vector for the text"))
    return found


def describe_items(get: Get, card: Card) -> list[TensorSpec]:
    axes = BATCH, Axis("time", most=get("length"))
    return [
        TensorSpec("items", "int64", axes, "items of a user in order of time; 0 is none", low=0, high=get("items", 2) - 1),
        TensorSpec("mask", "bool", axes, "True for items", counts="time"),
    ]


def describe_speech(get: Get, card: Card) -> list[TensorSpec]:
    return [
        TensorSpec("features", "float32", (BATCH, Axis("frames"), fix("bands", get("features"))), "log-mel features"),
        TensorSpec("lengths", "int64", (BATCH,), "number of real frames", counts="frames"),
    ]


def describe_waveform(get: Get, card: Card) -> list[TensorSpec]:
    return [
        TensorSpec("waveform", "float32", (BATCH, Axis("samples", least=get("field", 1))), "samples of a recording"),
        TensorSpec("lengths", "int64", (BATCH,), "number of real samples", counts="samples"),
    ]


def describe_speech_text(get: Get, card: Card) -> list[TensorSpec]:
    frames = Axis("frames", least=2, most=2 * get("source_length"))
    about = "log-mel features; public weights expect the largest number of frames, padded with silence"
    features = TensorSpec("features", "float32", (BATCH, frames, fix("bands", get("features"))), about)
    return [features, *describe_text(get, card, masked=False)]


def describe_image_text(get: Get, card: Card) -> list[TensorSpec]:
    return [*describe_image(get, card), *describe_text(get, card, masked=False)]


def describe_prompted_image(get: Get, card: Card) -> list[TensorSpec]:
    prompts, points = Axis("prompts"), Axis("points")
    kinds = "0 background, 1 object, 2 and 3 corners of a box, -1 no point, -2 padding"
    return [
        *describe_image(get, card),
        TensorSpec("points", "float32", (BATCH, prompts, points, fix("xy", 2)), "pixels", low=0, high=get("image")),
        TensorSpec("point_labels", "int64", (BATCH, prompts, points), kinds, low=-2, high=3),
    ]


INPUTS: dict[str, Callable[[Get, Card], list[TensorSpec]]] = {
    "image": describe_image,
    "tokens": describe_tokens,
    "table": describe_table,
    "vector": describe_vector,
    "sequence": describe_sequence,
    "noise": describe_noise,
    "pair": describe_pair,
    "series": describe_series,
    "covariates": describe_covariates,
    "static-covariates": describe_static_covariates,
    "noisy": describe_noisy,
    "noisy-target": describe_noisy_target,
    "noisy-video": describe_noisy,
    "noisy-latent": describe_noisy_latent,
    "noisy-latent-pooled": describe_noisy_latent,
    "noisy-latent-video": describe_noisy_latent,
    "noisy-latent-video-pooled": describe_noisy_latent,
    "video": describe_video,
    "captioned": describe_captioned,
    "items": describe_items,
    "speech": describe_speech,
    "speech-text": describe_speech_text,
    "image-text": describe_image_text,
    "prompted-image": describe_prompted_image,
    "waveform": describe_waveform,
}


def describe_network_outputs(card: Card, config: Any, network: Any) -> tuple[TensorSpec, ...]:
    """Return what `forward` returns: one tensor."""
    get = make_getter(card, config)
    output = get("output_type", card.output_types[0])
    inputs = {spec.name: spec for spec in describe_network_inputs(card, config)}
    axes, about = describe_output_axes(output, get, network, inputs, card)
    return (TensorSpec(OUTPUT_NAMES.get(output, "logits"), "float32", (BATCH, *axes), about),)


OUTPUT_NAMES = {
    "contexts": "contexts",
    "vector": "vector",
    "sequence": "sequence",
    "score": "score",
    "image": "image",
    "video": "video",
    "embeddings": "embeddings",
    "sigmoid-embeddings": "embeddings",
    "forecast": "forecast",
    "reconstruction": "reconstruction",
    "anomaly-map": "distances",
    "boxes": "grid",
    "poses": "grid",
    "prototypes": "grid",
    "queries": "queries",
    "scored-queries": "queries",
    "regions": "regions",
    "mask-queries": "queries",
    "prompted-masks": "masks",
}


def describe_output_axes(
    output: str, get: Get, network: Any, inputs: dict[str, TensorSpec], card: Card
) -> tuple[tuple[Axis, ...], str]:
    """Return the axes of a network's output after the batch, and what it means."""
    classes, vocabulary = fix("classes", get("num_classes")), fix("vocabulary", get("vocab_size"))
    tokens = inputs["tokens"].axes[1] if "tokens" in inputs else Axis("tokens")
    if output == "label":
        members = (fix("members", get("members")),) if get("members") else ()
        return (*members, classes), "logits of the classes, or a standardized value"
    if output == "words":
        return (tokens, vocabulary), "logits of the token at each position"
    if output == "tokens":
        return (tokens, vocabulary), "logits of the next token at each position"
    if output == "labels":
        return (tokens, classes), "logits of the classes of each token"
    if output == "replaced":
        return (tokens, fix("logits", 1)), "logit that each token was replaced"
    if output == "span":
        return (tokens, fix("ends", 2)), "logits of each token as first and as last token of the answer"
    if output == "mask":
        return (classes, Axis("output_height"), Axis("output_width")), "logits of the classes of each pixel"
    if output == "boxes":
        values = 4 * network.bins.numel() + get("num_classes", 80)
        return (Axis("points"), fix("values", values)), "logits of distances to four sides, then of classes, for each point"
    if output == "poses":
        values = 4 * network.bins.numel() + get("num_classes", 1) + 3 * get("keypoints", 17)
        about = "logits of distances to four sides, then of classes, then x, y and logit of keypoints, for each point"
        return (Axis("points"), fix("values", values)), about
    if output == "prototypes":
        return (
            Axis("values"),
        ), "distances, classes and coefficients of all points, then prototypes at the positions of a mask"
    if output in ("queries", "scored-queries"):
        values = 4 + get("num_classes", 80) + (output == "queries")
        about = "a box, then logits of classes" + (" and of no object" if output == "queries" else "")
        return (fix("queries", get("queries")), fix("values", values)), about
    if output == "mask-queries":
        return (
            fix("queries", get("queries")),
            Axis("values"),
        ), "logits of classes and of no object, then of the positions of a mask"
    if output == "prompted-masks":
        axes = inputs["points"].axes[1], fix("masks", get("candidates", 3) + 1), Axis("values")
        return axes, "the predicted IoU, then the logits at the positions of a mask"
    if output == "regions":
        values = 5 + 5 * (get("num_classes", 80) + 1)
        return (fix("proposals", get("proposals")), fix("values", values)), "a box, its logit, logits of classes, their offsets"
    if output == "embeddings":
        return (fix("sides", 2), fix("embedding", get("embed"))), "an image and a text embedding of length 1"
    if output == "sigmoid-embeddings":
        width = get("embed", get("dim")) + 1
        return (
            fix("sides", 2),
            fix("embedding", width),
        ), "an image and a text embedding, whose product is the logit of a match"
    if output == "forecast":
        ahead = fix("horizon", get("horizon", 1)), fix("channels", get("channels", 1)), fix("values", get("values", 1))
        return ahead, "a point forecast and quantiles of each step, standardized"
    if output in ("items", "towers"):
        return (inputs["items"].axes[1], fix("vocabulary", get("items"))), "logits of the next item"
    if output == "masked-items":
        return (inputs["items"].axes[1], fix("vocabulary", get("items"))), "logits of the item itself, for hidden items"
    if output == "ctc":
        return (Axis("output_frames"), vocabulary), "logits of the symbol of each frame; 0 is blank"
    if output == "clusters":
        return (Axis("output_frames"), fix("clusters", get("clusters"))), "logits of the cluster of each frame"
    if output == "contexts":
        sides = fix("sides", 2), fix("embedding", get("contrast_dim"))
        return (Axis("output_frames"), *sides), "predicted and quantized vector of each frame"
    if output == "reconstruction":
        return next(iter(inputs.values())).axes[1:], "the input, rebuilt"
    if output == "anomaly-map":
        return inputs["image"].axes[2:], "how far the surroundings of each pixel are from those in normal images"
    if output == "score":
        return (fix("score", 1),), "how realistic the input is"
    if output == "vector":
        return (fix("features", get_vector_width(get, network, card)),), "features"
    if output == "image" and card.input_type == "noise":
        return (fix("channels", get("channels", 3)), *(fix(n, get("image")) for n in ("height", "width"))), "pixels, -1 to 1"
    if output == "image" and card.accepts("outputs"):  # of networks that translate images
        return (
            fix("channels", get("outputs", 3)),
            *inputs["image"].axes[2:],
        ), "the translated image, or the prediction of its noise"
    if output == "scores":
        return (fix("score", 1), Axis("patch_rows"), Axis("patch_columns")), "how realistic each patch is"
    if output == "sequence" and "tokens" in inputs:
        return (tokens, fix("features", get("dim"))), "the state of each token"
    if "latent" in inputs:  # the channels to compare with are not predicted
        *before, _, height, width = inputs["latent"].axes[1:]  # of videos, the frames
        return (*before, fix("channels", get("channels", 4)), height, width), "predicted noise, or velocity"
    data = next(inputs[name] for name in ("video", "image", "sequence") if name in inputs)
    return data.axes[1:], "predicted noise, or velocity" if output in ("image", "video") else "vectors"


def get_vector_width(get: Get, network: Any, card: Card) -> int | None:
    """Return the number of features that a network without a head returns."""
    levels = getattr(network, "levels", None)  # of image networks: name -> (channels, stride)
    if card.input_type == "image" and levels and get("widths", get("dim")) is not None:
        return list(levels.values())[-1][0]
    return get("features") or get("dim")


def describe_network_loop(card: Card, config: Any, network: Any) -> Loop | None:
    """Return the loop in which a network is called."""
    get = make_getter(card, config)
    if card.input_type in ("noisy", "noisy-video"):
        latent = describe_network_inputs(card, config)[0].axes[1:]
        guided = any(get(name, 0) for name in ("num_classes", "vocab_size", "embedding"))
        return Loop("diffusion", latent=latent, timesteps=TIMESTEPS, guidance=guided)
    if card.input_type == "noisy-target":
        return Loop("diffusion", latent=describe_network_inputs(card, config)[0].axes[1:], timesteps=TIMESTEPS, guidance=False)
    if "latent" in card.inputs:
        return Loop("diffusion", latent=describe_network_inputs(card, config)[0].axes[1:], timesteps=TIMESTEPS, guidance=True)
    if "tokens" not in card.output_types:
        return None
    kind: Any = "encoder-decoder" if card.input_type in ("pair", "speech-text", "image-text") else "autoregressive"
    return Loop(kind, max_length=None if card.endless else get("length"), cache=describe_cache(network))


def describe_cache(network: Any) -> CacheFormat | None:
    """Return the shape of a decoder's cache, seen from a cache of one token; None if the network has none of keys and values."""
    decoder = getattr(network, "language", network)  # of a vision-language model
    if not hasattr(decoder, "new_cache"):
        return None
    keys = decoder.new_cache(1, 1).keys
    return None if not keys else CacheFormat(len(keys), keys[0].shape[1], keys[0].shape[3])
