"""The page at / without a browser: what is served, and that its parts fit together. tests/browser drives it in Chromium."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving
from tpserve.frontend import page

KEY = "k3y"
VOID = {"meta", "link", "input", "br"}
REFERENCES = ("for", "aria-controls", "aria-labelledby", "aria-describedby")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model"), api_key=KEY, exposed=True) as server:
        yield server


@pytest.fixture(scope="module")
def served(server: Server) -> checks.Reply:
    return checks.Client(server.url).get("/")


class Document(HTMLParser):
    """The elements of a document; an end tag without its start tag is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self._open[-1] if self._open else ""] = data

    def values(self, *names: str) -> list[str]:
        return [word for _, attributes in self.elements for name in names for word in attributes.get(name, "").split()]


@pytest.fixture(scope="module")
def document(served: checks.Reply) -> Document:
    return Document(served.body.decode())


def test_served_without_a_key_and_its_calls_need_one(server: Server, served: checks.Reply) -> None:
    assert served.status == 200 and served.headers["content-type"] == "text/html; charset=utf-8"
    assert len(served.body) < 100_000
    assert checks.Client(server.url).send("HEAD", "/").status == 200
    checks.is_error(checks.Client(server.url).get("/v1/models"), 401)
    assert checks.Client(server.url, {"Authorization": f"Bearer {KEY}"}).get("/v1/models").status == 200
    checks.is_error(checks.Client(server.url).post("/"), 405)


def test_the_policy_forbids_what_is_not_the_page(served: checks.Reply, document: Document) -> None:
    policy = dict(part.strip().split(" ", 1) for part in served.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'" and policy["base-uri"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(document.texts[name].encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert served.headers["x-content-type-options"] == "nosniff" and served.headers["referrer-policy"] == "no-referrer"


def test_nothing_is_loaded_from_elsewhere(served: checks.Reply, document: Document) -> None:
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[\w.-]+", re.sub(r"(?m)^\s*// .*$", "", served.body.decode())))
    assert addresses <= {"http://www.w3.org"}, "the name space of SVG"
    links = [attributes[name] for _, attributes in document.elements for name in ("src", "href", "action") if name in attributes]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "{{" not in served.body.decode().replace(document.texts["script"], "")


def test_no_text_becomes_markup(document: Document) -> None:
    """What a model writes is untrusted."""
    script, style = document.texts["script"], document.texts["style"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser", script)
    assert not any(name.startswith("on") or name == "style" for _, attributes in document.elements for name in attributes)
    assert "url(" not in style and "@import" not in style


def test_every_name_that_is_used_exists(document: Document) -> None:
    ids = Counter(document.values("id"))
    assert max(ids.values()) == 1
    script = document.texts["script"]
    used = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(used) >= 40 and used <= set(ids), used - set(ids)
    assert set(document.values(*REFERENCES)) <= set(ids)
    assert {"schema-error", "tools-error", "tab-chat", "tab-status", "view-chat", "view-status"} <= set(ids), "made of parts"


def test_everything_to_use_has_a_name(document: Document) -> None:
    """The browser's own view of names is tested in tests/browser."""
    labelled = set(document.values("for"))
    for tag, attributes in document.elements:
        if tag in ("textarea", "select") and "data-field" not in attributes and attributes["id"] != "snippet-text":
            assert attributes["id"] in labelled, attributes


def test_all_files_are_part_of_it() -> None:
    here = Path(page.HERE)
    assert {path.stem for path in here.glob("*.js")} == set(page.SCRIPTS)
    assert all(len(path.read_text().splitlines()) < 400 for path in here.iterdir() if path.is_file())
    assert page.build() == page.build()
