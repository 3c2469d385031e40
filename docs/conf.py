"""Configuration of Sphinx. `make docs` writes the pages to build/docs."""

import relops

project = "relops"
author = "The relops developers"
copyright = "2026, the relops developers"
release = version = relops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
html_theme = "furo"
html_title = f"relops {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Most quotes in docstrings are part of Python code, so Sphinx must not turn them into typographic quotes.
smartquotes = False
# Single backticks in docstrings mark code, as in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_custom_sections = ["Gradients"]
napoleon_use_ivar = True
copybutton_prompt_text = ">>> "
