"""The site's settings; `make docs` builds it into build/docs, without the network, and every warning is an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the docstrings are those of this tree

project = "curveball_fused"
author = "The curveball_fused authors"
project_copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write `code` with single backticks
smartquotes_action = "De"  # dashes; quotes stay those of the code
add_module_names = False
python_maximum_signature_line_length = 100
autodoc_member_order = "bysource"
autodoc_mock_imports = ["accelerate", "transformers"]  # of which only an integration's base class is needed
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a dataclass are described once, in its docstring
napoleon_use_rtype = False

html_theme = "furo"
html_title = "curveball_fused"
