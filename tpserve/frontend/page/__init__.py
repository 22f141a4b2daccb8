"""The page at /: chat and status in a browser. One document without external files, put together at the start of the server.

    page.html    the document, with {{style}} and {{script}}
    style.css    light and dark, desktop and phone
    *.js         `SCRIPTS` in their order, as one module: no global names, nothing to build

The page is served without a key, since it holds nothing secret; its calls carry the keys that the user types. Its policy
(CSP level 3) names style and script by their hashes, allows calls to its own origin alone, and lets no text become markup
(trusted types): what a model writes is untrusted.
"""

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

from aiohttp import web

HERE = Path(__file__).parent
SCRIPTS = ("dom", "client", "markdown", "tokens", "request", "chat", "charts", "status", "main")
PATH = "/"


class PageDocument(NamedTuple):
    """The document in UTF-8, and the headers that it is served with."""

    document: bytes
    headers: dict[str, str]


def build() -> PageDocument:
    """Put the page together from the files of this package."""
    style = (HERE / "style.css").read_text()
    script = "\n".join((HERE / f"{name}.js").read_text() for name in SCRIPTS)
    document = (HERE / "page.html").read_text().replace("{{style}}", style).replace("{{script}}", script)
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return PageDocument(document.encode(), headers)


def _digest(text: str) -> str:
    """The hash of an inline element as CSP names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def add_routes(app: web.Application) -> None:
    """GET /: the page."""
    page = build()

    async def serve_page(_request: web.Request) -> web.Response:
        """GET /: a page for people, to chat and to watch the server."""
        return web.Response(body=page.document, content_type="text/html", charset="utf-8", headers=page.headers)

    app.router.add_get(PATH, serve_page)
