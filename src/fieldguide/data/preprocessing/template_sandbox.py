"""A Jinja environment for templates from strangers: no access to Python, and limits on time, text and memory.

jinja's sandbox bounds neither time nor memory: nested loops run for years, and `"a" * 10**10` takes 10 GB. Here everything that
can make a value larger (operators, calls, filters, literals, slices, blocks) charges the size of its result to a budget,
and everything that can repeat checks the time. What would exceed the budget in one step is checked before.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.filters import do_indent, make_attrgetter
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 2.0  # of processor time
MAX_SIZE = 10_000_000  # of one value in characters, in addition to `INPUT_FACTOR` times the input
ITEM_SIZE = 50  # of an item of a list, in characters
INPUT_FACTOR = 10
TOTAL_FACTOR = 20  # size of all values together, relative to that of one
STEPS_PER_CHECK, SIZE_PER_STEP = 100, 1_000  # operations between two looks at the clock; what counts as one in characters
MAX_INTEGER_BITS = 4096
MAX_FILTER_NUMBER = 1_000  # a width, an indentation, a number of digits
MAX_SOURCE_CHARACTERS = 1 << 20
STRING_METHODS = set(
    "capitalize casefold count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines "
    "startswith strip swapcase title upper".split()
)
COLLECTION_METHODS = {"copy", "count", "get", "index", "items", "keys", "values"}
UNSUPPORTED_FILTERS = ("batch", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr")  # no chat template needs them
UNSUPPORTED_GLOBALS = ("cycler", "joiner", "lipsum")
CONVERSION = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\d*|\*)(?:\.(\d*|\*))?[a-zA-Z%]")  # of the operator %
FIELD = re.compile(r"\{[^{}]*(\{|\d{4,})")  # a field of str.format with a computed or a large width


class TemplateLimitError(TemplateRuntimeError):
    """The template takes too much time or memory."""


class Budget:
    """What a template may still use while it is rendered."""

    def __init__(self, input_size: int = 0) -> None:
        self.max_size = MAX_SIZE + INPUT_FACTOR * input_size
        self.left = TOTAL_FACTOR * self.max_size
        self.deadline, self.work = time.thread_time() + MAX_SECONDS, 0

    def count_step(self, work: int = SIZE_PER_STEP) -> None:
        """Count an operation, and look at the clock from time to time. Raises `TemplateLimitError` if the time is over."""
        self.work += work
        if self.work > STEPS_PER_CHECK * SIZE_PER_STEP:
            self.work = 0
            if time.thread_time() > self.deadline:
                raise TemplateLimitError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def charge(self, size: int) -> None:
        """Count a value of this size. Raises `TemplateLimitError` if it is too large, or all values together are."""
        self.count_step(size)
        self.left -= size
        if size > self.max_size or self.left < 0:
            raise TemplateLimitError("its values become too large")


def measure(value: Any, limit: float = float("inf")) -> int:
    """Return the size of a value, with shared parts counted wherever they occur; stop counting above `limit`."""
    if isinstance(value, str | bytes):
        return len(value)
    size, stack = 0, [value]
    while stack and size <= limit:
        item = stack.pop()
        size += ITEM_SIZE + (len(item) if isinstance(item, str) else 0)
        if isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            stack += item
    return size


class OpaqueNamespace(Namespace):
    """A namespace that is printed without its content, which could contain itself."""

    def __repr__(self) -> str:
        return "<namespace>"


class Instrumenter(NodeTransformer):
    """Replaces the nodes of a template that the environment does not see at run time by calls of its methods."""

    def call(self, method: str, *arguments: nodes.Expr, line: int) -> nodes.Node:
        return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None).set_lineno(line)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self.call("count_step", line=node.lineno)).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self.call("join_texts", *node.nodes, line=node.lineno)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self.call("check_size", node, line=node.lineno) if node.items else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self.call("check_size", node, line=node.lineno) if node.items and node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self.call("check_size", node, line=node.lineno) if node.items else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        limits = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return self.call("take_slice", node.node, *limits, line=node.lineno)


class InstrumentedGenerator(CodeGenerator):
    """Compiles templates with the calls that `Instrumenter` adds."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        super().visit_Template(Instrumenter().visit(node), frame)

    def visit_Call(self, node: nodes.Call, frame: Any, forward_caller: bool = False) -> None:
        if not isinstance(node.node, nodes.EnvironmentAttribute):
            return super().visit_Call(node, frame, forward_caller=forward_caller)
        self.write(f"environment.{node.node.name}(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox. Compile and render templates inside `limit`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = InstrumentedGenerator

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=self.to_printable, **options)
        self.current = threading.local()  # one predictor serves many threads
        for name in UNSUPPORTED_FILTERS:
            del self.filters[name]
        for name in UNSUPPORTED_GLOBALS:
            del self.globals[name]
        self.globals["namespace"] = OpaqueNamespace
        own = {
            "format": lambda text, *args, **kwargs: self.format_percent(self.to_text(text), kwargs or args),
            "indent": self.filter_indent,
            "join": self.filter_join,
            "replace": self.filter_replace,
            "sum": self.filter_sum,
            "tojson": self.filter_tojson,
        }
        self.filters = {name: self.limit_filter(function) for name, function in {**self.filters, **own}.items()}

    @property
    def budget(self) -> Budget:
        """The budget of the template that this thread renders."""
        return self.current.budget

    @contextmanager
    def limit(self, values: Any = ()) -> Iterator[None]:
        """Apply the limits inside the block, in which a template reads `values`."""
        self.current.budget = Budget(measure(values))
        yield

    # --------------------------------------------------------------- called by compiled templates

    def count_step(self) -> None:
        self.budget.count_step()

    def check_size(self, value: Any) -> Any:
        """Return the value after charging its size."""
        if isinstance(value, str):
            self.budget.charge(len(value))
        elif isinstance(value, bytes | list | tuple | dict | set):
            self.budget.charge(measure(value, self.budget.max_size))
        return value

    def take_slice(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return self.check_size(value[start:stop:step])

    def concat(self, pieces: Iterable[str]) -> str:
        """Return the text of a block or of the whole template."""
        found: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > self.budget.max_size:
                break
            found.append(piece)
        self.budget.charge(size)
        return "".join(found)

    def join_texts(self, *values: Any) -> str:
        return self.concat([self.to_text(value) for value in values])

    def to_text(self, value: Any) -> str:
        """Return a value as text. Lists and so on have been charged when they were created."""
        return value if isinstance(value, str) else str(value)

    def to_printable(self, value: Any) -> Any:
        return value if isinstance(value, str | Undefined) else self.check_size(self.to_text(value))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator. Raises `TemplateLimitError` for one that is too large."""
        self.budget.count_step()
        if operator == "%" and isinstance(left, str):
            return self.format_percent(left, right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    self.budget.charge(measure(value, self.budget.max_size) * max(times, 0))
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise TemplateLimitError("its numbers become too large")
        return self.check_size(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, a macro or a method of a value."""
        self.budget.count_step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self.filter_replace(owner, *args)
        if isinstance(owner, str) and name == "join":
            return self.filter_join(args[0], owner)
        return self.check_size(super().call(context, function, *args, **kwargs))

    # --------------------------------------------------------------- attributes, methods and filters

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may use an attribute: only methods whose result is not much larger than the value."""
        if isinstance(obj, str):
            return attr in STRING_METHODS
        if isinstance(obj, Mapping | list | tuple | set | frozenset):
            return attr in COLLECTION_METHODS
        if isinstance(obj, bytes | int | float | complex | type | range):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` with limited widths."""
        format_text = super().wrap_str_format(value)
        if format_text is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            text = value.__self__
            if FIELD.search(text):
                raise TemplateLimitError("a format has a field that is too wide, or nested")
            longest = measure([args, kwargs], self.budget.max_size) + MAX_FILTER_NUMBER
            self.budget.charge(len(text) + text.count("{") * longest)
            return format_text(*args, **kwargs)

        return limited

    def limit_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that rejects large numbers as arguments, and charges its result."""

        def limited(*args: Any, **kwargs: Any) -> Any:
            self.budget.count_step()
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, int) and abs(value) > MAX_FILTER_NUMBER:
                    raise TemplateLimitError(f"a filter has the argument {value:.3g}; at most {MAX_FILTER_NUMBER} is possible")
            return self.check_size(function(*args, **kwargs))

        if hasattr(function, "jinja_pass_arg"):  # the context or the environment is the first argument
            limited.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return limited

    def format_percent(self, text: str, values: Any) -> str:
        """Return `text % values`."""
        fields = CONVERSION.findall(text)
        numbers = [number for field in fields for number in field if number]
        if any(number == "*" or int(number) > MAX_FILTER_NUMBER for number in numbers):
            raise TemplateLimitError("a format has a field that is too wide, or computed")
        longest = measure(values, self.budget.max_size)
        self.budget.charge(len(text) + sum(map(int, numbers)) + longest * (len(fields) if isinstance(values, Mapping) else 1))
        return self.check_size(text % values)

    def filter_indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self.budget.charge((text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
        return do_indent(text, width, first, blank)

    def filter_join(self, values: Iterable[Any], separator: Any = "", attribute: Any = None) -> str:
        get = make_attrgetter(self, attribute) if attribute is not None else lambda value: value
        texts = [self.to_text(get(value)) for value in values]
        self.budget.charge(sum(map(len, texts)) + len(self.to_text(separator)) * len(texts))
        return self.to_text(separator).join(texts)

    def filter_replace(self, text: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self.to_text(text), self.to_text(old), self.to_text(new)
        self.budget.charge(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def filter_sum(self, values: Iterable[Any], attribute: Any = None, start: float = 0) -> Any:
        get = make_attrgetter(self, attribute) if attribute is not None else lambda value: value
        numbers = [get(value) for value in values]
        if not all(isinstance(number, int | float) for number in (*numbers, start)):
            raise TemplateRuntimeError("the filter sum adds numbers only")
        return sum(numbers, start)

    def filter_tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        """Return JSON, without the escapes for HTML of jinja's own filter."""
        self.check_size(value)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(encoder.iterencode(value))
