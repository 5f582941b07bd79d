"""Figures of the code: how long and how dense the modules and functions of the package are.

A token is one of `tokenize`, without comments, line ends, indentation and docstrings; an f-string is one token, as it
was before Python 3.12, so that the figures are the same on every version. A code line holds at least one token. A body
is what follows a function's signature, functions inside it included.
"""

import argparse
import ast
import dataclasses
import statistics
import tokenize
from pathlib import Path

import pytorch_influence_functions

PACKAGE = Path(pytorch_influence_functions.__file__).parent
DENSEST = 10
SILENT = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
    tokenize.ENDMARKER,
}  # fmt: skip
STARTS = {
    getattr(tokenize, name)
    for name in ("FSTRING_START", "TSTRING_START")
    if hasattr(tokenize, name)
}
ENDS = {
    getattr(tokenize, name)
    for name in ("FSTRING_END", "TSTRING_END")
    if hasattr(tokenize, name)
}


@dataclasses.dataclass(frozen=True)
class Body:
    """A function's body: its name (`module:Class.function`), code lines and tokens."""

    name: str
    lines: int
    tokens: int

    @property
    def density(self):
        """Tokens a line; 0 where there is nothing but a docstring."""
        return self.tokens / max(self.lines, 1)


@dataclasses.dataclass(frozen=True)
class Module:
    """A file: its name, lines, code lines, tokens and bodies."""

    name: str
    lines: int
    code_lines: int
    tokens: int
    bodies: tuple[Body, ...]


def spoken(path):
    """Where the tokens of a file begin, [(line, column)], and which lines they stand on."""
    begins, lines, depth = [], set(), 0
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in SILENT:
                continue
            lines.update(range(token.start[0], token.end[0] + 1))
            depth -= token.type in ENDS
            if depth == 0 and token.type not in ENDS:
                begins.append(token.start)
            depth += token.type in STARTS
    return begins, lines


def is_docstring(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def functions(tree, path=()):
    """Every function of a tree with its dotted name, those inside classes and other functions too."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        )
        inner = (*path, node.name) if named else path
        if named and not isinstance(node, ast.ClassDef):
            yield ".".join(inner), node
        yield from functions(node, inner)


def read(path, root):
    """The figures of one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    silent = set()
    for node in filter(is_docstring, ast.walk(tree)):
        silent.update(range(node.lineno, node.end_lineno + 1))
    begins, lines = spoken(path)
    begins = [begin for begin in begins if begin[0] not in silent]
    lines -= silent
    name = path.relative_to(root).as_posix()

    def body(function, node):
        first, last = node.body[0], node.body[-1]
        start, stop = (first.lineno, first.col_offset), last.end_lineno
        tokens = sum(start <= begin and begin[0] <= stop for begin in begins)
        return Body(
            f"{name}:{function}",
            sum(first.lineno <= line <= stop for line in lines),
            tokens,
        )

    bodies = tuple(body(function, node) for function, node in functions(tree))
    return Module(name, len(text.splitlines()), len(lines), len(begins), bodies)


def package_figures(root=PACKAGE):
    """The figures of every file of a package."""
    return [read(path, root) for path in sorted(root.rglob("*.py"))]


def mean_density(modules):
    """Tokens a code line."""
    return sum(module.tokens for module in modules) / sum(
        module.code_lines for module in modules
    )


def percentile_90(values):
    """The smallest value that at least nine tenths of the values do not exceed."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * 9 // 10) - 1]


def report(modules, densest=DENSEST):
    """What there is to say, a line each."""
    bodies = [body for module in modules for body in module.bodies]
    lines, tokens = (
        [body.lines for body in bodies],
        [body.tokens for body in bodies],
    )
    longest = max(modules, key=lambda module: module.lines)
    yield f"modules                {len(modules)}"
    yield f"lines                  {sum(module.lines for module in modules)}"
    yield f"lines of code          {sum(module.code_lines for module in modules)}"
    yield f"functions              {len(bodies)}"
    yield f"body lines             median {statistics.median(lines):g}, p90 {percentile_90(lines)}, max {max(lines)}"
    yield f"body tokens            p90 {percentile_90(tokens)}, max {max(tokens)}"
    yield f"tokens a line of code  {mean_density(modules):.2f}"
    yield f"longest file           {longest.name}, {longest.lines} lines"
    yield from table("densest modules (tokens a line, lines)", [
        (m.tokens / max(m.code_lines, 1), m.code_lines, m.name) for m in modules if m.code_lines >= 20
    ], densest)  # fmt: skip
    yield from table(
        "bodies with most tokens (tokens, lines)",
        [(b.tokens, b.lines, b.name) for b in bodies],
        densest,
    )
    yield from table("densest bodies of at least 4 lines (tokens a line, lines)", [
        (b.density, b.lines, b.name) for b in bodies if b.lines >= 4
    ], densest)  # fmt: skip


def table(title, rows, count):
    yield ""
    yield title
    for figure, lines, name in sorted(rows, reverse=True)[:count]:
        yield f"  {figure:6.1f}  {lines:4d}  {name}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=PACKAGE,
        help="another package than this one",
    )
    parser.add_argument(
        "--densest",
        type=int,
        default=DENSEST,
        help="how many rows of each list",
    )
    arguments = parser.parse_args()
    print(
        "\n".join(report(package_figures(arguments.folder), arguments.densest))
    )


if __name__ == "__main__":
    main()
