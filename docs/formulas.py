"""Makes MathML of formulas, which browsers draw without a script or a network: a hook of mkdocs.

pymdownx.arithmatex has marked them, in the pages and in docstrings; they are TeX until here.
"""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

MARKED = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CONVERTER = LatexToMathML(fancy_error=False)  # it raises at a command that it does not know


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    def mathml(match: re.Match[str]) -> str:
        formula = unescape(match[2]).strip()
        try:
            return CONVERTER.convert_with_local_state(formula, displaystyle=match[1] == "div")
        except LatexError as error:
            raise PluginError(f"{page.file.src_path}: {formula!r} cannot be made MathML: {error}") from error

    return MARKED.sub(mathml, html)
