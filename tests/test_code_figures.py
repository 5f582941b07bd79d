"""How long and how dense the code is: benchmarks/code_figures.py counts right, and the package keeps to its bounds."""

import importlib.util
import sys
from pathlib import Path

import pytest


def code_figures():
    """benchmarks/code_figures.py, which reads the package that is imported."""
    path = Path(__file__).parents[1] / "benchmarks" / "code_figures.py"
    spec = importlib.util.spec_from_file_location("code_figures", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FIGURES = code_figures()
MODULES = FIGURES.package_figures()
MOST_TOKENS_A_LINE = 8
MOST_TOKENS_A_BODY = 180  # nine bodies of ten
MOST_LINES = 350

# source, code lines, tokens, {body: (lines, tokens)}
COUNTED = {
    "docstrings, comments and blank lines": ('"""One.\n\nTwo."""\n\n# three\nx = 1  # four\n"""Of x."""\n', 1, 3, {}),
    "one line over several": ("x = [\n    1,\n    2,\n]\n", 4, 8, {}),
    "a string that is a value": ("x = '''a\nb'''\n", 2, 3, {}),
    "an f-string is one token": ("x = f'{a + b:{c}} {f(1)}' f'{d}'\n", 1, 4, {}),
    "a function": ('def f(x):\n    """Text."""\n    return x\n', 2, 8, {"f": (1, 2)}),
    "only a docstring": ('def f():\n    """Text."""\n', 1, 5, {"f": (0, 0)}),
    "on the line of the signature": ("def f(x): return x\n", 1, 8, {"f": (1, 2)}),
    "inside a class and a function": (
        "class A:\n    def f(self):\n        def g():\n            return 1\n        return g\n",
        5, 18, {"A.f": (3, 9), "A.f.g": (1, 2)},
    ),
    "inside a branch": ("if x:\n    def f():\n        pass\n", 3, 9, {"f": (1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_what_is_counted(case, tmp_path):
    source, code_lines, tokens, bodies = COUNTED[case]
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    (module,) = FIGURES.package_figures(tmp_path)
    assert (module.lines, module.code_lines, module.tokens) == (source.count("\n"), code_lines, tokens)
    assert {body.name.split(":")[1]: (body.lines, body.tokens) for body in module.bodies} == bodies


def test_percentile():
    assert [FIGURES.percentile_90(range(1, n + 1)) for n in (1, 9, 10, 11, 20)] == [1, 9, 9, 10, 18]


def test_whole_package_is_read():
    assert {module.name.split("/")[0] for module in MODULES} > {"data", "model", "solve", "run", "evaluation", "show"}


def test_tokens_a_line():
    worst = sorted(((m.tokens / m.code_lines, m.name) for m in MODULES if m.code_lines >= 20), reverse=True)[:5]
    assert FIGURES.mean_density(MODULES) <= MOST_TOKENS_A_LINE, f"densest: {worst}"


def test_tokens_a_body():
    bodies = [body for module in MODULES for body in module.bodies]
    longest = sorted(bodies, key=lambda body: -body.tokens)[:5]
    assert FIGURES.percentile_90([body.tokens for body in bodies]) <= MOST_TOKENS_A_BODY, f"longest: {longest}"


def test_lines_a_file():
    assert {module.name: module.lines for module in MODULES if module.lines > MOST_LINES} == {}
