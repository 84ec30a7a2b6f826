"""Sphinx: these pages as a site. Build: sphinx-build -W docs build/docs (extra ``docs``)."""

from __future__ import annotations

from importlib import metadata

project = "pyllama-dsv4"
author = "the pyllama-dsv4 authors"
release = version = metadata.version("pyllama-dsv4")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
html_theme = "alabaster"
html_theme_options = {"description": "DeepSeek-V4 from its native FP4/FP8 file", "page_width": "1100px"}
html_show_sourcelink = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style")]
