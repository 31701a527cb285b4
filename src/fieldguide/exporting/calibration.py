"""Static int8 of image networks: weights and activations in 8 bits, with ranges measured on images of the training part.

Other networks keep activations in float32 (`precision.py`). onnxruntime quantizes, with a QuantizeLinear and a DequantizeLinear node
around each operator with weights (QDQ), which it and other runtimes replace by operators of integers.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from fieldguide.exporting.graph import ExportError, Graph
from fieldguide.exporting.requests import choose_training_rows
from fieldguide.exporting.tracing import quiet_tracing

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

MAX_IMAGES = 128  # with which ranges are measured
QUANTIZED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, run
for number, row in enumerate(run.read(sys.argv[2])):
    numpy.savez(f"{sys.argv[3]}/{number:06}.npz", **run.collate([run.prepare(row)]))
"""


def choose_images(predictor: TaskPredictor, graph: Graph) -> pl.DataFrame | None:
    """Return raw rows with images of the training part; None for other networks, and for published ones, whose training part is unknown.

    Nor for models that are fitted by a solver: histograms of gradients and distances to a memory need the precision of activations.
    """
    is_image_network = not graph.further and not graph.loop and any(spec.name == "pixels" for spec in graph.inputs)
    return choose_training_rows(predictor, MAX_IMAGES) if is_image_network and not predictor.card.solver else None


def quantize_folder(folder: Path, rows: pl.DataFrame) -> None:
    """Replace the float32 graph of a folder by one in int8, calibrated with what its program reads from raw rows."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        table = home / "rows.csv"
        rows.write_csv(table)
        command = [sys.executable, "-IB", "-c", PROGRAM, str(folder), str(table), str(home)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise ExportError(f"run.py cannot read the images for calibration: {done.stderr.strip().splitlines()[-1]}")
        quantize_graph(folder / "model.onnx", home / "int8.onnx", sorted(home.glob("*.npz")))
        (folder / "model.onnx").write_bytes((home / "int8.onnx").read_bytes())


def quantize_graph(source: Path, target: Path, batches: list[Path]) -> None:
    """Write a graph with int8 weights for each output channel, and activations in uint8.

    Weights have 7 bits: processors without VNNI instructions add pairs of products in 16 bits, which 8 bits would overflow.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = read_batches(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    with quiet_tracing("onnxruntime cannot quantize this network"):
        quantize_static(
            str(source),
            str(target),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTIZED),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    model = onnx.load(str(target))
    del model.metadata_props[:]
    onnx.save(model, str(target))


def read_batches(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            yield dict(arrays)
