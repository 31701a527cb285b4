"""Keypoint detection: boxes with class labels, and the keypoints of each object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fieldguide.core.card import Card
from fieldguide.core.errors import DataError, SettingsError
from fieldguide.core.report_elements import ReportElement
from fieldguide.core.settings import Settings
from fieldguide.data.dataset import Column, Data
from fieldguide.data.media.boxes import Skeleton
from fieldguide.data.preprocessing.augmentation import BoxAugmentation
from fieldguide.data.preprocessing.detection import Letterbox
from fieldguide.objectives import Objective
from fieldguide.objectives.pose_detection import BOX_FILL, PoseDetection
from fieldguide.tasks.base import Arrays, Baseline, Metric
from fieldguide.tasks.supervised import fill_options
from fieldguide.tasks.vision.keypoint_report import build_pose_elements, draw_poses
from fieldguide.tasks.vision.object_detection import MAX_DETECTIONS, Letterboxed, ObjectDetection
from fieldguide.tasks.vision.signature import PoseSignature

# Names of COCO's keypoints of persons and their tolerances (cocodataset.org/#keypoints-eval).
COCO_SIGMAS = {
    "nose": 0.026,
    **{f"{side}_{name}": sigma for name, sigma in (("eye", 0.025), ("ear", 0.035)) for side in ("left", "right")},
    **{
        f"{side}_{name}": sigma
        for name, sigma in (
            ("shoulder", 0.079),
            ("elbow", 0.072),
            ("wrist", 0.062),
            ("hip", 0.107),
            ("knee", 0.087),
            ("ankle", 0.089),
        )
        for side in ("left", "right")
    },
}
DEFAULT_SIGMA = 0.05  # of other keypoints; the mean of COCO's is 0.066
KNOWN_PROBABILITY = 0.5  # from which on a predicted keypoint is shown


class LetterboxedPoses(Letterboxed, PoseDetection):
    """Pose detection whose predictions are in image pixels."""

    def outputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found = super().outputs(batch)
        points, known = found["keypoints"][..., :2], found["keypoints"][..., 2:]
        points = (points - batch["corner"][:, None, None]) / batch["scale"][:, None, None]
        real = (found["labels"] >= 0)[..., None, None]
        return {**found, "keypoints": torch.cat([points, known], -1) * real}


class KeypointDetection(PoseSignature, ObjectDetection):
    name = "keypoint-detection"
    reads = "images with boxes and keypoints: COCO JSON (person_keypoints), or YOLO (data.yaml with kpt_shape)"
    output_types = ("poses",)
    metrics = (
        Metric("map", "max", "mean average precision of keypoints (OKS 0.50 to 0.95)", percent=True, label="OKS mAP"),
        Metric("map50", "max", "mean average precision of keypoints at OKS 0.50", percent=True, label="OKS mAP50"),
    )

    @dataclass(frozen=True)
    class Options(ObjectDetection.Options):
        sigmas: str = ""  # tolerance of keypoints as a fraction of the object's size: one number, or one of each keypoint

    skeleton: Skeleton
    sigmas: tuple[float, ...]

    # Data

    @classmethod
    def match(cls, data: Data) -> str | None:
        return "images with keypoints" if cls.missing_requirements(data) is None and has_keypoints(data) else None

    @classmethod
    def missing_requirements(cls, data: Data) -> str | None:
        if lack := super().missing_requirements(data):
            return lack
        if isinstance(data.context, Mapping) and "skeleton" in data.context:
            return None
        return "keypoints: `keypoints` of the categories and annotations in COCO, or `kpt_shape` in data.yaml of YOLO"

    @classmethod
    def check_split(cls, data: Data, name: str, options: Any) -> None:
        super().check_split(data, name, options)
        if not has_keypoints(data):
            raise DataError(
                f"{data.source}: no object of the {len(data):,} {name} images has a labeled keypoint, so they cannot be "
                f"{'trained on' if name == 'training' else 'scored'}. Add annotated images to them, or divide the images differently."
            )

    @classmethod
    def fit(cls, data: Data, options: Any) -> Self:
        task = super().fit(data, options)
        task.skeleton = data.context["skeleton"]
        task.sigmas = choose_sigmas(task.skeleton.names, options.sigmas)
        if not task.skeleton.mirrored and task.options.flip:
            task.options = fill_options(replace(task.options, flip=0.0))
            task.notes.append(
                "images are not mirrored, since it is not known which keypoints are left and right: name them so, or add "
                "`flip_idx` to data.yaml"
            )
        points = np.concatenate([p.reshape(-1, len(task.skeleton.names), 3) for p in task.true_keypoints(data)])
        seen: list[bool] = np.any(points[..., 2] > 0, axis=0).tolist()
        lacking = [name for name, there in zip(task.skeleton.names, seen) if not there]
        if lacking:
            task.notes.append(f"keypoints that no training image has: {', '.join(lacking)}; they cannot be predicted")
        return task

    def true_keypoints(self, data: Data) -> list[np.ndarray]:
        """Return, per image, x, y and visibility of the keypoints of each object, (M, P, 3), zeros if not labeled."""
        count, found = len(self.skeleton.names), []
        for objects in data.rows[self.target.name].to_list():
            some = [o["keypoints"] or [0.0] * 3 * count for o in objects or [] if o["label"] in self.names]
            found.append(np.array(some, dtype=np.float32).reshape(-1, count, 3))
        return found

    # Training

    def model_dims(self) -> dict[str, Any]:
        return {**super().model_dims(), "keypoints": len(self.skeleton.names)}

    def objective(self, model: Any, card: Card, settings: Settings, **parts: Any) -> Objective:
        return LetterboxedPoses(
            model, card.inputs, sigmas=self.sigmas, overlap=self.predict_options.overlap, max_detections=MAX_DETECTIONS
        )

    def train_targets(self, data: Data, frame: Letterbox) -> tuple[Any, ...]:
        """Return boxes followed by keypoints in pixels of the input, N M 4+2P, NaN for keypoints that are not labeled."""
        boxes, labels = super().train_targets(data, frame)
        crowd = self.true_boxes(data)[2]
        points = torch.full((*labels.shape, len(self.skeleton.names), 2), float("nan"))
        for i, (known, around) in enumerate(zip(self.true_keypoints(data), crowd)):
            some = torch.from_numpy(known[~around])
            own = some[..., :2] * frame.scale[i] + frame.corner[i]
            points[i, : len(some)] = torch.where(some[..., 2:] > 0, own, float("nan"))
        return torch.cat([boxes, points.flatten(-2)], -1), labels

    def train_batch(self, pictures: Tensor, boxes: Tensor, labels: Tensor, *others: Any) -> dict[str, Tensor]:
        """Return the tensors of a batch; keypoints that left the image by augmentation are not labeled."""
        points = boxes[..., 4:].unflatten(-1, (-1, 2))
        inside = ((points >= 0) & (points <= pictures.shape[-1])).all(-1, keepdim=True)
        batch = super().train_batch(pictures, boxes[..., :4], labels)
        return {**batch, "keypoints": torch.where(inside, points, float("nan"))}

    def augment(self, settings: Settings | None) -> BoxAugmentation | None:
        found = super().augment(settings)
        return found and replace(found, order=self.skeleton.mirrored)

    # Scores

    @property
    def evaluation(self) -> dict[str, Any]:
        return {"kind": "keypoints", "sigmas": self.sigmas}

    def targets(self, data: Data) -> Arrays:
        """Return boxes, labels and crowd flags, `keypoints` (N, M, P, 3) in original pixels, and `area` (N, M)."""
        found = super().targets(data)
        points = np.zeros((*found["labels"].shape, len(self.skeleton.names), 3), dtype=np.float32)
        for i, known in enumerate(self.true_keypoints(data)):
            points[i, : len(known)] = known
        sides = found["boxes"][..., 2:] - found["boxes"][..., :2]
        return {**found, "keypoints": points, "area": BOX_FILL * sides.prod(-1)}

    def baselines(self, train: Data, test: Data) -> list[Baseline]:
        """Return the mean pose of each class in its mean box, and in the true boxes: what is known without looking at poses."""
        boxes, labels, _ = self.true_boxes(train)
        sides, count = np.concatenate([b[:, 2:] - b[:, :2] for b in boxes]), len(self.skeleton.names)
        points, classes = np.concatenate(self.true_keypoints(train)), np.concatenate(labels)
        corner = np.concatenate([b[:, :2] for b in boxes])
        places = (points[..., :2] - corner[:, None]) / sides[:, None]
        seen = points[..., 2] > 0
        pose = np.full((len(self.names), count, 2), 0.5, dtype=np.float32)
        for k in range(len(self.names)):
            own = (classes == k)[:, None] & seen
            means = (places * own[..., None]).sum(0) / np.maximum(own.sum(0), 1)[:, None]
            pose[k] = np.where(own.any(0)[:, None], means, 0.5)

        def place(outputs: Arrays) -> Arrays:
            corner, size = outputs["boxes"][..., :2], outputs["boxes"][..., 2:] - outputs["boxes"][..., :2]
            own = corner[..., None, :] + pose[outputs["labels"].clip(min=0).astype(int)] * size[..., None, :]
            return {**outputs, "keypoints": np.concatenate([own, np.ones_like(own[..., :1])], -1)}

        truth = super().targets(test)
        known = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": (truth["labels"] >= 0).astype(np.float32)}
        mean = super().baselines(train, test)[0]
        return [
            Baseline("mean pose", "predicts the mean pose of every class in its mean box", place(mean.outputs)),
            Baseline(
                "mean pose in the true boxes", "knows every box, and predicts the mean pose of its class in it", place(known)
            ),
        ]

    # Predictions and report

    def describe_objects(self, outputs: Arrays, image: int, real: np.ndarray) -> list[dict[str, Any]]:
        found = super().describe_objects(outputs, image, real)
        for one, points in zip(found, outputs["keypoints"][image][real]):
            one["keypoints"] = [
                {"name": name, "x": round(float(x), 1), "y": round(float(y), 1), "score": float(p)}
                for name, (x, y, p) in zip(self.skeleton.names, points)
            ]
        return found

    def collect_outputs(self, records: Sequence[Mapping[str, Any]]) -> Arrays | None:
        found = super().collect_outputs(records)
        if found is None:
            return None
        points = np.zeros((*found["labels"].shape, len(self.skeleton.names), 3), dtype=np.float32)
        for row, record in zip(points, records):
            for place, one in zip(row, record["objects"]):
                place[:] = [(point["x"], point["y"], point["score"]) for point in one["keypoints"]]
        return {**found, "keypoints": points}

    def draw_objects(self, picture: Image.Image, outputs: Arrays, image: int, real: np.ndarray) -> Image.Image:
        drawn = super().draw_objects(picture, outputs, image, real)
        return draw_poses(drawn, outputs["keypoints"][image][real], self.skeleton.lines, KNOWN_PROBABILITY)

    def report_elements(
        self, test: Data, outputs: Arrays, targets: Arrays, objective: Objective | None = None
    ) -> dict[str, list[ReportElement]]:
        boxes = super().report_elements(test, outputs, targets, objective)
        names = [Path(test.locate_row(i)).name for i in range(len(test))]
        paths = test.rows[self.column].to_list()
        poses = build_pose_elements(
            paths, names, outputs, targets, self.skeleton, self.sigmas, self.score_threshold, KNOWN_PROBABILITY, self.scale
        )
        return {**poses, "Boxes": boxes["Classes"]}

    # Saved with the run

    STATE: ClassVar = {"keypoints": list[str], "lines": list[tuple[int, int]], "mirrored": list[int], "sigmas": list[float]}

    def state(self) -> dict[str, Any]:
        own = self.skeleton
        names = {"keypoints": list(own.names), "lines": [list(pair) for pair in own.lines], "mirrored": list(own.mirrored)}
        return {**super().state(), **names, "sigmas": list(self.sigmas)}

    @classmethod
    def from_state(cls, columns: list[Column], options: Any, state: dict[str, Any], folder: Path) -> Self:
        task = super().from_state(columns, options, state, folder)
        lines = tuple((a, b) for a, b in state["lines"])
        task.skeleton = Skeleton(tuple(state["keypoints"]), lines, tuple(state["mirrored"]))
        task.sigmas = tuple(state["sigmas"])
        return task


def has_keypoints(data: Data) -> bool:
    """Return whether any object has a labeled keypoint."""
    every = data.rows[data.required_target.name].to_list()
    return any(any(o["keypoints"][2::3]) for objects in every for o in objects or [] if o["keypoints"] and not o["crowd"])


def choose_sigmas(names: tuple[str, ...], given: str) -> tuple[float, ...]:
    """Return the tolerance of each keypoint: the given ones, else COCO's if the names are those of COCO, else one for all."""
    if not given:
        known = [COCO_SIGMAS.get(name.lower()) for name in names]
        return tuple(s if s and all(known) else DEFAULT_SIGMA for s in known)
    try:
        values = [float(word) for word in given.split(",")]
    except ValueError:
        values = []
    values = values * len(names) if len(values) == 1 else values
    if len(values) != len(names) or not all(0 < v < math.inf for v in values):
        raise SettingsError(
            f"task.sigmas={given!r} must be one positive number, or one for each of the {len(names)} keypoints, separated by commas."
        )
    return tuple(values)


TASKS = (KeypointDetection,)
