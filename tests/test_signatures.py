"""Public functions and methods of the installed packages have typed parameters, and a return type if they return.

mypy, which `.ci/run` calls, checks that the types are right; a parameter without a type it would not check at all.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("modeling_blsp_kd", "processing")


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def returns_a_value(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    inside, found = list(function.body), False
    while inside and not found:
        node = inside.pop()
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            found = isinstance(node, (ast.Yield, ast.YieldFrom)) or (
                isinstance(node, ast.Return) and node.value is not None
            )
            inside += ast.iter_child_nodes(node)
    return found


def untyped(body: list[ast.stmt], of_class: str = "") -> list[str]:
    """Name what has no type, of functions, and of the methods of classes, whose names are public."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += untyped(node.body, f"{node.name}.")
        is_public = isinstance(node, FUNCTIONS) and (
            not node.name.startswith("_") or node.name in ("__init__", "__call__")
        )
        if is_public:
            names = [each for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            is_static = any(getattr(decorator, "id", None) == "staticmethod" for decorator in node.decorator_list)
            names = names[1:] if of_class and not is_static else names
            found += [f"{of_class}{node.name}: {each.arg}" for each in names if each.annotation is None]
            if node.returns is None and returns_a_value(node):
                found.append(f"{of_class}{node.name}: what it returns")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_signatures_are_typed(package):
    files = sorted((ROOT / package).rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix(): untyped(ast.parse(path.read_text()).body) for path in files}
    assert {file: names for file, names in found.items() if names} == {}
    assert len(files) > 20


@pytest.mark.parametrize(
    "code, names",
    [
        ("def f(a: int, *args, b=1) -> int: return a", ["f: b"]),
        ("def f():\n    yield 1", ["f: what it returns"]),
        ("def f():\n    def g():\n        return 1", []),
        ("async def f(a):\n    return 1", ["f: a", "f: what it returns"]),
        ("class C:\n    def __init__(self, a): pass\n    def _f(self, b): pass", ["C.__init__: a"]),
        ("class C:\n    @staticmethod\n    def f(a): pass", ["C.f: a"]),
    ],
)
def test_the_law_of_signatures_can_fail(code, names):
    assert untyped(ast.parse(code).body) == names
