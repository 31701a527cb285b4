"""Classes of a checkpoint that a new network keeps: what was learned of a class is copied by its name.

A network with a method `find_class_rows(name, label, classes)` says which rows of its tensors belong to a class. Detectors of other
classes than the checkpoint's start from the rows of those that both have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fieldguide.checkpoints import config_mapping, run_folder
from fieldguide.checkpoints.names import CONFIG_FILE

# The classes of COCO by their number in its files; the numbers between them are not used.
COCO = {
    number: name
    for first, names in (
        (1, "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant"),
        (13, "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe"),
        (27, "backpack, umbrella"),
        (31, "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard"),
        (42, "surfboard, tennis racket, bottle"),
        (
            46,
            "wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut",
        ),
        (61, "cake, chair, couch, potted plant, bed"),
        (67, "dining table"),
        (70, "toilet"),
        (72, "tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator"),
        (84, "book, clock, vase, scissors, teddy bear, hair drier, toothbrush"),
    )
    for number, name in enumerate(names.split(", "), first)
}
# Number of classes of a network -> the class of each label.
COCO_BY_COUNT = {
    80: tuple(COCO.values()),
    90: tuple(COCO.get(number, "") for number in range(1, 91)),
    91: tuple(COCO.get(number, "") for number in range(91)),
}


def list_classes(path: Path, count: int) -> tuple[str, ...]:
    """Return the names of a checkpoint's classes: of its run or configuration, else those of COCO if the number is right.

    Empty if they are not known. A class without a name is empty text.
    """
    folder = path if path.is_dir() else path.parent
    if run_folder.is_run(folder):
        names: Any = run_folder.read_preprocessing(folder)[0].get("names")
    else:
        public = config_mapping.read(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        known = public.get("id2label") or {}
        names = [known.get(str(i), "") for i in range(count)] if isinstance(known, dict) else None
        if not names or all(str(name) in ("", f"LABEL_{i}") for i, name in enumerate(names)):
            names = COCO_BY_COUNT.get(count)
    return tuple(map(str, names)) if isinstance(names, list | tuple) and len(names) == count else ()


@torch.no_grad()
def copy_classes(
    model: nn.Module, state: Mapping[str, Tensor], there: Sequence[str], here: Sequence[str], fresh: Sequence[str]
) -> list[str]:
    """Copy the rows of the classes that a checkpoint and a network have in common, and return the names of these classes.

    Args:
        model: has a method `find_class_rows`, otherwise nothing is copied.
        state: tensors of the checkpoint under our names.
        there: the names of the checkpoint's classes.
        here: the names of the network's classes.
        fresh: the names of the tensors that were not loaded.
    """
    find = getattr(model, "find_class_rows", None)
    place = {simplify(name): label for label, name in enumerate(there) if name}
    shared = [(label, place[simplify(name)]) for label, name in enumerate(here) if simplify(name) in place]
    if find is None or not shared:
        return []
    mine, copied = model.state_dict(), False
    for name in fresh:
        own, other = mine[name], state.get(name)
        if other is None or own.ndim != other.ndim or own.shape[1:] != other.shape[1:]:
            continue
        for to, source in (*shared, (None, None)):
            rows, old = find(name, to, len(here)), find(name, source, len(there))
            if rows is not None and old is not None:
                own[rows] = other[old].to(own.dtype)
                copied = True
    return [here[label] for label, _ in shared] if copied else []


def simplify(name: str) -> str:
    """Return a class name without regard to case, underscores and hyphens."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
