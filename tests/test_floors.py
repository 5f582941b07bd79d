"""The house: six rooms, imports that point down, no circles, and a run that needs torch, numpy and tqdm alone."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest
import pytorch_influence_functions

PACKAGE = pathlib.Path(pytorch_influence_functions.__file__).parent
ROOMS = {
    "data": 1,
    "model": 2,
    "solve": 3,
    "show": 6,
    "evaluation": 6,
    "run": 7,
}
BETWEEN = {
    "utils": -1,
    "rules": -1,
    "script": -1,
    "config": 0,
    "arguments": 1,
    "sample_gradients": 3.5,
    "scoring": 3.7,
    "member": 4,
    "out_of_sample": 4.5,
    "effect": 4.5,
    "perturbation": 4.5,
    "influence": 5,
    "influence_function": 8,
    "calc_influence_function": 8,
    "__init__": 9,
    "__main__": 9,
}
"""The modules outside the rooms."""
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
EXTRAS = {
    "show/axes": {"matplotlib"},
    "show/plotting": {"matplotlib"},
}
MOST_LINES = 350


def floor(module):
    return {**ROOMS, **BETWEEN}[module.split("/")[0]]


def own_imports(module, tree):
    """Modules of the package that a module imports, wherever in it, as paths like `solve/cg`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            parted = [name.name.split(".") for name in node.names]
            yield from (resolve(parts[1:]) for parts in parted if parts[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom):
            base = own_base(module, node)
            if base is not None:
                yield from (resolve([*base, name.name]) for name in node.names)


def own_base(module, node):
    """Folder or module inside the package that `from ... import` names, as parts; None where it is another package."""
    parts = node.module.split(".") if node.module else []
    if node.level:
        folder = module.split("/")[:-1]
        assert node.level <= len(folder) + 1, f"{module} imports from above the package"
        return folder[: len(folder) - node.level + 1] + parts
    return parts[1:] if parts[0] == PACKAGE.name else None


def resolve(parts):
    """The module that these parts name, or the one that holds the last of them."""
    for tried in (parts, parts[:-1]):
        for path in ("/".join(tried), "/".join([*tried, "__init__"])):
            if path in FILES:
                return path
    raise AssertionError(f"no module {'.'.join(parts)} in the package")


def other_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("module", "source", "imported"),
    [
        ("solve/cg", "import torch, math.x", set()),
        ("solve/cg", "import pytorch_influence_functions", {"__init__"}),
        ("solve/cg", "import os, pytorch_influence_functions.data.batch as b", {"data/batch"}),
        ("solve/cg", "from pytorch_influence_functions import solve, config", {"solve/__init__", "config"}),
        ("solve/cg", "from pytorch_influence_functions.data.batch import Batch", {"data/batch"}),
        ("solve/cg", "from . import passes", {"solve/passes"}),
        ("solve/cg", "from .passes import anything", {"solve/passes"}),
        ("solve/cg", "from .. import utils", {"utils"}),
        ("solve/cg", "from .. import InfluenceFunction", {"__init__"}),
        ("solve/cg", "from ..data import batch, samples", {"data/batch", "data/samples"}),
        ("solve/cg", "def f():\n    if x:\n        from ..influence import InfluenceFunction", {"influence"}),
        ("influence", "from .solve.cg import iterate\nfrom .show import anything", {"solve/cg", "show/__init__"}),
    ],
)
def test_imports_of_every_form_are_seen(module, source, imported):
    assert set(own_imports(module, ast.parse(source))) == imported


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down_between_rooms(module):
    for other in own_imports(module, FILES[module]):
        same_room = module.split("/")[0] == other.split("/")[0]
        assert same_room or floor(other) < floor(module), f"{module} imports {other}, which is not below it"


def test_no_circles():
    graph = {module: set(own_imports(module, tree)) - {module} for module, tree in FILES.items()}
    while graph:
        free = [module for module, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_every_folder_is_a_room():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ROOMS)
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("module", FILES)
def test_no_long_file(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES, f"{module} has {lines} lines"


@pytest.mark.parametrize("module", FILES)
def test_few_dependencies(module):
    allowed = {"torch", "numpy", "tqdm", "__future__"} | set(sys.stdlib_module_names) | EXTRAS.get(module, set())
    assert set(other_imports(FILES[module])) <= allowed


@pytest.mark.parametrize("module", FILES)
def test_no_print_and_no_assert(module):
    for node in ast.walk(FILES[module]):
        assert not isinstance(node, ast.Assert)
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")


def test_the_import_is_light():
    """It loads nothing large that a run alone needs: torch._dynamo takes longer than all of the package."""
    code = (
        "import sys, torch; before = set(sys.modules); import pytorch_influence_functions; "
        "print(sorted({name.split('.')[0] + '.' + name.split('.')[1] for name in set(sys.modules) - before "
        "if name.startswith('torch._')}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "_dynamo" not in run.stdout
