"""Settings of the documentation site, built by ``sphinx-build -W --keep-going -c docs . docs/_build`` from the root."""

import sys
from pathlib import Path

import lightning_locality

sys.path.insert(0, str(Path(__file__).parent))  # site_directives

project = "lightning_locality"
author = "The lightning_locality maintainers"
release = version = lightning_locality.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "site_directives",
]
root_doc = "docs/index"
# the repository is the source, so that links and pictures are those that work on GitHub
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**",
    "data/README.md",
    "results/README.md",
    "results/*/README.md",
    "benchmarks/results/*/README.md",
]
exclude_patterns = ["docs/_build/**", "docs/_pictures/**"]
smartquotes = False  # options have two hyphens
source_suffix = {".md": "markdown"}
suppress_warnings = ["config.cache"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"lightning_locality {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # leads from / to the start page
html_copy_source = False
html_show_copyright = False
