"""The site: README.md and docs/ as they are, and an API reference from the docstrings.

Its source is the whole repository, so that every link leads to the same page here and on GitHub.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAVIGATION = {
    "Guide": [
        "docs/models",
        "docs/training",
        "docs/serving",
        "docs/parallel",
        "docs/branches",
        "docs/module",
    ],
    "How to": [
        "docs/masks",
        "docs/moving",
        "docs/examples",
        "docs/finetune",
        "docs/parity",
        "docs/weights",
        "docs/troubleshooting",
    ],
    "Reference": [
        "docs/site/api",
        "docs/coverage",
        "docs/benchmarks",
        "docs/numerics",
        "docs/batch_invariance",
        "docs/versions",
        "CHANGELOG",
    ],
    "Development": [
        "docs/design",
        "docs/hopper",
        "docs/upstream",
        "CONTRIBUTING",
        "CODE_OF_CONDUCT",
        "SECURITY",
    ],
}

project = "hf_flash_two"
version = release = re.search(
    r'__version__ = "(.*)"', (ROOT / "hf_flash_two" / "__init__.py").read_text()
)[1]
root_doc = "README"
include_patterns = [f"{root_doc}.md", *(f"{x}.*" for pages in NAVIGATION.values() for x in pages)]
exclude_patterns = [".*", "build", "runs", "docs/masks/*"]
extensions = ["autoapi.extension", "myst_parser", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 4

# The source is read, not imported: the site needs neither PyTorch nor Transformers.
autoapi_dirs = [str(ROOT / "hf_flash_two")]
autoapi_generate_api_docs = False
autoapi_python_class_content = "class"
# Gluon's names are looked up when the package is imported.
suppress_warnings = ["autoapi.python_import_resolution"]
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
# In docstrings `name` is a name of the code.
default_role = "code"
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"hf_flash_two {version}"


def add_navigation(app, docname: str, source: list[str]) -> None:
    """The table of contents, which GitHub would show as text."""
    if docname == root_doc:
        for caption, pages in NAVIGATION.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def add_index(app, error: Exception | None) -> None:
    """The first page under the name that servers look for."""
    if error is None and app.builder.name == "html":
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app) -> None:
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_index)
