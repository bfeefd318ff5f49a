"""All functions of the package are annotated, except Triton's kernels.

mypy checks this only for rootfree_kernels. It cannot check triton_kernels, because annotations of a kernel's parameters
have another meaning for Triton. This test checks both.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rootfree_kernels", "triton_kernels")
FILES = sorted({path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")})
KERNEL_DECORATORS = {"kernel", "triton.jit"}


def missing_annotations(source: str) -> list[str]:
    """Return missing annotations of all functions except kernels, as "function: parameter" or "function: return"."""
    found = []
    for function, is_method in functions(ast.parse(source)):
        decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
        if decorators & KERNEL_DECORATORS:
            continue
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        if is_method and "staticmethod" not in decorators:
            positional = positional[1:]
        variadic = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
        names = [each.arg for each in (*positional, *arguments.kwonlyargs, *variadic) if each.annotation is None]
        found += [f"{function.name}: {name}" for name in (*names, *["return"] * (function.returns is None))]
    return found


def functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Yield every function, at any depth, and whether it is a method."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, isinstance(node, ast.ClassDef)


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_all_functions_except_kernels_are_annotated(path: Path) -> None:
    assert missing_annotations(path.read_text(encoding="utf-8")) == []


def test_a_missing_annotation_is_found() -> None:
    source = """
@triton.jit
def kernel(x): pass
def function(a: int, b, *c, d=1, **e: int): pass
class Thing:
    def method(self, x) -> None:
        def inner(y: int): pass
"""
    expected = ["function: b", "function: d", "function: c", "function: return", "method: x", "inner: return"]
    assert missing_annotations(source) == expected
