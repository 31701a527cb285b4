"""ONNX: the traced network, with lookups of texts before it and names of classes after it, and a check of its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fieldguide.core.errors import SettingsError
from fieldguide.core.signature import TensorSpec
from fieldguide.exporting.graph import ExportError, Graph, Lookup, Names
from fieldguide.exporting.graph_format import GraphFormat, Port
from fieldguide.exporting.precision import PRECISIONS, Precision, compress_weights
from fieldguide.exporting.recurrent import build_translations
from fieldguide.exporting.torch_file import dynamic_recurrence
from fieldguide.exporting.tracing import check_axis, compare_sizes, list_dynamic_axes, quiet_tracing

OPSET = 20  # operators that onnxruntime 1.17 and later run
LARGE_BYTES = 2_000_000_000  # of weights, from which on they are a file of their own (limit of protobuf: 2 GiB)


def import_onnx() -> Any:
    """Return the onnx package. Raises `SettingsError` if the packages for exports are not installed."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingsError(f"export to ONNX needs {error.name}: pip install 'fieldguide[export]'") from None
    assert onnxruntime
    return onnx


class OnnxFormat(GraphFormat):
    """ONNX graphs, which onnxruntime executes."""

    name = "onnx"
    suffix = ".onnx"
    session = ("session_onnx",)
    packages = ("onnxruntime",)
    absent = ("torch", "fieldguide")
    precisions = PRECISIONS
    about = f"an ONNX graph (opset {OPSET}) that any ONNX runtime executes"

    def check_packages(self) -> None:
        import_onnx()

    def write(self, graph: Graph, path: Path, precision: Precision) -> dict[str, Any]:
        return {"renamed": write_onnx(graph, path, precision)}

    def describe(self, graph: Graph, path: Path) -> tuple[list[Port], list[Port]]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        spell = lambda v: Port(v.name, v.type.removeprefix("tensor(").removesuffix(")"), tuple(map(str, v.shape)))
        return [spell(value) for value in session.get_inputs()], [spell(value) for value in session.get_outputs()]


def write_onnx(graph: Graph, path: Path, precision: Precision = "float32") -> dict[str, str]:
    """Write a graph as an ONNX file, and return the inputs of columns whose own names are taken in the graph.

    Raises `ExportError` if torch cannot trace it or an axis became fixed.
    """
    onnx = import_onnx()
    model = trace(graph)
    check_sizes(graph, model)
    renamed = rename_columns(graph, model)
    if joined := [name for name, columns in graph.columns.items() if columns]:
        model = onnx.compose.merge_models(build_front(onnx, graph, renamed), model, [(name, name) for name in joined])
    for names in graph.names:
        append_names(onnx, model, names)
    name_axes(model, graph.inputs)
    if precision != "float32":
        compress_weights(onnx, model, precision)
    model.graph.name = "model"
    del model.metadata_props[:]
    onnx.checker.check_model(model, full_check=False)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGE_BYTES
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data")
    return renamed


def rename_columns(graph: Graph, model: Any) -> dict[str, str]:
    """Return other names for columns such as `label` or `x`, whose names belong to outputs or values inside the graph."""
    taken = {"column_axis", *(names.name for names in graph.names), *graph.outputs, *list_names(model.graph)}
    for name, columns in graph.columns.items():
        taken |= {name, *(f"{name}_{i}{end}" for i in range(len(columns)) for end in ("", "_code"))}
    given = [column for columns in graph.columns.values() for column in columns]
    renamed: dict[str, str] = {}
    for column in given:
        name = column
        while name in taken or (name != column and name in given):
            name += "_column"
        taken.add(name)
        if name != column:
            renamed[column] = name
    return renamed


def list_names(body: Any) -> set[str]:
    """Return the names of all values of a graph and of the graphs in its nodes."""
    names = {value.name for value in (*body.input, *body.output, *body.initializer)}
    for node in body.node:
        names |= {*node.input, *node.output}
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= list_names(attribute.g)
    return names


def trace(graph: Graph) -> Any:
    """Return the ONNX model of the module."""
    example = tuple(graph.build_example().values())
    with quiet_tracing(), dynamic_recurrence():
        program = torch.onnx.export(
            graph.module,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in graph.inputs],
            output_names=list(graph.outputs),
            dynamic_shapes=(list_dynamic_axes(graph),),
            external_data=False,
            verbose=False,
            custom_translation_table=build_translations(),
        )
    assert program is not None
    return program.model_proto


def check_sizes(graph: Graph, model: Any) -> None:
    """Raise `ExportError` if an axis became fixed or the graph differs from the module; see `compare_sizes`."""
    import onnxruntime

    for place, value in enumerate(model.graph.input):
        for number, dimension in enumerate(value.type.tensor_type.shape.dim):
            check_axis(graph, place, number, None if dimension.dim_param else dimension.dim_value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are reported below
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    except Exception as error:  # types of onnxruntime's own, without a common base
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load the graph: {error}") from error
    taken = {value.name for value in session.get_inputs()}
    compare_sizes(graph, lambda batch: session.run(None, {name: v.numpy() for name, v in batch.items() if name in taken}))


def name_axes(model: Any, specs: Sequence[TensorSpec]) -> None:
    """Give dynamic axes the names of the signature, in place of torch's symbols."""
    known = {value.name: value for value in model.graph.input}
    names: dict[str, str] = {}
    for spec in specs:
        if spec.name in known:
            for axis, dimension in zip(spec.axes, known[spec.name].type.tensor_type.shape.dim):
                names.setdefault(dimension.dim_param, axis.name)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = names.get(dimension.dim_param, dimension.dim_param)
    for value in model.graph.output:
        shape = value.type.tensor_type.shape.dim
        if shape and shape[0].dim_param:
            shape[0].dim_param = "batch"


def build_front(onnx: Any, graph: Graph, renamed: Mapping[str, str]) -> Any:
    """Return a model that joins columns: numbers are stacked, texts and lists of texts become codes (`ai.onnx.ml` LabelEncoder)."""
    helper, kinds = onnx.helper, onnx.TensorProto
    lookups = {lookup.name: lookup for lookup in graph.lookups}
    nodes, inputs, outputs = [], [], []
    axis = helper.make_tensor("column_axis", kinds.INT64, [1], [1])
    for spec in graph.inputs:
        columns = list(graph.columns.get(spec.name, ()))
        if not columns:
            continue
        is_text = spec.dtype == "int64"
        if spec.axes[1].size is None:  # one column, whose cells are lists
            inputs.append(helper.make_tensor_value_info(columns[0], kinds.STRING, ["batch", spec.axes[1].name]))
            outputs.append(helper.make_tensor_value_info(spec.name, kinds.INT64, ["batch", spec.axes[1].name]))
            nodes.append(encode_texts(onnx, lookups[columns[0]], columns[0], spec.name))
            continue
        parts = []
        for i, column in enumerate(columns):
            value = renamed.get(column, column)
            inputs.append(helper.make_tensor_value_info(value, kinds.STRING if is_text else kinds.DOUBLE, ["batch"]))
            if is_text:
                code = f"{spec.name}_{i}_code"
                nodes.append(encode_texts(onnx, lookups[column], value, code))
                value = code
            parts.append(f"{spec.name}_{i}")
            nodes.append(helper.make_node("Unsqueeze", [value, "column_axis"], [parts[-1]]))
        nodes.append(helper.make_node("Concat", parts, [spec.name], axis=1))
        kind = kinds.INT64 if is_text else kinds.DOUBLE
        outputs.append(helper.make_tensor_value_info(spec.name, kind, ["batch", len(columns)]))
    constants = [axis] if any(axis.name in node.input for node in nodes) else []
    body = helper.make_graph(nodes, "columns", inputs, outputs, constants)
    return make_model(onnx, body)


def encode_texts(onnx: Any, lookup: Lookup, source: str, target: str) -> Any:
    """Return the node that turns texts into codes."""
    codes = lookup.list_codes()
    return onnx.helper.make_node(
        "LabelEncoder",
        [source],
        [target],
        domain="ai.onnx.ml",
        keys_strings=list(codes),
        values_int64s=list(codes.values()),
        default_int64=lookup.unknown,
    )


def append_names(onnx: Any, model: Any, names: Names) -> None:
    """Add an output of texts: the names of the integers of another output, which it replaces."""
    node = onnx.helper.make_node(
        "LabelEncoder",
        [names.of],
        [names.name],
        domain="ai.onnx.ml",
        keys_int64s=list(range(len(names.values))),
        values_strings=list(names.values),
        default_string="",
    )
    model.graph.node.append(node)
    place = next(i for i, output in enumerate(model.graph.output) if output.name == names.of)
    shape = [d.dim_param or d.dim_value for d in model.graph.output[place].type.tensor_type.shape.dim]
    del model.graph.output[place]
    model.graph.output.append(onnx.helper.make_tensor_value_info(names.name, onnx.TensorProto.STRING, shape))
    if not any(o.domain == "ai.onnx.ml" for o in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))


def make_model(onnx: Any, body: Any) -> Any:
    versions = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("ai.onnx.ml", 3)]
    return onnx.helper.make_model(body, opset_imports=versions, ir_version=10)
