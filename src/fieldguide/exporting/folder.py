"""Exported folders: the model, its signature, the program that runs it, and the report of its verification.

model.*           the network with all steps that can be part of a graph, in the format of the export
encoder.*         the part that is called once before the steps of a loop, if there is one
signature.json    inputs, tensors, steps and records (docs/signature.md)
export.json       what run.py needs: columns, names of classes, special tokens
loop.json         how the graph is called several times for one prediction, if it is
run.py            predicts from raw inputs with numpy and the runtime of the format
images.py         decodes images, where run.py has more to do than that
requirements.txt  the packages of run.py
verify.json       the comparison with the run on held-out rows, made in a process without fieldguide
README.md         how to use it
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import torch

from fieldguide.core.errors import SettingsError
from fieldguide.exporting.calibration import quantize_folder
from fieldguide.exporting.graph import Graph
from fieldguide.exporting.graph_format import GraphFormat, Port
from fieldguide.exporting.onnx_file import OnnxFormat
from fieldguide.exporting.precision import Precision

if TYPE_CHECKING:
    from fieldguide.inference.predictor import TaskPredictor

REQUIREMENTS = {
    "numpy": "numpy>=1.26",
    "onnxruntime": "onnxruntime>=1.18",
    "torch": f"torch>={'.'.join(torch.__version__.split('.')[:2])}",  # older ones do not read files of newer ones
    "executorch": "executorch>=1.5",
    "pillow": "pillow>=10.1",
    "tokenizers": "tokenizers>=0.20",
    "jinja2": "jinja2>=3.1",
    "soundfile": "soundfile>=0.12.1",
    "scipy": "scipy>=1.11",
    "regex": "regex>=2023.6",
}
STANDARD = {"collections", "datetime", "re", "math", "unicodedata", "wave", "io", "base64", "itertools"}
END = '\n\nif __name__ == "__main__":\n    main()\n'
UNVERIFIED = ".unverified"  # suffix of folders whose verification failed
README = """# {title}

{task} with `{architecture}`, exported from {source} by fieldguide. `verify.json` has the comparison with the original.

    pip install -r requirements.txt
    python run.py {example}          # one JSON record for each row

```python
import run
model = run.Model()
model.predict([{row}])
```

`{file}` is {about}.

| input | type | axes |
| --- | --- | --- |
{inputs}

| output | type | axes |
| --- | --- | --- |
{outputs}

Steps outside the graph, which `run.py` does: {outside}.
"""


def check_target(out: Path) -> None:
    """Raise `SettingsError` if a folder cannot be written to."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise SettingsError(f"{out} exists already. Choose another folder with --out, or delete it.")


@contextmanager
def make_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` if the block succeeds. Raises `SettingsError` if `out` holds something."""
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as name:
        folder = Path(name) / "export"
        folder.mkdir()
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)


def build_program(parts: Sequence[str], first: str = "common", end: str = END) -> str:
    """Return the source of run.py: the common part, and those for one kind of input. A module of it has another first part and no end."""
    folder = files(__package__).joinpath("runners")
    common, *sources = (folder.joinpath(f"{part}.py").read_text(encoding="utf-8") for part in (first, *parts))
    is_import = lambda line: line.startswith(("import ", "from "))
    imports = [line for source in sources for line in source.splitlines(keepends=True) if is_import(line)]
    rest = "\n\n\n".join(
        "".join(line for line in source.splitlines(keepends=True) if not is_import(line)).strip("\n") for source in sources
    )
    head, marker, tail = common.partition("import numpy as np\n")
    standard = [line for line in imports if line.split()[1].partition(".")[0] in STANDARD]
    other = [line for line in imports if line not in standard]
    return (
        f"{''.join((head.rstrip() + chr(10), *standard, chr(10)))}{marker}{''.join(other)}{tail.rstrip()}\n\n\n{rest}\n" + end
    )


def write_folder(
    predictor: TaskPredictor,
    graph: Graph,
    out: Path,
    source: str,
    precision: Precision = "float32",
    form: GraphFormat | None = None,
    calibration: pl.DataFrame | None = None,
) -> None:
    """Write everything but verify.json, in a format, ONNX by default. The folder appears complete or not at all.

    With raw rows for `calibration`, int8 includes the activations.
    """
    form = form or OnnxFormat()
    stored = precision if calibration is None else "float32"
    with make_folder(out) as folder:
        graphs = {"model": graph, **graph.further}
        written = {name: form.write(one, folder / f"{name}{form.suffix}", stored) for name, one in graphs.items()}
        signature = predictor.signature
        dump(folder / "signature.json", signature.to_json())
        renamed = {column: name for about in written.values() for column, name in about.pop("renamed", {}).items()}
        dump(folder / "export.json", {"task": signature.task, "renamed": renamed, "graphs": written, **graph.values})
        if graph.loop:
            dump(folder / "loop.json", {**graph.loop, "inputs": [i.name for i in graph.inputs], "outputs": graph.outputs})
        (folder / "run.py").write_text(build_program(graph.parts), encoding="utf-8")
        for name, parts in {"session": ("session_module", *form.session), **graph.modules}.items():
            (folder / f"{name}.py").write_text(build_program(parts[1:], parts[0], end=""), encoding="utf-8")
        needed = [REQUIREMENTS[package] for package in ("numpy", *form.packages, *graph.requires)]
        (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
        preprocess = folder.parent / "preprocess"  # temporary too
        predictor.task.save(preprocess)
        for file in graph.files:
            shutil.copy(preprocess / file, folder / file)
        if calibration is not None:
            quantize_folder(folder, calibration)
        (folder / "README.md").write_text(build_readme(predictor, graph, folder, source, form), encoding="utf-8")


def build_readme(predictor: TaskPredictor, graph: Graph, folder: Path, source: str, form: GraphFormat) -> str:
    """Return the README of an export."""
    file = f"model{form.suffix}"
    inputs, outputs = form.describe(graph, folder / file)
    signature = predictor.signature
    row = ", ".join(f'"{field.name}": ...' for field in signature.inputs[:4])
    outside = [step.name for step in (*signature.preprocessing, *signature.postprocessing) if not step.in_graph]
    return README.format(
        title=folder.parent.name if not source else Path(source).name,
        task=signature.task,
        architecture=signature.architecture,
        source=f"`{Path(source).name}`",
        example="photo.jpg" if "pictures" in graph.parts or "images" in graph.modules else "rows.csv",
        row="{" + row + (", ..." if len(signature.inputs) > 4 else "") + "}",
        file=file,
        about=form.about,
        inputs=tabulate(inputs),
        outputs=tabulate(outputs),
        outside=", ".join(outside) or "none",
    )


def tabulate(ports: Sequence[Port]) -> str:
    """Return rows of a Markdown table."""
    return "\n".join(f"| `{port.name}` | {port.type} | {', '.join(port.axes)} |" for port in ports)


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
