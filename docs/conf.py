"""How the documentation is built; warnings, broken references among them, are errors (``-W`` in .ci/run)."""

import importlib.util
from pathlib import Path

import gen_optim

project = "gen_optim"
author = copyright = "gen_optim contributors"  # noqa: A001 - the name that Sphinx reads
version = release = gen_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gen_optim {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
# Frameworks that integrations build on; the reference is made with or without them.
_frameworks = ("accelerate", "lightning", "matplotlib", "peft", "tensorboard", "torchmetrics", "transformers")
autodoc_mock_imports = [name for name in _frameworks if importlib.util.find_spec(name) is None]
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
# Nothing is fetched while building, so what other projects document cannot be resolved.
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(('torch', 'numpy', 'collections', 'typing', 'np', 'npt', *_frameworks))})\..*"),
    # Names as the source writes them, where some are imported for type checkers alone.
    ("py:class", "optional|Any|Axes|Tensor|Optimizer|ArrayLike|Closure|Loss|ProcessGroup|Accelerator|SummaryWriter"),
]

if not Path(gen_optim.__file__).is_relative_to(Path(__file__).parent.parent):
    raise RuntimeError(f"the reference would be made from {gen_optim.__file__}, not from this checkout")
