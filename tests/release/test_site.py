"""The documentation's site builds, and reads well in a browser: from its files alone, without a server or a network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import browser as chromium
import pytest

pytest.importorskip("mkdocs", reason="the site is built by mkdocs, which is not installed")

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md"))
WIDTH = 1280

FINDINGS = r"""(() => {
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode.data, parent = texts.currentNode.parentElement;
        if (!parent.closest("pre, code, script, style") && /\\[()[\]]|\\[a-zA-Z]+|\$[^$]+\$/.test(text))
            found.push("TeX: " + text.trim());
    }
    for (const element of document.querySelectorAll("html, pre, code, table, math, .md-typeset__scrollwrap"))
        if (element.clientWidth && element.scrollWidth > element.clientWidth)
            found.push(`wider than its place, ${element.scrollWidth} > ${element.clientWidth}: ` +
                `${element.localName} ${element.textContent.trim().slice(0, 60)}`);
    for (const image of document.images)
        if (image.complete && !image.naturalWidth) found.push("no image: " + image.src);
    return found;
})()"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.executable() is None:
        missing = f"there is no browser: none of {', '.join(chromium.NAMES)} is on the PATH"
        if os.environ.get("TORCHFAST_BROWSER") == "require":
            pytest.fail(f"TORCHFAST_BROWSER=require, but {missing}")
        pytest.skip(missing)
    opened = chromium.Browser(tmp_path_factory.mktemp("chromium") / "profile", WIDTH)
    yield opened
    opened.close()


def findings(browser, page):
    """What a reader of the page would miss or stumble over."""
    browser.open(page)
    elsewhere = [url for url in browser.requests() if not url.startswith(("file:", "data:"))]
    return browser.run(FINDINGS) + [f"from the network: {url}" for url in elsewhere]


def test_the_site_builds_without_a_warning(site):
    """Warned of: a page that is not in the navigation, a link or an anchor that leads nowhere, an unknown symbol."""
    assert {page.relative_to(site) for page in site.rglob("*.html")} == {*PAGES, Path("404.html")}
    unresolved = [page for page in PAGES if re.search(r":(func|class|mod):", (site / page).read_text())]
    assert not unresolved


def test_pages_read_well_without_a_network(site, browser, tmp_path):
    """Formulas are drawn, nothing overflows, nothing is fetched; the screenshots show the rest to whoever looks."""
    found = {}
    for page in PAGES:
        found[page] = findings(browser, site / page)
        browser.screenshot(tmp_path / f"{'-'.join(page.with_suffix('').parts)}.png")
    assert not any(found.values()), f"{found}; screenshots: {tmp_path}"


PLANTED = {
    "TeX: the loss \\(x\\)": r"<p>the loss \(x\)</p>",
    "TeX: $e^x$": "<p>$e^x$</p>",
    "TeX: \\frac{1}{2}": r"<p>\frac{1}{2}</p>",
    "wider than its place, ": f"<pre style='overflow: auto'>{'wide ' * 500}</pre>",
    "from the network: https://example.org/": "<script src='https://example.org/a.js'></script>",
    "no image: file:": "<img src='nowhere.png'>",
}


@pytest.mark.parametrize("finding", PLANTED)
def test_what_reads_badly_is_found(finding, browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<p>Well.</p><pre>code: \\(x\\) $x$</pre>{PLANTED[finding]}")
    assert [text.startswith(finding) for text in findings(browser, page)] == [True]


def test_a_formula_that_cannot_be_drawn_stops_the_build():
    spec = importlib.util.spec_from_file_location("formulas", ROOT / "docs" / "formulas.py")
    formulas = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(formulas)
    page = SimpleNamespace(file=SimpleNamespace(src_path="page.md"))
    drawn = formulas.on_page_content('<span class="arithmatex">\\(x &lt; 1\\)</span>', page=page)
    assert drawn == "<math><mi>x</mi><mo>&lt;</mo><mn>1</mn></math>"
    with pytest.raises(Exception, match=r"page\.md: .*nonsense"):
        formulas.on_page_content('<div class="arithmatex">\\[\\nonsense\\]</div>', page=page)
