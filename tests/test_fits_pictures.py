"""Image networks learn the sample `digits` with the recipes of their cards."""

from __future__ import annotations

import pytest

from fieldguide.automl.fit import fit
from fieldguide.core.errors import SettingsError

LEARN = {  # steps of 32, and the least accuracy; chance is 0.10
    "convnextv2-atto": (120, 0.4),
    "vit-mini": (120, 0.4),
    "dinov2-mini": (250, 0.8),
    "dinov3-mini": (250, 0.8),
    "beit-mini": (250, 0.4),
    "mobilenetv4-conv-small-050": (120, 0.4),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", LEARN)
def test_learns_with_the_recipe_of_its_card(size, tmp_path):
    steps, floor = LEARN[size]
    run = fit("digits", model=size, out=tmp_path / "run", settings={"steps": steps, "batch": 32})
    assert run.scores["accuracy"] > floor


def test_images_that_are_too_small_are_rejected(tmp_path):
    with pytest.raises(SettingsError, match="images of 8 pixels per side are too small: AlexNet needs at least"):
        fit("digits", model="alexnet", out=tmp_path / "run", settings={"steps": 1})
