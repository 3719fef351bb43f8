"""Who may import whom, read from the source: nothing here imports rollmill."""

import ast
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "quant": set(),
    "moe": {"quant"},
    "weight_sync": {"quant"},
    "engine": {"quant", "moe", "weight_sync"},
}
NEVER_ABSOLUTE = {"rollmill", *MAY_IMPORT}
NEVER_AT_ALL = {"tests", "benchmarks", "examples"}
KERNEL_LIBRARIES = {"triton", "flashinfer", "sgl_kernel", "diffusers", "ray"}
KERNEL_FOLDERS = tuple(map(PurePosixPath, ("quant/gpu", "moe/gpu", "engine/llm/gpu", "engine/dit/gpu")))
ENVIRONMENT_FILE = PurePosixPath("engine/env.py")
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
TYPE_CHECKING = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}

Found = Iterator[tuple[int, str]]
Rule = Callable[[ast.Module, PurePosixPath], Found]


def absolute_imports(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name)."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


def relative_imports(nodes: Iterable[ast.AST], path: PurePosixPath) -> Iterator[tuple[int, tuple[str, ...] | None]]:
    """Yields (line, parts of the module below rollmill); None where the dots climb out of rollmill."""
    package = path.parent.parts
    for node in nodes:
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        if node.level - 1 > len(package):
            yield node.lineno, None
            continue
        base = package[: len(package) - node.level + 1] + tuple(filter(None, (node.module or "").split(".")))
        modules = [base] if base else [(alias.name,) for alias in node.names]
        yield from ((node.lineno, module) for module in modules)


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in TYPE_CHECKING:
            continue
        yield child
        yield from run_at_import(child)


def siblings_out_of_order(tree: ast.Module, path: PurePosixPath) -> Found:
    own = path.parts[0]
    for line, module in relative_imports(ast.walk(tree), path):
        if module is None:
            yield line, "relative import climbs out of rollmill"
        elif module[0] not in {own, *MAY_IMPORT[own]}:
            allowed = ", ".join(sorted(MAY_IMPORT[own])) or "no sibling"
            yield line, f"{own} may not import {module[0]}; it may import {allowed}"


def absolute_imports_of_ourselves(tree: ast.Module, path: PurePosixPath) -> Found:
    for line, name in absolute_imports(ast.walk(tree)):
        top = name.partition(".")[0]
        if top in NEVER_ABSOLUTE:
            yield line, f"absolute import of {name}; imports inside rollmill are relative"
        elif top in NEVER_AT_ALL:
            yield line, f"rollmill may not import {name}"


def kernel_libraries_at_module_level(tree: ast.Module, path: PurePosixPath) -> Found:
    """Triton compiles functions of a module that has imported it: those of the gpu folders, loaded where they run."""
    if in_kernel_folder(path):
        return
    for line, name in absolute_imports(run_at_import(tree)):
        if name.partition(".")[0] in KERNEL_LIBRARIES:
            yield line, f"{name} is imported inside functions only"
    for line, module in relative_imports(run_at_import(tree), path):
        if module is not None and in_kernel_folder(PurePosixPath(*module)):
            yield line, f"{'.'.join(module)} is imported inside functions only"


def in_kernel_folder(path: PurePosixPath) -> bool:
    return any(path.is_relative_to(folder) for folder in KERNEL_FOLDERS)


def environment_read_elsewhere(tree: ast.Module, path: PurePosixPath) -> Found:
    if path == ENVIRONMENT_FILE:
        return
    imported = [a for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names_of_os = {a.asname or "os" for a in imported if a.name == "os" or a.name.startswith("os.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in names_of_os:
            used = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "os":
            used = {alias.name for alias in node.names}
        else:
            continue
        for name in sorted(used & ENVIRONMENT_NAMES):
            yield node.lineno, f"os.{name} belongs in {ENVIRONMENT_FILE}"


def relative_imports_of_nothing(tree: ast.Module, path: PurePosixPath) -> Found:
    """The type checker lets a missing module pass, since kernel libraries are often not installed."""
    for line, module in relative_imports(ast.walk(tree), path):
        if module is None:
            continue
        target = ROOT.joinpath(*module)
        if not (target.with_suffix(".py").is_file() or target.joinpath("__init__.py").is_file()):
            yield line, f"there is no module {'.'.join(module)}"


RULES: list[Rule] = [
    siblings_out_of_order,
    absolute_imports_of_ourselves,
    kernel_libraries_at_module_level,
    environment_read_elsewhere,
    relative_imports_of_nothing,
]


def violations(rule: Rule, source: str, path: PurePosixPath) -> list[str]:
    return [f"{path}:{line}: {message}" for line, message in rule(ast.parse(source, str(path)), path)]


@pytest.mark.parametrize("folder", MAY_IMPORT)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_folder_has_no(rule: Rule, folder: str):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file"
    found = []
    for file in files:
        found += violations(rule, file.read_text("utf-8"), PurePosixPath(file.relative_to(ROOT)))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (siblings_out_of_order, "quant/x.py", "from ..moe import Runner"),
        (kernel_libraries_at_module_level, "quant/x.py", "from .gpu.convert import fp8_weight"),
        (siblings_out_of_order, "quant/kernels/x.py", "from ...engine.env import Env"),
        (siblings_out_of_order, "moe/x.py", "from .. import weight_sync"),
        (siblings_out_of_order, "moe/__init__.py", "from ..engine import Engine"),
        (siblings_out_of_order, "weight_sync/x.py", "def f():\n    from ..moe import Runner"),
        (siblings_out_of_order, "engine/x.py", "from ..tests import fixtures"),
        (siblings_out_of_order, "engine/x.py", "from ...other import thing"),
        (absolute_imports_of_ourselves, "engine/x.py", "import rollmill.quant"),
        (absolute_imports_of_ourselves, "engine/x.py", "from rollmill.quant import Scheme"),
        (absolute_imports_of_ourselves, "engine/x.py", "from quant import Scheme"),
        (absolute_imports_of_ourselves, "engine/x.py", "import benchmarks.swap"),
        (kernel_libraries_at_module_level, "quant/x.py", "import triton.language as tl"),
        (kernel_libraries_at_module_level, "moe/x.py", "if True:\n    from flashinfer import x"),
        (kernel_libraries_at_module_level, "moe/x.py", "class A:\n    import sgl_kernel"),
        (environment_read_elsewhere, "quant/x.py", "import os\nA = os.environ['A']"),
        (environment_read_elsewhere, "quant/env.py", "import os as o\nA = o.getenv('A')"),
        (environment_read_elsewhere, "engine/x.py", "import os.path\nA = os.environ"),
        (environment_read_elsewhere, "engine/x.py", "from os import environ"),
        (relative_imports_of_nothing, "engine/x.py", "from .no_such_module import x"),
        (relative_imports_of_nothing, "engine/x.py", "from ..quant.no_such_module import x"),
    ],
)
def test_violation_is_found(rule: Rule, path: str, source: str):
    (found,) = violations(rule, source, PurePosixPath(path))
    assert found.startswith(f"{path}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("engine/x.py", "from ..quant import Scheme"),
        ("engine/llm/x.py", "from ... import quant, moe, weight_sync"),
        ("moe/runners/x.py", "from ...quant import Scheme"),
        ("quant/x.py", "def f():\n    import triton"),
        ("quant/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers"),
        ("engine/env.py", "import os\nA = os.environ"),
        ("engine/x.py", "import os\nA = os.getpid()"),
    ],
)
def test_allowed_import_is_let_through(path: str, source: str):
    assert [line for rule in RULES for line in violations(rule, source, PurePosixPath(path))] == []
