"""Imports within the project point only down, and the reports need no PyTorch."""

import ast
import builtins
import collections

from cleanai.runtime.scenario import PROJECT, SCRIPTS_DIR
from tests.helpers import ended, started

TOP = ("cli", "exit", "options", "run", "search", "stages", "sweep")
FOLDERS = {
    "runtime": (),
    "data": ("runtime",),
    "network": ("data", "runtime"),
    "measure": ("network", "data", "runtime"),
    "pruning": ("network", "data", "runtime"),
    "report": ("measure.significance", "runtime"),
}
# What the modules of each part may import, besides those of their own part and the package itself.
MAY_IMPORT = {**FOLDERS, **dict.fromkeys((*TOP, "api", "test_scenarios"), (*TOP, *FOLDERS))}


def imported(path):
    """The modules of cleanai that a file imports anywhere in it, without "cleanai."."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name.startswith("cleanai."):
                yield name[len("cleanai.") :]


def test_imports_point_down():
    paths = [*(PROJECT / "cleanai").rglob("*.py"), *SCRIPTS_DIR.glob("*.py")]
    parts = {path: path.relative_to(PROJECT / "cleanai" if path.parent != SCRIPTS_DIR else PROJECT) for path in paths}
    for path, within in parts.items():
        part = within.parts[0].replace(".py", "")
        if part == "__init__":
            continue  # it imports when a name is used first; the test below
        allowed = ("UserError", "__version__", part, *MAY_IMPORT.get(part, ()))
        for name in imported(path):
            assert any(f"{name}.".startswith(f"{each}.") for each in allowed), f"{within} imports {name}"
    assert {within.parts[0].replace(".py", "") for within in parts.values()} == {*MAY_IMPORT, "__init__"}


def _evaluated(tree):
    """The nodes of a module without its annotations, which are not evaluated (PEP 563)."""
    for node in ast.iter_child_nodes(tree):
        skipped = [getattr(tree, name, None) for name in ("annotation", "returns")]
        if node not in skipped:
            yield node
            yield from _evaluated(node)


def _subscripted_classes(source):
    """The classes of Python in a module that are subscripted, which Python 3.8 cannot do, as in `Counter[int]()`."""
    classes = {name for module in (builtins, collections) for name, kind in vars(module).items() if type(kind) is type}
    return [
        node.value.id
        for node in _evaluated(ast.parse(source))
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", None) in classes
    ]


def test_no_class_is_subscripted_that_python_3_8_cannot_subscript():
    assert _subscripted_classes("x: Counter[int] = Counter()\ny = Counter[int]()\nz = list[0]") == ["Counter", "list"]
    for folder in (PROJECT / "cleanai", SCRIPTS_DIR, PROJECT / "benchmarks"):
        for path in folder.rglob("*.py"):
            assert _subscripted_classes(path.read_text(encoding="utf-8")) == [], path


def test_reports_and_what_a_finished_script_needs_do_not_import_pytorch():
    modules = [f"cleanai.report.{path.stem}" for path in (PROJECT / "cleanai" / "report").glob("*.py")]
    assert len(modules) > 8
    program = f"import sys, cleanai, {', '.join([*modules, 'cleanai.cli', 'cleanai.exit', 'cleanai.stages'])}\n"
    program += "assert {'prune', 'image_set', 'UserError'} <= {*dir(cleanai)} & {*cleanai.__all__}\n"
    with started(
        ["-c", f"{program}print(sorted({{'torch', 'torchvision', 'scipy', 'sklearn'}} & {{*sys.modules}}))"]
    ) as process:
        assert ended(process).stdout.strip() == "[]"
