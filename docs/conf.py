"""How the documentation is built. Warnings, such as broken references, are errors (``-W`` in .ci/run)."""

import importlib.util
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import gen_optim

project = "gen_optim"
author = copyright = "gen_optim contributors"  # noqa: A001 - the name that Sphinx reads
version = release = gen_optim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gen_optim {release}"
pygments_style = "default"  # the theme's own has no colour for the added lines of a diff

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
# Frameworks that integrations build on. The reference is made with or without them.
_frameworks = ("accelerate", "lightning", "matplotlib", "peft", "tensorboard", "torchmetrics", "transformers")
autodoc_mock_imports = [name for name in _frameworks if importlib.util.find_spec(name) is None]
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
# Nothing is fetched during the build, so references to other projects cannot be resolved.
_elsewhere = ("torch", "nn", "dist", "numpy", "collections", "contextlib", "typing", "np", "npt", *_frameworks)
nitpick_ignore_regex = [
    ("py:.*", rf"({'|'.join(_elsewhere)})\..*"),
    # Names as the source writes them; some are imported for type checkers only, others are not public.
    ("py:class", "optional|Any|Axes|Tensor|Optimizer|ArrayLike|Accelerator|SummaryWriter"),
    ("py:class", r"Closure|Loss|Path|ProcessGroup|Session|gen_optim\.rules\.base\._State"),
    ("py:(mod|func)", r"gen_optim\.rules\.\w+|search_initial_lr"),
]

if not Path(gen_optim.__file__).is_relative_to(Path(__file__).parent.parent):
    raise RuntimeError(f"the reference would be made from {gen_optim.__file__}, not from this checkout")


def link_to_reports(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Link to the pages that include the results of benchmarks; files outside of the documentation are no pages."""
    source[0] = re.sub(r"\]\(\.\./benchmarks/results/([\w-]+\.md)\)", r"](reports/\1)", source[0])


def write_mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw themselves: pages need no script and no network connection."""
    formula = tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block))
    # Wide formulas scroll by themselves on narrow screens.
    translator.body.append(f'<div style="overflow-x: auto">{formula}</div>' if "block" in node.tagname else formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what Sphinx calls."""
    app.connect("source-read", link_to_reports)
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
