"""Sphinx's configuration. `docs/build.py` prepares what it reads and calls it."""

import configparser
import os
from pathlib import Path

from docs._ext.api import linkcode_resolve  # noqa: F401 (sphinx.ext.linkcode calls it)

ROOT = Path(os.environ["LMBOOK_SITE_ROOT"])
OUT = Path(os.environ["LMBOOK_SITE_OUT"])

settings = configparser.ConfigParser()
settings.read(ROOT / "settings.ini", encoding="utf-8")
project = settings["DEFAULT"]["title"]
author = settings["DEFAULT"]["author"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx_copybutton",
    "sphinx_external_toc",
    "docs._ext.cells",
    "docs._ext.api",
    "docs._ext.search",
]
exclude_patterns = ["book.json"]

# --- notebooks: the stored outputs are what is shown, nothing is run ---
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # the default loads from elsewhere
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
# What a chapter may use beside CommonMark is what JupyterLab shows as well; colon fences and attributes are for generated pages.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "fieldlist"]
myst_heading_anchors = 4
myst_heading_slug_func = "docs.stage.heading_anchor"
myst_update_mathjax = False
myst_links_external_new_tab = False

# --- API ---
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
add_module_names = False
toc_object_entries_show_parents = "hide"

# --- nothing comes from elsewhere ---
mathjax_path = "vendor/mathjax/startup.js"
mathjax_config_path = "_static/mathjax-config.js"

# --- look ---
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static", str(OUT / "static")]
html_css_files = ["fonts.css", "book.css"]
html_js_files = ["files.js"]
html_logo = "_static/logo.svg"
html_favicon = "_static/logo.svg"
html_copy_source = True
html_sourcelink_suffix = ""
html_show_sphinx = False
html_last_updated_fmt = None
html_theme_options = {
    "use_download_button": True,
    "use_fullscreen_button": False,
    "use_edit_page_button": False,
    "use_repository_button": False,
    "use_issues_button": False,
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
    "logo": {"text": project, "alt_text": project},
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "article_header_start": ["toggle-primary-sidebar.html"],
}
copybutton_selector = ":not(.output):not(.prompt) > div.highlight > pre"
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
