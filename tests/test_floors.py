"""The house: imports point down, and a run needs torch, numpy and tqdm alone."""

import ast
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "pytorch_influence_functions"
FLOORS = {
    "utils": 0, "config": 0, "data": 0, "objective": 0, "results": 0,
    "gradients": 1, "curvature": 1, "probe": 1, "system": 1, "lissa": 1, "influence_function": 1,
    "cg": 2, "exact": 2, "ekfac": 2, "lowrank": 2, "damping": 2, "auto": 2, "solvers": 2, "store": 2,
    "influence": 3, "tuning": 3, "evaluation": 3, "plotting": 3,
    "calc_influence_function": 4,
    "__init__": 5,
}  # fmt: skip
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
EXTRAS = {"plotting": {"matplotlib"}}


def own_imports(tree):
    """Modules of the package that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [name.name for name in node.names]


def other_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert module in FLOORS, f"{module} has no floor yet: put it into the table"
    for other in own_imports(MODULES[module]):
        assert FLOORS[other] <= FLOORS[module], f"{module} imports {other} from above"


def test_no_circles():
    graph = {module: set(own_imports(tree)) for module, tree in MODULES.items()}
    while graph:
        free = [module for module, needs in graph.items() if not needs & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for module in free:
            del graph[module]


@pytest.mark.parametrize("module", MODULES)
def test_few_dependencies(module):
    allowed = {"torch", "numpy", "tqdm", "__future__"} | set(sys.stdlib_module_names) | EXTRAS.get(module, set())
    assert set(other_imports(MODULES[module])) <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_no_print_and_no_assert(module):
    for node in ast.walk(MODULES[module]):
        assert not isinstance(node, ast.Assert)
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
