"""YOLOv8n on 320 x 320 pictures: training steps with assignment and loss, and answers with suppression, against ultralytics.

    pip install --no-deps --target peers ultralytics ultralytics-thop opencv-python-headless psutil py-cpuinfo
    PYTHONPATH=peers YOLO_CONFIG_DIR=peers python benchmarks/detection.py [--save]

The peer is AGPL-3.0 and used as it comes, by its public names. Every picture has 8 boxes. "like for like": float32, clipped,
fused AdamW, the peer's own loss in a plain loop. "defaults": ours with its recipe (a running average of weights among it)
and the precision and layout that `fit` chooses by timing, against plain AdamW; of answers, the peer's convolutions are
fused with their normalisations, as its `predict` does. Answers have dozens of candidates a picture above a confidence
of 0.25, and thousands above 0.001, at which both score.
"""

from __future__ import annotations

import logging

import torch
from common import Pair, Run, check_equal, compare, describe_sizes, make_parser, parse_options
from loops import LIKE, read_recipe, repeat_batches, run_inference, run_plain_steps, run_trainer
from torch import Tensor, nn

from fieldguide import create
from fieldguide.checkpoints import weights
from fieldguide.objectives import Detection
from fieldguide.objectives.detection import decode, make_grid

try:
    logging.disable(logging.WARNING)
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.nms import non_max_suppression
except ImportError as error:
    raise SystemExit(f"{error}: install ultralytics first (see the top of this file)") from None

SIDE, BATCH, BOXES, CLASSES = 320, 8, 8, 80
OVERLAP, MOST = 0.7, 300


def make_images(rows: int) -> Tensor:
    return torch.rand(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def make_truth() -> tuple[Tensor, Tensor]:  # B N 4 in pixels, B N
    chance = torch.Generator().manual_seed(1)
    middle, side = (torch.rand(BATCH, BOXES, 2, generator=chance) for _ in range(2))
    boxes = torch.cat([middle - 0.05 - 0.2 * side, middle + 0.05 + 0.2 * side], -1).clamp(0, 1) * SIDE
    return boxes, torch.randint(CLASSES, (BATCH, BOXES), generator=chance)


@torch.no_grad()
def build_peer() -> nn.Module:
    """Return the peer with a head whose outputs vary over places as those of a trained one: about 60 boxes an image above 0.25."""
    torch.manual_seed(0)
    model, x = DetectionModel("yolov8n.yaml", ch=3, nc=CLASSES, verbose=False), make_images(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of this batch
    model.train()(x)
    logits = model.eval()(x)[0][:, 4:].logit()
    scale, mean = 6 / logits.std(), logits.mean()
    for name, tensor in model.state_dict().items():
        if name.startswith("model.22.cv3") and name.endswith("2.weight"):
            tensor.mul_(scale)
        elif name.startswith("model.22.cv3") and name.endswith("2.bias"):
            tensor.sub_(mean).mul_(scale).sub_(24)
    return model


def copy_peer_weights(model: nn.Module) -> nn.Module:
    """Return our network with the peer's weights."""
    mine = create("yolov8n", num_classes=CLASSES)
    assert not weights.load(mine, model.state_dict())
    return mine


def train(**settings: object) -> Run:
    boxes, labels = make_truth()
    batch = {"image": make_images(BATCH), "boxes": boxes, "labels": labels}
    return run_trainer(Detection(create("yolov8n", num_classes=CLASSES)), repeat_batches(batch), 1, **settings)


def peer(**settings: object) -> Run:
    boxes, labels = make_truth()
    wide = torch.cat([boxes[..., :2] + boxes[..., 2:], 2 * (boxes[..., 2:] - boxes[..., :2])], -1) / (2 * SIDE)
    batch = {
        "img": make_images(BATCH),
        "bboxes": wide.flatten(0, 1),
        "cls": labels.flatten()[:, None].float(),
        "batch_idx": torch.arange(BATCH).repeat_interleave(BOXES).float(),
    }
    model = DetectionModel("yolov8n.yaml", ch=3, nc=CLASSES, verbose=False)
    model.args = get_cfg()
    return run_plain_steps(model, lambda b: model.loss(b)[0].sum(), [batch], **settings)


def find_boxes(model: nn.Module, x: Tensor, confidence: float) -> list[Tensor]:
    """Return boxes, scores and labels (D 6) of each image by the network of either side."""
    if isinstance(model, DetectionModel):
        return non_max_suppression(model(x), confidence, OVERLAP, multi_label=True, max_det=MOST)
    output = Detection(model, confidence=confidence, overlap=OVERLAP, max_detections=MOST).outputs({"image": x})
    rows = torch.cat([output["boxes"], output["scores"][..., None], output["labels"][..., None]], -1)
    return [row[row[:, 4] > 0] for row in rows]


def answer(side: str, confidence: float, fused: bool = False) -> Run:
    model, x = build_peer(), make_images(BATCH)
    model = copy_peer_weights(model) if side == "ours" else model.eval().fuse(verbose=False) if fused else model
    return run_inference(model, lambda: find_boxes(model, x, confidence))


def check() -> str:
    model, x = build_peer().eval(), make_images(2)
    mine = copy_peer_weights(model).eval()
    with torch.inference_mode():
        want = model(x)[0].mT
        boxes, _, logits = decode(mine(x), mine.bins, *make_grid(SIDE, SIDE, mine.strides, x.device))
        middle, side = want[..., :4].chunk(2, -1)
        notes = [
            describe_sizes(mine, model),
            check_equal("boxes", boxes, torch.cat([middle - side / 2, middle + side / 2], -1)),
            check_equal("probabilities", logits.sigmoid(), want[..., 4:]),
        ]
        above = [(want[..., 4:] > least).sum().item() // len(x) for least in (0.25, 0.001)]
        kept, others = (torch.cat(find_boxes(network, x, 0.25)) for network in (mine, model))
        others[:, :4].clamp_(0, SIDE)  # the peer leaves that to a later step
        notes.append(check_equal("boxes left above 0.25", kept, others))
    return " ".join([*notes, f"Candidates a picture: {above[0]:,} above 0.25 and {above[1]:,} above 0.001."])


def main() -> None:
    options = parse_options(make_parser(__doc__.splitlines()[0], steps=2, rounds=4))
    compare(
        f"YOLOv8n, {SIDE} x {SIDE}, batch {BATCH}",
        "pictures",
        "ultralytics",
        [
            Pair(
                "training, like for like", lambda: train(precision="float32", **LIKE), lambda: peer(fused=True, **LIKE), BATCH
            ),
            Pair("training, defaults", lambda: train(**read_recipe("yolov8n")), lambda: peer(lr=1e-3), BATCH),
            Pair("answers above 0.25, like for like", lambda: answer("ours", 0.25), lambda: answer("peer", 0.25), BATCH),
            Pair("answers above 0.25, defaults", lambda: answer("ours", 0.25), lambda: answer("peer", 0.25, fused=True), BATCH),
            Pair("answers above 0.001, like for like", lambda: answer("ours", 0.001), lambda: answer("peer", 0.001), BATCH),
        ],
        options,
        check,
    )


if __name__ == "__main__":
    main()
