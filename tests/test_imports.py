"""Import rules between folders, modules loaded at startup, and the exported names."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import fieldguide

ROOT = Path(fieldguide.__file__).parent

# Folder -> the folders that its files may import, at the top of a file or inside a function. Lower folders first: a folder
# imports only from those above it in this table, so the table is an order. `pkg` is fieldguide/__init__.py.
MAY = {
    "core": set(),
    "pkg": {"core"},  # the version
    "data": {"core"},
    "metrics": {"core"},  # plain arrays in, numbers out
    "models": {"core"},  # plain nn.Modules that know neither data nor training
    "objectives": {"core", "data", "models"},
    "training": {"core", "data", "objectives"},  # knows neither tasks nor architectures
    "checkpoints": {"core", "data", "models"},
    "tasks": {
        "core",
        "data",
        "metrics",
        "models",
        "objectives",
        "checkpoints",
    },  # of the latter, networks that features come from
    "inference": {"core", "data", "models", "objectives", "training", "tasks", "checkpoints"},
    "planning": {"core", "models", "objectives", "training"},  # memory and time of steps, without running them
    "report": {"core", "data", "inference", "tasks"},
    "automl": {"core", "data", "models", "objectives", "training", "tasks", "checkpoints", "inference", "planning", "report"},
    "exporting": {
        "core",
        "data",
        "metrics",
        "models",
        "objectives",
        "tasks",
        "checkpoints",
        "inference",
    },  # folders that run without us
    "serving": {"core", "data", "models", "inference"},
    "cli": {
        "core",
        "data",
        "models",
        "tasks",
        "checkpoints",
        "inference",
        "planning",
        "report",
        "automl",
        "exporting",
        "serving",
    },
    "__main__": {"cli"},
}
# Oracles, and what only they or a user bring along.
PEERS = {
    "timm",
    "transformers",
    "torchvision",
    "diffusers",
    "tabm",
    "rtdl_num_embeddings",
    "pandas",
    "torchmetrics",
    "lightning",
    "keras",
    "jax",
    "datasets",
    "requests",
    "httpx",
    "joblib",
    "dill",
    "shelve",
    "marshal",
}
LATER = {"sklearn", "tokenizers", "matplotlib", "huggingface_hub"}  # at the top of a file: only in estimators

FILES = sorted(file for file in ROOT.rglob("*.py") if file.parent.name != "runners")  # parts of programs that are exported


FOLDERS = sorted({file.relative_to(ROOT).parts[0] for file in FILES})
BY_FOLDER = pytest.mark.parametrize("folder", FOLDERS)


def list_files(folder: str) -> list[Path]:
    return [file for file in FILES if file.relative_to(ROOT).parts[0] == folder]


@functools.cache
def parse(file: Path) -> list[ast.AST]:
    """Return all nodes of a file."""
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def layer(module: str) -> str:
    return [*module.split("."), "pkg"][1]


@functools.cache
def list_imports(file: Path) -> list[tuple[int, str, bool]]:
    """Return (line, module, whether at the top level) of every import that runs, without those for type checkers."""
    return list(find_imports(parse(file), file))


def find_imports(nodes: Sequence[ast.AST], file: Path) -> Iterator[tuple[int, str, bool]]:
    typing = {id(n) for i in nodes if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test) for n in ast.walk(i)}
    for node in nodes:
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name, node.col_offset == 0) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            for a in node.names:
                inner = ROOT.parent / (node.module + "." + a.name).replace(".", "/")
                deeper = inner.is_dir() or inner.with_suffix(".py").exists()
                yield node.lineno, f"{node.module}.{a.name}" if deeper else node.module, node.col_offset == 0


def own(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return "pkg" if first == "__init__" else first


def test_every_layer_is_in_the_table():
    assert {own(f) for f in FILES} == set(MAY)


def test_layers_are_ordered():
    order = list(MAY)
    for name, allowed in MAY.items():
        assert allowed <= set(order[: order.index(name)]), f"{name} may import {allowed}, some of which come after it"


def test_no_loose_modules():
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


@BY_FOLDER
def test_imports_point_one_way(folder):
    for file in list_files(folder):
        here = own(file)
        for line, module, _ in list_imports(file):
            if module.split(".")[0] != "fieldguide":
                continue
            there = layer(module)
            if there != here:
                assert there in MAY[here], f"{file}:{line}: {here} may not import {module}"


@BY_FOLDER
def test_no_peers_and_lazy_heavy_imports(folder):
    for file in list_files(folder):
        for line, module, top in list_imports(file):
            name = module.split(".")[0]
            assert name not in PEERS, f"{file}:{line} imports {name}"
            assert not (top and name in LATER) or file == ROOT / "automl/sklearn.py", f"{file}:{line} imports {name} at the top"


@BY_FOLDER
def test_nothing_is_pickled(folder):
    """Only the error class of pickle is used, and an unpickler restricted to tensors for archives that torch.load cannot map;
    otherwise torch.load reads weights only, and torch.save is not used.
    """
    for file in list_files(folder):
        allowed = {"pickle.UnpicklingError"} | ({"pickle.Unpickler"} if file == ROOT / "checkpoints/torchscript.py" else set())
        for node in parse(file):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called in allowed or node.value.id != "pickle", f"{file}:{node.lineno}: {called}"
                assert called != "torch.save", f"{file}:{node.lineno}: {called}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                safe = {("weights_only", True), ("allow_pickle", False)}
                said = {(k.arg, getattr(k.value, "value", None)) for k in node.keywords}
                assert said & safe, f"{file}:{node.lineno}: {ast.unparse(node)} may unpickle"


def test_networks_import_only_torch_and_core():
    """Networks use plain torch: from the project they import cards, errors and layers only."""
    for file in (ROOT / "models").glob("*/*.py"):
        outside = {m.split(".")[0] for _, m, _ in list_imports(file)} - sys.stdlib_module_names - {"fieldguide", "__future__"}
        assert outside <= {"torch"}, f"{file} imports {outside - {'torch'}}"


@BY_FOLDER
def test_no_error_is_swallowed(folder):
    """No bare `except:`, and `except Exception` only if the error is raised again or its text is used."""
    for file in list_files(folder):
        for node in parse(file):
            if not isinstance(node, ast.ExceptHandler):
                continue
            assert node.type is not None, f"{file}:{node.lineno}: a bare except"
            caught = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            if caught & {"Exception", "BaseException"}:
                again = any(isinstance(n, ast.Raise) for n in ast.walk(node))
                used = node.name and any(isinstance(n, ast.Name) and n.id == node.name for b in node.body for n in ast.walk(b))
                assert again or used, f"{file}:{node.lineno}: a broad except that tells nobody"


def loaded(code: str) -> set[str]:
    """Return the packages in memory after running code in a new process."""
    said = subprocess.run(
        [sys.executable, "-c", code + "\nimport sys; print('|', *sys.modules)"], capture_output=True, text=True, check=True
    ).stdout
    return {name.split(".")[0] for name in said.rsplit("|", 1)[1].split()}


HEAVY = {"torch", "polars", "sklearn", "numpy", "scipy", "PIL", "tokenizers", "safetensors", "jinja2", "huggingface_hub"}


def test_import_is_light():
    assert not loaded("import fieldguide; dir(fieldguide); fieldguide.__version__") & (HEAVY | {"rich", "typer"})


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["predict", "--help"], ["show", "--help"]])
def test_help_is_light(arguments):
    assert (
        not loaded(f"""
import sys
sys.argv = ["fieldguide", *{arguments}]
from fieldguide.cli.commands import main
try:
    main()
except SystemExit as end:
    assert not end.code
""")
        & HEAVY
    )


def test_samples_are_listed_without_torch():
    assert "torch" not in loaded(
        "import sys\nsys.argv = ['fieldguide', 'samples']\nfrom fieldguide.cli.commands import main\n"
        "try: main()\nexcept SystemExit: pass"
    )


EXPORTED = {
    "__version__",
    "models",
    "fit",
    "resume",
    "finish",
    "plan",
    "open_run",
    "Run",
    "pipeline",
    "Predictor",
    "create",
    "list_models",
    "show",
    "load",
    "fill",
    "save",
    "read",
    "advise",
    "compare",
    "export",
    "FieldguideClassifier",
    "FieldguideRegressor",
    "FieldguideError",
    "DataError",
    "SettingsError",
    "WeightsError",
    "RunError",
    "TrainingError",
}


def test_exported_names_are_frozen():
    assert set(fieldguide.__all__) == EXPORTED == set(dir(fieldguide))


@pytest.mark.parametrize("name", sorted(EXPORTED))
def test_exported_names_resolve(name):
    assert getattr(fieldguide, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="fiit"):
        fieldguide.fiit  # noqa: B018
