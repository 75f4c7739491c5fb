r"""Makes Markdown of docstrings, for mkdocstrings: a griffe extension.

Docstrings are written for ``help()``: Sphinx's roles and ``.. math::``, Google's sections. A role becomes a link to the
API page that has the symbol, ``Args`` a list, ``Example`` a code block.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from griffe import Extension

SECTIONS = ("Args", "Returns", "Raises", "Example")
API = Path(__file__).parent / "api"
TORCH = "https://docs.pytorch.org/docs/stable/generated/"


def documented(folder: Path = API) -> list[str]:
    """The paths of the symbols that API pages have."""
    pages = (page.read_text() for page in sorted(folder.glob("*.md")))
    return [path for page in pages for path in re.findall(r"^::: (\S+)$", page, re.M)]


def _link(role: str, name: str, where: str, known: set[str]) -> str:
    """To what a role names, seen from the symbol at the path ``where``: the nearest package that has it."""
    if name.startswith("torch."):
        return f"[`{name}`]({TORCH}{name}.html)"
    parts = where.split(".")
    nearest = [".".join([*parts[:n], name]) for n in range(len(parts) - 1, 0, -1)]
    for path in (name, *nearest):
        # The rooms of losses are called as their functions are.
        if path in known and (role == "mod" or not path.startswith("torchfast.losses.")):
            return f"[`{name}`][{path}]"
    return f"`{name}`"


def _math(match: re.Match[str]) -> str:
    formula = " ".join(match[2].split())
    return f"{match[1]}$$\n{match[1]}{formula}\n{match[1]}$$\n"


def _list(section: str) -> str:
    """Of a section's items, each ``name: text``, where the text may go on in further, indented lines."""
    items = re.split(r"\n(?=\S)", section)
    named, others = [], []
    for item in items:
        match = re.match(r"([\w, \n]+):\s+(.*)", item, re.S)
        if not match:
            others.append(item)
            continue
        names = ", ".join(f"`{name}`" for name in match[1].replace(",", " ").split())
        named.append(f"- {names}: {match[2]}")
    return "\n".join(named) + "".join(f"\n\n{other}" for other in others)


def markdown(docstring: str, where: str, known: set[str]) -> str:
    """Of a docstring without common indentation."""
    text = re.sub(r":(func|class|mod):`~?([\w.]+)`", lambda m: _link(m[1], m[2], where, known), docstring)
    text = re.sub(r":math:`([^`]*)`", r"\\(\1\\)", text, flags=re.S)
    text = re.sub(r"^( *)\.\. math:: (.*(?:\n\1 +.*)*)$", _math, text, flags=re.M)
    text = re.sub(r"::$", ":", text, flags=re.M)
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n((?:(?: .*)?\n)*)", text + "\n", flags=re.M)
    whole = parts[0]
    for name, section, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        section = textwrap.dedent(section).strip("\n")
        if name == "Example":
            section = f"```pycon\n{section}\n```"
        elif name != "Returns":
            section = _list(section)
        whole += f"**{name}**\n\n{section}\n\n{after}"
    return whole.strip()


class Docstrings(Extension):
    def __init__(self) -> None:
        self.known = set(documented())

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, obj.path, self.known)
