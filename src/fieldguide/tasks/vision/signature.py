"""Signatures of the vision tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from fieldguide.core.card import Card
from fieldguide.core.network_tensors import TIMESTEPS
from fieldguide.core.signature import (
    Axis,
    ImageFormat,
    InputField,
    Limits,
    Loop,
    OptionSpec,
    RecordField,
    RecordUnit,
    Signature,
    Step,
    TensorSpec,
    list_values,
)
from fieldguide.data.dataset import Column
from fieldguide.data.media import images, video
from fieldguide.data.media.boxes import Skeleton
from fieldguide.data.preprocessing import ImageTransform, TextTokenizer
from fieldguide.data.preprocessing.masks import Canvas
from fieldguide.objectives.segment_merging import RULES
from fieldguide.objectives.segmentation import find_padding
from fieldguide.tasks.signature_builder import SignatureBuilder
from fieldguide.tasks.signature_parts import (
    describe_column,
    describe_decoding,
    describe_image_format,
    describe_normalization,
    describe_tokenization,
    fix_axes,
    list_image_steps,
    request_tensor,
    set_image,
)

SAMPLERS = ("dpm++-sde", "dpm++", "ddim", "ddpm", "euler", "heun")
EDM_TIMES = (-1.56, 1.1)  # log(sigma) / 4 at both ends of the noise levels
PROBE_SIDE = 256  # pixels per side of the image that shows whether a network keeps its size
MIN_SEGMENTED_SIDE = 32  # pixels per side of the smallest example of an image to segment


class ImageSignature(SignatureBuilder):
    """The signature of a task that reads images of one size."""

    pictures: ImageTransform

    def describe_inputs(self) -> Sequence[InputField]:
        size = describe_image_format(self.pictures)
        return [describe_column(c, image=size if c.kind == "image" else None) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        steps = list_image_steps(self.pictures)
        return [*steps, Step("flatten", "one vector for each image", True)] if card.input_type == "vector" else steps

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return set_image(tensors, "image", self.pictures)

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), pixels=images.MAX_PIXELS)


class DetectionSignature(SignatureBuilder):
    """The signature of object detection. Images are letterboxed: scaled to fit a square and padded."""

    options: Any
    names: list[str]
    scale: images.Scale | None
    threshold: float
    max_detections: ClassVar[int]

    @property
    def transform(self) -> ImageTransform:
        """Return the conversion of pixels to the input of the network."""
        raise NotImplementedError

    def describe_inputs(self) -> Sequence[InputField]:
        side = self.options.side
        size = ImageFormat(side, side, self.options.channels, "pad")
        return [describe_column(c, image=size) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        side = self.options.side
        about = f"scale to fit {side} x {side} pixels, center, pad; keep scale and corner"
        normalize = describe_normalization(self.transform.mean, self.transform.std)
        return [
            describe_decoding(self.options.channels, self.scale),
            Step("letterbox", about, True, {"side": side, "fit": "pad", "antialias": True}),
            normalize if self.options.pixels else Step("scale_pixels", "pixels / 255", True),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        if self.options.pixels:
            return set_image(tensors, "image", self.transform)
        sizes = {"height": self.options.side, "width": self.options.side, "channels": self.options.channels}
        return [replace(spec, axes=fix_axes(spec.axes, sizes), about="pixels / 255", low=0, high=1) for spec in tensors]

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        pair = Axis("xy", 2)
        return [
            request_tensor("scale", "float32", pair, about="input pixels for each pixel of the image, x and y", low=0),
            request_tensor("corner", "float32", pair, about="left and top of the image in the input", low=0),
            request_tensor("size", "float32", pair, about="width and height of the image", low=1),
        ]

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        if not hasattr(network, "strides"):  # the network has a fixed number of queries
            return outputs
        points = sum((-(-self.options.side // stride)) ** 2 for stride in network.strides)
        return [replace(spec, axes=fix_axes(spec.axes, {"points": points})) for spec in outputs]

    def build_signature(self, card: Card, config: Any, network: Any) -> Signature:
        signature = super().build_signature(card, config, network)
        return replace(signature, postprocessing=(*self.describe_decoding(card), *signature.postprocessing))

    def describe_decoding(self, card: Card) -> Sequence[Step]:
        """Return the steps from the output of the network to boxes in pixels of the input, scores and classes."""
        most = {"most": self.max_detections}
        if card.output_types[0] == "queries":
            return [
                Step("decode_boxes", "center and size times the side of the input -> left, top, right, bottom", True),
                Step("softmax", "scores of the classes; the last, no object, is left out", True),
                Step("best_class", "the class of the highest score of each query, queries by descending score", True, most),
            ]
        if card.output_types[0] == "scored-queries":
            return [
                Step("decode_boxes", "center and size times the side of the input -> left, top, right, bottom", True),
                Step("sigmoid", "scores of the classes", True),
                Step("topk", "the pairs of query and class with the highest scores", True, most),
            ]
        if card.output_types[0] == "regions":
            return [
                Step("decode_boxes", "move each proposal by the offset of each class, clip to the input", True),
                Step("softmax", "scores of the classes; the first, the background, is left out", True),
                Step("nms", "drop boxes that overlap one of a higher score of their class", True, most),
            ]
        return [
            Step("decode_boxes", "expected distances to the sides times the stride, around each point", True),
            Step("sigmoid", "scores of the classes", True),
            Step("nms", "drop boxes that overlap one of a higher score of their class", True, most),
        ]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("undo_letterbox", "boxes in pixels of the image, clipped to it", True),
            Step("threshold", "keep boxes from a score on", True, {"threshold": self.threshold}),
            Step("draw", "the image with the boxes", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        sides = "left, top, right, bottom in pixels of the image, from its top left corner"
        found = (
            RecordField("label", "string", "the class", **list_values(self.names)),
            RecordField("score", "number", "how certain the box is", low=0, high=1),
            RecordField("box", "array", sides, size=4, items=RecordField("", "number")),
        )
        items = RecordField("", "object", fields=found)
        return [
            RecordField("found", "string", "how many of each class, as text"),
            RecordField("objects", "array", "the objects, most certain first", items=items),
            RecordField("picture", "string", "the image with the boxes", required=False, media_types=("image/jpeg",)),
        ]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), pixels=images.MAX_PIXELS)


class PoseSignature(DetectionSignature):
    """The signature of keypoint detection: object detection with keypoints."""

    skeleton: Skeleton

    def describe_decoding(self, card: Card) -> Sequence[Step]:
        boxes, *others = super().describe_decoding(card)
        about = "twice the values times the stride, from the corner of each cell; the probability of being labeled"
        return [boxes, Step("decode_keypoints", about, True), *others]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        first, *others = super().describe_postprocessing(members)
        return [replace(first, about="boxes and keypoints in pixels of the image; boxes are clipped to it"), *others]

    def describe_record(self) -> Sequence[RecordField]:
        fields = (
            RecordField("name", "string", "the keypoint", **list_values(self.skeleton.names)),
            RecordField("x", "number", "pixels from the left"),
            RecordField("y", "number", "pixels from the top"),
            RecordField("score", "number", "how probable it is that the keypoint is labeled", low=0, high=1),
        )
        points = RecordField(
            "keypoints", "array", "all keypoints", size=len(self.skeleton.names), items=RecordField("", "object", fields=fields)
        )
        found = []
        for one in super().describe_record():
            if one.name == "objects" and one.items:
                one = replace(one, items=replace(one.items, fields=(*one.items.fields, points)))
            found.append(one)
        return found


class InstanceSignature(DetectionSignature):
    """The signature of instance segmentation: object detection with masks."""

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        return outputs

    def describe_decoding(self, card: Card) -> Sequence[Step]:
        most = {"most": self.max_detections}
        if card.output_types[0] == "mask-queries":
            return [
                Step("softmax", "scores of the classes; the last, no object, is left out", True),
                Step("topk", "the pairs of query and class with the highest scores", True, most),
                Step("score_masks", "scores times the mean probability of the positions of the mask", True),
            ]
        boxes, *others = super().describe_decoding(card)
        return [boxes, *others, Step("combine_prototypes", "sum of the prototypes, weighted by the coefficients", True)]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        first, *others = super().describe_postprocessing(members)
        about = "logits of masks at the pixels of the image (bilinear), above 0 within the box"
        masks = [Step("resize_masks", about, True), Step("encode_masks", "compressed run lengths of COCO", False)]
        return [first, *masks, *(replace(o, about="the image with masks and boxes") if o.name == "draw" else o for o in others)]

    def describe_record(self) -> Sequence[RecordField]:
        size = RecordField("size", "array", "height and width of the image", size=2, items=RecordField("", "integer"))
        counts = RecordField("counts", "string", "compressed run lengths of COCO, column by column")
        mask = RecordField("mask", "object", "the pixels of the object", fields=(size, counts))
        found = []
        for one in super().describe_record():
            if one.name == "objects" and one.items:
                one = replace(one, items=replace(one.items, fields=(*one.items.fields, mask)))
            found.append(one)
        return found


class PanopticSignature(InstanceSignature):
    """The signature of panoptic segmentation: segments that do not overlap, as one image of their ids."""

    def describe_options(self) -> tuple[OptionSpec, ...]:
        return tuple(replace(o, choices=RULES) if o.name == "merge" else o for o in super().describe_options())

    def describe_decoding(self, card: Card) -> Sequence[Step]:
        return [
            Step("softmax", "probabilities of the classes and of no object", True),
            Step("best_class", "the most probable class of each query; queries of no object are left out", True),
        ]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        about = "give each pixel to the query with the highest product of score and probability, join the queries of a class of stuff"
        return [
            Step("threshold", "keep queries above a score", True, {"threshold": self.threshold}),
            Step("resize_masks", "logits of masks at the pixels of the image (bilinear), then sigmoid", True),
            Step("merge", about, False),
            Step("encode_ids", "a PNG with R + 256 G + 65536 B = id", False),
            Step("draw", "the image with the segments", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        sides = "left, top, right, bottom in pixels of the image, from its top left corner"
        found = (
            RecordField("id", "integer", "its number in `panoptic`", low=1),
            RecordField("label", "string", "the class", **list_values(self.names)),
            RecordField("isthing", "boolean", "whether it is a countable object"),
            RecordField("score", "number", "the probability of the class", low=0, high=1),
            RecordField("area", "integer", "pixels", low=0),
            RecordField("box", "array", sides, size=4, items=RecordField("", "number")),
        )
        items = RecordField("", "object", fields=found)
        return [
            RecordField("found", "string", "how many of each class, as text"),
            RecordField("segments", "array", "the segments, most certain first", items=items),
            RecordField("picture", "string", "the image with the segments", required=False, media_types=("image/jpeg",)),
            RecordField("panoptic", "string", "the id of the segment of each pixel; 0 is none", media_types=("image/png",)),
        ]


class PromptedSignature(SignatureBuilder):
    """The signature of segmentation by prompts. Images keep their aspect ratio; the right and the bottom of the input are padded."""

    pictures: ImageTransform

    def describe_inputs(self) -> Sequence[InputField]:
        side = self.pictures.side
        size = ImageFormat(side, side, self.pictures.channels, "pad")
        return [describe_column(c, image=size) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        side = self.pictures.side
        about = f"scale the longest side to {side} pixels"
        return [
            describe_decoding(self.pictures.channels, None),
            Step("resize", about, True, {"side": side, "fit": "longest", "antialias": True}),
            describe_normalization(self.pictures.mean, self.pictures.std),
            Step("pad", "zeros at the right and bottom", True),
            Step("place_points", "points and corners of boxes in pixels of the input; without any, a grid", True),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        return set_image(tensors, "image", self.pictures)

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        return [request_tensor("size", "float32", Axis("xy", 2), about="width and height of the image", low=1)]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        about = "logits of masks at the pixels of the input without its padding, then of the image (bilinear), above 0"
        return [
            Step(
                "choose_masks", "the best of each prompt by its predicted IoU; without prompts, all good and stable ones", True
            ),
            Step("resize_masks", about, True),
            Step("nms", "without prompts, drop masks whose box overlaps that of a better one", False),
            Step("encode_masks", "compressed run lengths of COCO", False),
            Step("draw", "the image with the masks", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        sides = "left, top, right, bottom in pixels of the image, from its top left corner"
        size = RecordField("size", "array", "height and width of the image", size=2, items=RecordField("", "integer"))
        counts = RecordField("counts", "string", "compressed run lengths of COCO, column by column")
        found = (
            RecordField("prompt", "integer", "the number of its prompt, from 0", required=False, low=0),
            RecordField("score", "number", "the predicted IoU of the mask with the object"),
            RecordField("stability", "number", "the IoU of the masks at a higher and a lower threshold", low=0, high=1),
            RecordField("area", "integer", "pixels", low=0),
            RecordField("box", "array", sides, size=4, items=RecordField("", "number")),
            RecordField("mask", "object", "the pixels of the object", fields=(size, counts)),
        )
        return [
            RecordField("found", "string", "how many masks, as text"),
            RecordField("masks", "array", "the masks", items=RecordField("", "object", fields=found)),
            RecordField("picture", "string", "the image with the masks", required=False, media_types=("image/jpeg",)),
        ]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), pixels=images.MAX_PIXELS)


class SegmentationSignature(SignatureBuilder):
    """The signature of semantic segmentation. Images keep their aspect ratio; a batch is a canvas that holds all of them."""

    options: Any
    canvas: Canvas
    names: list[str]

    def describe_inputs(self) -> Sequence[InputField]:
        size = ImageFormat(self.canvas.side, self.canvas.side, self.canvas.channels, "shrink")
        return [describe_column(c, image=size) for c in self.input_columns()]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        about = f"shrink images longer than {self.canvas.side} pixels, place them at the top left of a canvas"
        return [
            describe_decoding(self.canvas.channels, self.canvas.scale),
            Step("resize", about, True, {"side": self.canvas.side, "fit": "shrink"}),
            describe_normalization(self.canvas.mean, self.canvas.std),
            Step("tile", "split larger canvases into overlapping tiles (option tile)", False),
            Step("pad", "extend by reflection if the network returns only the center", True),
        ]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        sides = tuple(Axis(name, least=MIN_SEGMENTED_SIDE) for name in ("height", "width"))
        axes = lambda spec: (*fix_axes(spec.axes[:2], {"channels": self.canvas.channels}), *sides)
        return [replace(spec, axes=axes(spec), mean=self.canvas.mean, std=self.canvas.std) for spec in tensors]

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        pair = Axis("yx", 2)
        return [
            request_tensor("inner", "int64", pair, about="height and width of the image on the canvas", low=1),
            request_tensor("size", "int64", pair, about="height and width of the image file", low=1),
        ]

    def describe_outputs(self, outputs: Sequence[TensorSpec], network: Any) -> Sequence[TensorSpec]:
        if hasattr(network, "predict_layers"):  # a set of masks
            return outputs
        if any(find_padding(network, self.canvas.channels, PROBE_SIDE, PROBE_SIDE)):
            return outputs  # smaller than the input
        sides = tuple(Axis(name, least=MIN_SEGMENTED_SIDE) for name in ("height", "width"))
        return [replace(spec, axes=(*spec.axes[:2], *sides)) for spec in outputs]

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        return [
            Step("join_tiles", "weighted mean of the logits of overlapping tiles", False),
            Step("resize", "resize the logits to the size of the image (bilinear)", True),
            Step("argmax", "the most probable class of each pixel", True),
            Step("encode_mask", "a PNG with a palette", False),
            Step("draw", "the image under the colors of the classes", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        known = list_values(self.names)
        share = RecordField("", "number", low=0, high=1)
        return [
            RecordField("classes", "string", "the largest classes and their shares, as text"),
            RecordField("mask", "string", "index of the class of each pixel", media_types=("image/png",)),
            RecordField("shares", "map", "share of the pixels of each class that occurs", items=share, **known),
            RecordField("overlay", "string", "the image and the mask", required=False, media_types=("image/jpeg",)),
        ]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), pixels=images.MAX_PIXELS)


class GenerationSignature(SignatureBuilder):
    """The signature of image generation: a class, a caption or nothing becomes images."""

    row_form: ClassVar[Literal["table", "value"]] = "value"
    record_for: ClassVar[RecordUnit] = "sample"
    max_request_rows: ClassVar[int] = 64
    output_media: ClassVar[tuple[str, str]] = ("image", "image/png")
    options: Any
    pictures: ImageTransform
    labels: list[str]
    text: TextTokenizer | None

    def describe_inputs(self) -> Sequence[InputField]:
        if self.text is not None:
            about = "what to generate; by default captions of the training data"
            return [InputField("caption", "text", required=False, about=about)]
        if self.labels:
            about, known = "the class to generate; all in turn by default", list_values(self.labels)
            return [InputField("class", "category", required=False, closed=True, about=about, **known)]
        return []

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        steps = []
        if self.text is not None:
            steps.append(describe_tokenization(self.text, self.options.length))
        elif self.labels:
            steps.append(Step("look_up_classes", "number of the class, from 1; 0 is none", True, {"count": len(self.labels)}))
        if card.input_type == "noise":
            return [*steps, Step("draw_noise", "standard normal noise, with the class one-hot at its end", False)]
        return [*steps, Step("draw_noise", "standard normal noise by seed and number of the sample", False)]

    def describe_tensors(self, tensors: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
        if self.options.unclip is not None:
            made = "embedding of the image, which the prior generates for a caption; 0 is none"
            tensors = [replace(t, name="embedding", about=made) if t.name == "label" else t for t in tensors]
        if self.options.schedule not in ("edm", "flow"):
            return tensors
        ends = {"edm": EDM_TIMES, "flow": (0.0, float(TIMESTEPS))}[self.options.schedule]
        return [replace(t, low=ends[0], high=ends[1]) if t.name == "time" else t for t in tensors]

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        row = request_tensor("row", "int64", about="number of the sample, which seeds its noise", low=0)
        if self.options.unclip is not None and self.text is not None:
            words, high = Axis("tokens", self.options.length), self.text.size - 1
            return [request_tensor("label", "int64", words, about="caption tokens; 0 is none", low=0, high=high), row]
        if "label" in card.inputs:
            return [row]
        return [request_tensor("label", "int64", about="class; 0 is none", low=0, high=len(self.labels)), row]

    def describe_options(self) -> tuple[OptionSpec, ...]:
        samplers = SAMPLERS if self.options.method == "diffusion" else ("consistency",)
        return tuple(replace(o, choices=samplers) if o.name == "sampler" else o for o in super().describe_options())

    def describe_loop(self, loop: Loop | None) -> Loop | None:
        guided = bool(self.labels or self.text) and self.options.method == "diffusion"
        return loop and replace(loop, schedule=self.options.schedule, predicts=self.options.predicts, guidance=guided)

    def describe_postprocessing(self, members: int) -> Sequence[Step]:
        name, kind = self.output_media
        return [
            Step("scale_pixels", "clamp to -1 .. 1, then (value + 1) * 127.5", True),
            Step(f"encode_{name}", f"encode as {kind.partition('/')[2].upper()}", False),
        ]

    def describe_record(self) -> Sequence[RecordField]:
        name, kind = self.output_media
        made = RecordField(name, "string", f"the generated {name}", media_types=(kind,))
        if self.text is not None:
            return [RecordField("caption", "string", "the caption as the model reads it"), made]
        return [RecordField("class", "string", "the class", **list_values(self.labels)), made] if self.labels else [made]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), tokens=self.options.length if self.text is not None else None)


class VideoGenerationSignature(GenerationSignature):
    """The signature of video generation. Networks that continue images take rows with a class or caption, and the first frame."""

    max_request_rows: ClassVar[int] = 16
    output_media: ClassVar[tuple[str, str]] = ("video", "image/webp")

    def set_row_form(self) -> None:
        """Set whether a request holds rows or values alone, after the options are known."""
        vars(self)["row_form"] = "table" if self.options.first_frame else "value"

    def describe_inputs(self) -> Sequence[InputField]:
        if not self.options.first_frame:
            return super().describe_inputs()
        size = describe_image_format(self.pictures)
        about = "the first frame of the video; by default it is generated, too"
        first = describe_column(Column("image", "image"), image=size)
        return [*super().describe_inputs(), replace(first, required=False, about=about)]

    def describe_preprocessing(self, card: Card) -> Sequence[Step]:
        steps = super().describe_preprocessing(card)
        return [*list_image_steps(self.pictures), *steps] if self.options.first_frame else steps

    def describe_request_tensors(self, card: Card) -> Sequence[TensorSpec]:
        if not self.options.first_frame:
            return super().describe_request_tensors(card)
        p = self.pictures
        axes = Axis("channels", p.channels), Axis("height", p.side), Axis("width", p.side)
        return [
            *super().describe_request_tensors(card),
            request_tensor("first", "float32", *axes, about="first frames, -1 to 1", low=-1, high=1),
            request_tensor("known", "bool", about="whether the first frame is given"),
        ]

    def describe_limits(self) -> Limits:
        return replace(super().describe_limits(), frames=video.MAX_FRAMES)
