"""The house: six rooms, imports that point down, no circles, and a run that needs torch, numpy and tqdm alone."""

import ast
import pathlib
import sys

import pytest

import pytorch_influence_functions

PACKAGE = pathlib.Path(pytorch_influence_functions.__file__).parent
ROOMS = {
    "data": 1,
    "model": 2,
    "solve": 3,
    "show": 5,
    "evaluation": 5,
    "run": 6,
}
BETWEEN = {
    "utils": 0, "config": 0, "influence": 4, "influence_function": 7, "calc_influence_function": 7, "__init__": 8,
}  # fmt: skip
"""The modules outside the rooms."""
FILES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
EXTRAS = {"show/plotting": {"matplotlib"}}
MOST_LINES = 350


def floor(module):
    return {**ROOMS, **BETWEEN}[module.split("/")[0]]


def own_imports(module, tree):
    """Modules of the package that a module imports, wherever in it, as paths like `solve/cg`."""
    folder = module.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.split(".")[0] == PACKAGE.name]
            yield from (exists("/".join(name.split(".")[1:])) for name in names)
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            base = folder[: len(folder) - node.level + 1] + parts
        elif parts and parts[0] == PACKAGE.name:
            base = parts[1:]
        else:
            continue
        for name in node.names:
            yield exists("/".join([*base, name.name])) or exists("/".join(base)) or "__init__"


def exists(path):
    if path in FILES:
        return path
    return f"{path}/__init__" if f"{path}/__init__" in FILES else None


def other_imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


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
