"""Exports of anomaly detection in images, compared with the run in a process without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import fieldguide
from fieldguide.data import samples
from fieldguide.exporting.builders import build_graph
from fieldguide.exporting.comparison import Comparison
from fieldguide.exporting.export import export
from fieldguide.exporting.folder import write_folder
from fieldguide.exporting.verify import verify
from test_exporting_image_text import write_photos

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """Four normal images and four of each defect, where the sample has them."""
    source, folder = samples.path("fabric"), tmp_path_factory.mktemp("fabric")
    for kind in sorted({path.parent for path in source.rglob("*.png")}):
        for path in sorted(kind.glob("*.png"))[:4]:
            (folder / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(source)).write_bytes(path.read_bytes())
    return str(folder)


@pytest.mark.slow
def test_maps_of_raw_images_are_equal(few_images, tmp_path):
    run = fieldguide.open_run(GOLDEN / "v2-anomaly-detection-in-images")
    done = export(run, data=few_images, out=tmp_path / "export")
    assert done.passed and done.verification.rows >= 8 and done.verification.largest < 1e-5, done.verification.problems
    assert len((done.path / "run.py").read_text().splitlines()) < 150
    photos = write_photos(tmp_path / "photos")
    command = [sys.executable, "-E", str(done.path / "run.py"), str(photos)]
    found = [
        json.loads(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    assert len(found) == 5 and Comparison(1e-4).compare(list(run.predict(str(photos))), found)[1] == ""
    program = (done.path / "run.py").read_text()
    for old, new in {"127.5": "100.0", "float(x)": "float(y)"}.items():
        assert old in program
        (done.path / "run.py").write_text(program.replace(old, new))
        assert not verify(run, done.path, few_images).passed


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["mean", "unit"])
def test_mistakes_in_a_graph_are_found(mistake, few_images, tmp_path):
    run = fieldguide.open_run(GOLDEN / "v2-anomaly-detection-in-images")
    graph = build_graph(run)
    if mistake == "mean":
        transform = graph.module.front.transform
        graph.module.front.transform = replace(transform, mean=tuple(m + 0.05 for m in transform.mean))
    else:
        graph.module.back.unit *= 1.05
    write_folder(run, graph, tmp_path / "export", "run")
    assert not verify(run, tmp_path / "export", few_images).passed


@pytest.mark.slow
def test_maps_of_a_backbone_are_equal(few_images, tmp_path):
    settings = {"task.side": 32, "model.backbone": "resnet", "model.values": (("widths", (4, 8, 8)), ("depths", (1, 1, 1)))}
    run = fieldguide.fit("fabric", task="anomaly-detection", model="patchcore-test", out=tmp_path / "run", settings=settings)
    done = run.export(out=tmp_path / "export", data=few_images)
    assert done.passed and done.verification.rows >= 8, done.verification.problems
