"""Export of trained models: folders that run without fieldguide, verified on held-out rows, and files of other libraries."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldguide.core.errors import FieldguideError, SettingsError, nearest

if TYPE_CHECKING:
    from fieldguide.exporting.graph_format import GraphFormat
    from fieldguide.exporting.verify import Verification


@dataclass
class Export:
    """A written export.

    `passed` says whether it equals the original; None if it could not be compared. `verification` is the comparison on raw rows,
    of folders with a graph only, made in a process `without` a module. `note` says what else is to know.
    """

    path: Path
    format: str
    passed: bool | None
    verification: Verification | None = None
    note: str = ""
    without: str = ""


def export(
    source: Any,
    to: str = "onnx",
    *,
    out: str | Path | None = None,
    data: str | None = None,
    name: str | None = None,
    precision: str | None = None,
) -> Export:
    """Export a run, or a published network with a task, to a folder, and verify it.

    Args:
        source: a run folder, an open run or a predictor.
        to: "onnx", "torch" for a program of `torch.export`, "executorch" for one of ExecuTorch, "huggingface" for a folder that
            transformers or diffusers read, or "gguf" for a file of llama.cpp.
        out: the folder to write; by default the run's path with the format appended.
        data: raw inputs with targets to verify with; by default the held-out rows of the data that the run was trained on.
        precision: of the stored weights, "float32", "float16" or "int8"; by default "float16" for GGUF, else "float32".
        name: what a predictor is called in the README, and what `out` is derived from.

    Raises `SettingsError` for a model that cannot be exported in this format. A folder whose verification fails is renamed to
    `*.unverified`.
    """
    if to not in FORMATS:
        raise SettingsError(f"unknown format {to!r}.{nearest(to, FORMATS)} Formats are {', '.join(FORMATS)}.")
    from fieldguide.inference.pipeline import pipeline

    given = isinstance(source, str | Path)
    predictor = pipeline(source) if given else source
    name = name or str(source if given else getattr(predictor, "path", predictor.name))
    target = Path(out) if out is not None else Path(f"{name.rstrip('/').removeprefix('hf:')}-{to}")
    if precision not in (None, *PRECISIONS):
        raise SettingsError(f"unknown precision {precision!r}.{nearest(precision, PRECISIONS)} Choose {', '.join(PRECISIONS)}.")
    if to in WRITERS:
        if data is not None:
            raise SettingsError(
                f"--data is for formats with a graph ({', '.join(GRAPH_FORMATS)}); {to} is compared without data."
            )
        return WRITERS[to](predictor, target, name, precision or DEFAULT_PRECISIONS[to])
    form = load_format(to)
    if precision not in (None, *form.precisions):
        raise SettingsError(f"graphs of the format {to} have the precision {', '.join(form.precisions)}, not {precision}.")
    form.check_packages()
    return export_graph(predictor, target, name, data, precision or "float32", form)


def load_format(name: str) -> GraphFormat:
    """Return a format of graphs by name."""
    module, form = GRAPH_FORMATS[name]
    return getattr(importlib.import_module(f"fieldguide.exporting.{module}"), form)()


def export_graph(predictor: Any, out: Path, name: str, data: str | None, precision: Any, form: GraphFormat) -> Export:
    """Write and verify a folder with a graph."""
    from fieldguide.exporting.builders import build_graph
    from fieldguide.exporting.calibration import choose_images
    from fieldguide.exporting.folder import UNVERIFIED, check_target, dump, write_folder
    from fieldguide.exporting.graph import ExportError
    from fieldguide.exporting.requests import choose_requests
    from fieldguide.exporting.verify import verify

    check_target(out)
    graph = build_graph(predictor)
    found = data or getattr(predictor, "record", {}).get("data", {}).get("source")
    if found is None:
        write_folder(predictor, graph, out, name, precision, form)
        return Export(out, form.name, None, note="not verified: give data with known targets as --data")
    try:
        requests = choose_requests(predictor, found)
    except (FieldguideError, OSError) as error:
        if data:
            raise
        raise ExportError(
            f"the run's data, with which the export is verified, cannot be read: {error}\n"
            "Give data with known targets with --data."
        ) from error
    images = choose_images(predictor, graph) if precision == "int8" else None
    write_folder(predictor, graph, out, name, precision, form, images)
    try:
        result = verify(predictor, out, found, precision, chosen=requests, options=graph.test_options, form=form)
    except BaseException:
        shutil.rmtree(out)
        raise
    result.quantized = describe_precision(precision, images)
    dump(out / "verify.json", result.to_json())
    if not result.passed:
        out = out.rename(out.with_name(out.name + UNVERIFIED))
    return Export(out, form.name, result.passed, result, without=form.absent[0])


def describe_precision(precision: str, images: Any) -> str:
    """Return what is stored in fewer bits, for verify.json."""
    if precision == "float32":
        return ""
    return (
        f"weights in {precision}"
        if images is None
        else f"weights and activations in int8, calibrated with {len(images)} images"
    )


def export_huggingface(predictor: Any, out: Path, name: str, precision: Any) -> Export:
    """Write a folder that transformers or diffusers read, and compare the network that is loaded from it."""
    if precision != "float32":
        raise SettingsError("folders of transformers keep float32; load them with another dtype instead.")
    from fieldguide.exporting.huggingface import write_huggingface

    notes = write_huggingface(predictor, out, name)
    return Export(out, "huggingface", True, note="\n".join(["loaded again: equal outputs", *notes]))


def export_gguf(predictor: Any, out: Path, name: str, precision: Any) -> Export:
    """Write a GGUF file of a language model, and compare the network that is read from it."""
    from fieldguide.checkpoints.load import load
    from fieldguide.exporting.folder import make_folder
    from fieldguide.exporting.gguf import PROBES, compare_outputs, write_gguf
    from fieldguide.exporting.graph import ExportError
    from fieldguide.exporting.language import get_begin_token, get_chat_template, get_tokenizer

    network, text = getattr(predictor, "network", None) or predictor.model, get_tokenizer(predictor)
    if text is None or "tokens" not in predictor.card.output_types:
        raise ExportError("GGUF is a format of language models. Use --to onnx or --to huggingface.")
    path = out / f"{Path(name).name}-{precision}.gguf"
    template, begin = get_chat_template(predictor, text), get_begin_token(predictor, text)
    ends = getattr(predictor, "end_tokens", None) or text.ends
    with make_folder(out) as folder:
        write_gguf(
            network,
            predictor.card,
            text,
            folder / path.name,
            precision,
            template=template,
            begin=begin,
            ends=ends,
        )
        difference = compare_outputs(network, load(folder / path.name), GGUF_TOLERANCES[precision])
    note = f"read again: equal tokens of {PROBES:,} texts, log-probabilities differ by {difference:.1g} on average"
    return Export(path, "gguf", True, note=note)


PRECISIONS = ("float32", "float16", "int8")
DEFAULT_PRECISIONS = {"huggingface": "float32", "gguf": "float16"}
GGUF_TOLERANCES = {"float32": 1e-3, "float16": 0.02, "int8": 0.1}  # mean difference of log-probabilities
GRAPH_FORMATS = {
    "onnx": ("onnx_file", "OnnxFormat"),
    "torch": ("torch_file", "TorchFormat"),
    "executorch": ("executorch_file", "ExecutorchFormat"),
}  # module and class
WRITERS: dict[str, Callable[..., Export]] = {"huggingface": export_huggingface, "gguf": export_gguf}
FORMATS = (*GRAPH_FORMATS, *WRITERS)
