"""The built pages: they load nothing from the network, their formulas are MathML, and the search knows them all."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
SOURCES = sorted((ROOT / "docs").glob("*.md"))


class Page(HTMLParser):
    """The addresses that a page makes a browser load, the number of its formulas, and its text outside code."""

    def __init__(self, file: Path):
        super().__init__()
        self.file, self.loaded, self.formulas, self.text, self.code = file, [], 0, "", 0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.loaded += [values[name] for name in ("src", "href" if tag == "link" else "") if name in values]
        self.formulas += tag == "math"
        self.code += tag in ("code", "script")

    def handle_endtag(self, tag):
        self.code -= tag in ("code", "script")

    def handle_data(self, data):
        self.text += "" if self.code else data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `make docs` fills."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", folder]
    subprocess.run(build, cwd=ROOT, check=True)
    return folder


def test_pages_load_files_of_the_site(site):
    """Scripts, style sheets, fonts and images are there, so that the pages work without a network."""
    loaded = {(page.file, address) for file in site.rglob("*.html") for page in [Page(file)] for address in page.loaded}
    for file in site.rglob("*.css"):
        loaded |= {(file, address) for address in re.findall(r"url\(['\"]?(?!data:)([^'\")]+)", file.read_text())}
        assert "@import" not in file.read_text()
    files = [(site if address[0] == "/" else file.parent) / address.lstrip("/") for file, address in loaded]
    assert len(files) > 100 and [file for file in files if not file.is_file()] == []


def test_search(site):
    documents = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    locations = {document["location"] for document in documents}
    pages = {source.with_suffix(".html").name for source in SOURCES}
    assert pages == {location.partition("#")[0] or "index.html" for location in locations}
    assert "api.html#idattn.nn.InterdomainAttention" in locations


def test_search_loads_scripts_alone(site):
    """From the disk a browser loads scripts, but starts no workers and requests no files."""
    main, index = ((site / "search" / name).read_text() for name in ("main.js", "index.js"))
    assert not re.search(r"Worker|XMLHttpRequest|fetch|getScript", main)
    assert "lunr" in index and (site / "search" / "search_index.json").read_text() in index


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("query", "expected"), [("symbolic", "./flax.html#export"), ("jax.export", "export"), ("xyzq", "")]
)
def test_search_from_the_disk(site, query, expected):
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    page = f"{(site / 'layer.html').as_uri()}?q={query}"
    done = subprocess.run([*command, page], capture_output=True, text=True, timeout=120, check=True)
    (results,) = re.findall(r'<div id="properdocs-search-results".*?>(.*?)</div>', done.stdout, re.DOTALL)
    links = re.findall(r'<a href="(.+?)">', results)
    assert any(expected in link for link in links) if expected else results == "No results found"


def test_api_reference_opens_with_the_layer(site):
    headings = re.findall(r'<h3 id="([\w.]+)"', (site / "api.html").read_text())
    assert headings[:2] == ["idattn.nn.InterdomainAttention", "idattn.ops"]


def test_code_is_highlighted(site):
    """When the site is built: no script does it in the browser."""
    assert '<span class="kn">import</span>' in (site / "index.html").read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_formulas(site, source):
    """Each becomes MathML, and is written in a way that the repository's page on GitHub typesets as well."""
    blocks, text = [], source.read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        blocks += [block] * (language == "math")
    text = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"\$([^$]+)\$", text)
    # GitHub's Markdown takes escapes of punctuation, emphasis and the bars of tables before the formula.
    assert [formula for formula in inline if re.search(r"\\[^a-zA-Z ]|[*|]|}_|\n", formula)] == []
    page = Page(site / source.with_suffix(".html").name)
    assert page.formulas == len(blocks) + len(inline)
    assert not re.search(r"[$\\]", page.text)
