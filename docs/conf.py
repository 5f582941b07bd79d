"""How `make docs` builds these pages, with every warning an error."""

import re

import pytorch_influence_functions as ptif

project = "pytorch_influence_functions"
version = release = ptif.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md", "_build"]  # index.rst holds README.md
html_theme = "furo"
html_title = project
html_show_copyright = False
myst_heading_anchors = 3  # links to headings, as on GitHub

default_role = "py:obj"  # `name` in a docstring is a link where it is known
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
# sentences, in which a colon parts no type from a text
napoleon_custom_sections = ["Returns"]

LETTERS = {
    "nabla": "∇", "lambda": "λ", "theta": "θ", "ell": "ℓ", "Delta": "Δ",
    "epsilon": "ε", "sum": "Σ", "mu": "μ", "sigma": "σ", "sqrt": "√",
}  # fmt: skip


def plain_letters(app, what, name, obj, options, lines):
    """The symbols of docstrings as letters; any other backslash stays one."""
    text = "\n".join(lines)
    text = re.sub(r"\\([a-zA-Z]+)", lambda m: LETTERS.get(m[1], m[0]), text)
    lines[:] = text.replace("\\", "\\\\").split("\n")


def setup(app):
    """Before napoleon reads them."""
    app.connect("autodoc-process-docstring", plain_letters, priority=400)
