"""List long signatures, functions and files, and import cycles in the source.

    python -m tests.tools.signatures

It parses all files of the package. It lists functions with more than 8 parameters, functions with more than 60 lines
(kernels: 90), files with more than 350 lines, import cycles, and literal names of backends in files that should not
depend on the list of backends.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("rootfree_kernels", "triton_kernels")
PACKAGE, EXTENSION = "rootfree_kernels", "_C"
MAX_PARAMETERS, MAX_LINES, MAX_KERNEL_LINES, MAX_FILE_LINES = 8, 60, 90, 350
BACKENDS = ("triton", "triton_bmm", "cuda", "cpp", "eager")
ABOUT_DEVICES = ("type", "device", "device_type", "devices")
"""Names of variables and arguments whose value "cuda" is a device type and not a backend."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Finding(NamedTuple):
    """A finding with its place in the source."""

    path: str
    line: int
    what: str
    size: int = 0
    allowed: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}{' (allowed)' if self.allowed else ''}"


class Source(NamedTuple):
    """A file of the package: its path in the tree, its module name, its lines and its syntax tree."""

    path: str
    module: str
    lines: list[str]
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        """Return whether the file is the `__init__.py` of a package."""
        return self.path.endswith("__init__.py")


def _source(path: Path, root: Path) -> Source:
    inside = path.relative_to(root)
    parts = [*inside.with_suffix("").parts]
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    parts = parts if parts[0] == PACKAGE else [PACKAGE, *parts]
    text = path.read_text(encoding="utf-8")
    return Source(str(inside), ".".join(parts), text.splitlines(), ast.parse(text))


@cache
def sources(root: Path = ROOT, folders: tuple[str, ...] = PACKAGES) -> tuple[Source, ...]:
    """Return all source files of some folders. The link to triton_kernels inside the package is ignored."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    link = root / PACKAGE / "triton_kernels"
    return tuple(_source(path, root) for path in paths if link not in path.parents)


# ---- functions ---------------------------------------------------------------------------------------------------


def _last_name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def is_kernel(function: Function) -> bool:
    """Return whether a function is compiled by Triton."""
    return any(_last_name(decorator) in ("kernel", "jit") for decorator in function.decorator_list)


def functions(source: Source) -> Iterator[tuple[Function, ast.ClassDef | None]]:
    """Yield every function of a file, and its class if it is a method."""
    for node in ast.walk(source.tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield child, node if isinstance(node, ast.ClassDef) else None


def num_parameters(function: Function, is_method: bool) -> int:
    """Return the number of all parameters of a function except self or cls."""
    arguments = function.args
    names = [x.arg for x in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    starred = [x for x in (arguments.vararg, arguments.kwarg) if x]
    return len(names) + len(starred) - int(is_method and names[:1] in (["self"], ["cls"]))


def optimizer_classes(every: Iterable[Source]) -> set[str]:
    """Return the names of all direct and indirect subclasses of a class named Optimizer."""
    found = [node for source in every for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    bases = {node.name: {_last_name(base) for base in node.bases} for node in found}
    names, before = {"Optimizer"}, set[str]()
    while names != before:
        before = set(names)
        names |= {name for name, parents in bases.items() if parents & names}
    return names


def many_parameters(root: Path = ROOT, most: int = MAX_PARAMETERS) -> list[Finding]:
    """Return the functions with more than `most` parameters. Kernels and constructors of optimizers may have more."""
    every = sources(root)
    optimizers = optimizer_classes(every)
    found = []
    for source in every:
        for function, owner in functions(source):
            number = num_parameters(function, owner is not None)
            constructs = owner is not None and owner.name in optimizers and function.name == "__init__"
            if number > most:
                name = f"{owner.name}.{function.name}" if owner else function.name
                what = f"{name} has {number} parameters"
                found.append(Finding(source.path, function.lineno, what, number, is_kernel(function) or constructs))
    return found


def long_functions(root: Path = ROOT) -> list[Finding]:
    """Return the functions with too many lines. Docstrings count, decorators do not."""
    found = []
    for source in sources(root):
        for function, _ in functions(source):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > (MAX_KERNEL_LINES if is_kernel(function) else MAX_LINES):
                what = f"{function.name} has {length} lines"
                found.append(Finding(source.path, function.lineno, what, length))
    return found


def long_files(root: Path = ROOT) -> list[Finding]:
    """Return the files with too many lines."""
    every = [(source, len(source.lines)) for source in sources(root)]
    return [Finding(x.path, 1, f"{number} lines", number) for x, number in every if number > MAX_FILE_LINES]


# ---- imports -----------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """An import: the imported module, the line, and whether the statement is inside a function."""

    target: str
    line: int
    in_function: bool


def _names(node: ast.Import | ast.ImportFrom, source: Source) -> Iterator[str]:
    """Yield the full names of the modules or module members that a statement may import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    parts = source.module.split(".")
    start = parts[: len(parts) - node.level + int(source.is_package)] if node.level else []
    module = ".".join([*start, *([node.module] if node.module else [])])
    yield from (f"{module}.{alias.name}" for alias in node.names)


def _module_of(name: str, modules: Mapping[str, Source]) -> str | None:
    """Return the module of the package that a full name refers to, or None for the extension and other packages."""
    if name.split(".")[:2] == [PACKAGE, EXTENSION]:
        return None
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def _statements(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function
        else:
            yield from _statements(child, in_function or isinstance(child, Function | ast.Lambda))


def imports(root: Path = ROOT) -> dict[str, list[Import]]:
    """Return the imports between modules of the package, including those under TYPE_CHECKING.

    `from package import name` counts as an import of the module `name`, or of the package if there is no such module.
    Implicit imports of parent packages do not count.
    """
    modules = {source.module: source for source in sources(root)}
    graph: dict[str, list[Import]] = {name: [] for name in modules}
    for name, source in modules.items():
        for node, in_function in _statements(source.tree):
            targets = {_module_of(full, modules) for full in _names(node, source)}
            graph[name] += [Import(x, node.lineno, in_function) for x in sorted(filter(None, targets)) if x != name]
    return graph


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        new = edges[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


def _circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that all import each other, directly or indirectly."""
    reachable = {name: _reachable(name, edges) for name in edges}
    groups = {frozenset(x for x in reachable[name] if name in reachable[x]) for name in edges}
    return sorted(sorted(group) for group in groups if group)


def import_cycles(root: Path = ROOT, in_functions: bool = False) -> list[Finding]:
    """Return the groups of modules that form import cycles.

    With `in_functions`, return only the cycles that need an import inside a function.
    """
    graph, modules = imports(root), {source.module: source for source in sources(root)}
    outer = _circles({name: {x.target for x in found if not x.in_function} for name, found in graph.items()})
    every = _circles({name: {x.target for x in found} for name, found in graph.items()})
    chosen = [group for group in every if group not in outer] if in_functions else outer
    found = []
    for group in chosen:
        edges = [f"{a} -> {x.target} (line {x.line})" for a in group for x in graph[a] if x.target in group]
        what = f"{len(group)} modules import each other: {'; '.join(edges)}"
        found.append(Finding(modules[group[0]].path, 1, what, len(group)))
    return found


# ---- names of backends -------------------------------------------------------------------------------------------


def _is_about_devices(node: ast.keyword | ast.Assign) -> bool:
    name = node.arg if isinstance(node, ast.keyword) else _last_name(node.targets[0])
    return (name or "").lower() in ABOUT_DEVICES


def _device_literals(tree: ast.Module) -> set[int]:
    """Return the ids of the literals that are device types: compared with, passed or assigned as a device."""
    found: set[int] = set()
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Compare) and _last_name(node.left) in ABOUT_DEVICES:
            parts = [*node.comparators]
        elif isinstance(node, ast.Call) and _last_name(node) in ABOUT_DEVICES:
            parts = [*node.args]
        elif isinstance(node, ast.keyword | ast.Assign) and _is_about_devices(node):
            parts = [node.value]
        found |= {id(x) for part in parts for x in ast.walk(part) if isinstance(x, ast.Constant)}
    return found


def backend_names(root: Path = ROOT, folders: tuple[str, ...] = ("rootfree_kernels/optim", "bench")) -> list[Finding]:
    """Return the literals that name a backend. "cuda" does not count if it is clearly a device type."""
    found = []
    for source in sources(root, folders):
        of_devices = _device_literals(source.tree)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and node.value in BACKENDS and id(node) not in of_devices:
                found.append(Finding(source.path, node.lineno, f"names the backend {node.value!r}"))
    return found


def main() -> None:
    """Print all findings."""
    headings = {
        f"more than {MAX_PARAMETERS} parameters": many_parameters(),
        f"more than {MAX_LINES} lines (kernels {MAX_KERNEL_LINES})": long_functions(),
        f"files of more than {MAX_FILE_LINES} lines": long_files(),
        "import cycles": import_cycles(),
        "import cycles by imports within functions": import_cycles(in_functions=True),
        "names of backends": backend_names(),
    }
    for heading, findings in headings.items():
        print(f"{heading}: {sum(not finding.allowed for finding in findings)}")
        for finding in findings:
            print(f"  {finding}")


if __name__ == "__main__":
    main()
