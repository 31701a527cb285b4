"""List every sentence that a person reads: docstrings, errors, help, report texts. python tools/list_strings.py [--errors]

One line each: file:line, kind, text. Used to review the language of the project as a whole.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent


def strings(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield line, kind and text of each docstring and each other string that holds at least two words."""
    documented = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented[id(node.body[0].value)] = True
            yield node.body[0].lineno, "docstring", ast.get_docstring(node)
    raised = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Raise) for inner in ast.walk(node)}
    joined = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    for node in ast.walk(tree):
        if id(node) in joined or id(node) in documented:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if len(text.split()) > 1:
            yield node.lineno, "error" if id(node) in raised else "text", text


def main() -> None:
    """Print the strings of the package and of the report's templates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--errors", action="store_true", help="only messages of raised errors")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # some data are lone surrogates
    for path in sorted((ROOT / "src").rglob("*.py")):
        for line, kind, text in sorted(strings(ast.parse(path.read_text()))):
            if kind == "error" or not options.errors:
                print(f"{path.relative_to(ROOT)}:{line}\t{kind}\t{' '.join(text.split())}")


if __name__ == "__main__":
    main()
