"""Create the file and the test row of a new model: python tools/new_model.py NAME FAMILY [--root FOLDER]

The result is a complete, trainable toy: a two-layer network on images with a slow reference. Replace its parts one by one.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

FAMILIES = ("feedforward", "convolutional", "recurrent", "transformer", "adversarial", "diffusion")

MODEL = '''"""{title}: one line on its idea (Authors 2000, arXiv:0000.00000).

New here: what this paper brought that others did not have.

Initialization: how weights start, with the section of the paper.
Shapes: B batch, C channels, H W height and width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fieldguide.core.card import Card, Size
from fieldguide.models.layers.classifier_head import OUTPUT_TYPES, classifier_head


@dataclass(frozen=True, kw_only=True)
class Config:
    output_type: str = "label"  # or vector: the input of the last layer
    num_classes: int = 10
    channels: int = 3  # C
    dim: int = 32  # D


class {title}(nn.Module):
    """Images -> logits or vectors."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(config.channels, config.dim, 2, 2)
        self.head = classifier_head(config, config.dim)

    @property
    def levels(self) -> dict[str, tuple[int, int]]:
        """Name of each map of `features` -> (D, stride in pixels)."""
        return {{"c1": (self.config.dim, 2)}}

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps by name, finest first."""
        return {{"c1": self.stem(x).relu()}}

    def forward(self, x: Tensor) -> Tensor:  # B C H W -> B num_classes, or B D
        return self.head(self.features(x)["c1"].mean((2, 3)))


CARD = Card(
    name="{name}",
    model={title},
    config=Config,
    paper="arXiv:0000.00000",
    year=2000,
    input_type="image",
    output_type=OUTPUT_TYPES,
    sizes={{
        "{name}-s": Size(),
        "{name}-test": Size(num_classes=3, channels=2, dim=64),
    }},
    recipe={{"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.05}},
)
'''

CASE = """    "{name}": Case(inputs=image, peer=equations(references.{module}), lr=0.1),
"""

REFERENCE = '''

def {module}(p: Mapping[str, Tensor], x: Tensor) -> Tensor:  # B C H W -> B num_classes
    """{title}, equation by equation. Replace it by the equations of the paper, or the row by a class of another library."""
    rows, columns = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    patches = x[:, :, :rows, :columns].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B C h 2 w 2
    y = torch.einsum("bchiwj,dcij->bdhw", patches, p["stem.weight"]) + p["stem.bias"][:, None, None]
    y = torch.where(y > 0, y, 0.0).mean((2, 3))
    return y @ p["head.weight"].T + p["head.bias"]
'''


def main(arguments: list[str] | None = None) -> None:
    """Write the model file and print the row for tests/cases.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="lower-case words joined by hyphens, such as my-net")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="the repository")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", options.name):
        parser.error(f"{options.name!r}: use lower-case words joined by hyphens, such as my-net")
    module, title = options.name.replace("-", "_"), "".join(word.capitalize() for word in options.name.split("-"))
    path = options.root / "src/fieldguide/models" / options.family / f"{module}.py"
    if path.exists():
        parser.error(f"{path} exists already")
    cases, references = options.root / "tests/cases.py", options.root / "tests/references.py"
    rows = cases.read_text()
    if f'"{options.name}":' in rows:
        parser.error(f"{cases} has a row {options.name!r} already")
    names = {"name": options.name, "title": title, "module": module}
    start = rows.index("CASES = {")
    end = rows.index("\n}\n", start) + 1
    cases.write_text(rows[:end] + CASE.format(**names) + rows[end:])
    references.write_text(references.read_text() + REFERENCE.format(**names))
    path.write_text(MODEL.format(**names))
    print(f"created {path}, a row in {cases} and a reference in {references}: fill them in, then\n")
    print(f"    python -m pytest tests/test_models.py -k {options.name}\n    make catalogue")


if __name__ == "__main__":
    sys.exit(main())
