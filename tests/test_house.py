"""The shape of the house: imports go one way. Each test is named after the way in which a house decays."""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from runs import PROGRAM, ROOT


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


NAMES = {name_of(file) for file in PROGRAM}


def ours(node: ast.AST) -> set[str]:
    """The files of the program that an import statement names."""
    if isinstance(node, ast.Import):
        found = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
        found = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    else:
        return set()
    return found & NAMES


@cache
def imports() -> dict[str, set[str]]:
    trees = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in PROGRAM}
    return {name: set().union(*map(ours, ast.walk(tree))) - {name} for name, tree in trees.items()}


def test_the_watcher_sees_imports():
    assert {"rewards", "teacher", "lm.distributed", "store.checkpoint"} <= imports()["train"]


def test_no_circle_of_files_or_of_folders():
    list(TopologicalSorter(imports()).static_order())  # raises CycleError, which names the circle
    between: dict[str, set[str]] = {}
    for name, others in imports().items():
        folder = name.partition(".")[0]
        between.setdefault(folder, set()).update({other.partition(".")[0] for other in others} - {folder})
    list(TopologicalSorter(between).static_order())


def test_no_arrow_goes_up():
    for name, others in imports().items():
        if name == "config":
            assert not others, "config is the ground: it imports nothing of ours"
        elif "." in name and not name.startswith("tools."):
            upward = {other for other in others if "." not in other} - {"config"}
            assert not upward, f"{name} is in a folder and imports {upward} of the root"
        if not name.startswith("tools."):
            assert not {other for other in others if other.startswith("tools.")}, f"{name} imports a tool"


def test_no_import_hides_in_a_function():
    for file in PROGRAM:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                hidden = {name for inner in ast.walk(node) for name in ours(inner)}
                assert not hidden, f"{file.name}: {node.name} imports {hidden}"
