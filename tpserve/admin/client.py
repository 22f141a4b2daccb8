"""HTTP client for the operators' routes of a running server. Every failure is a UserError of one sentence. Never retries.

Its keys come from TPSERVE_API_KEY, TPSERVE_ADMIN_API_KEY and TPSERVE_METRICS_KEY.
"""

import http.client
import json
import urllib.parse
from typing import Any, NamedTuple

from tpserve.config import env
from tpserve.errors import UserError
from tpserve.host.network import unreachable_text
from tpserve.version import __version__

TIMEOUT_S = 10.0
INFO = "/server_info"


class Unreachable(UserError):
    """No server answers at the URL."""


class ServerFacts(NamedTuple):
    """The bodies of /readyz, /server_info and /metrics. `metrics` is empty when the key for it is missing or wrong."""

    url: str
    ready: dict[str, Any]
    info: dict[str, Any]
    metrics: str


def fetch_facts(url: str) -> ServerFacts:
    """Fetch all pages. Raises UserError when the server does not answer, is not tpserve, or needs another key."""
    ready = _json(url, "/readyz", *_send(url, "GET", "/readyz", None))
    code, body = _send(url, "GET", INFO, _operators_key())
    if code in (401, 403):
        state = f"{url} is {ready.get('state')} ({ready.get('phase')})"
        if code == 403:
            raise UserError(f"{state}, and {INFO} is closed: start the server with --admin-api-key or TPSERVE_ADMIN_API_KEY")
        raise UserError(f"{state}, and {INFO} needs the admin key: set TPSERVE_ADMIN_API_KEY")
    info = _json(url, INFO, code, body)
    if info.get("version") != __version__:
        raise UserError(f"{url} is tpserve {info.get('version')} and this is {__version__}: use the server's version")
    code, metrics = _send(url, "GET", "/metrics", env.overrides().get("metrics_key"))
    return ServerFacts(url, ready, info, metrics.decode() if code == 200 else "")


def post_as_operator(
    url: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = TIMEOUT_S
) -> dict[str, Any]:
    """POST to a route of operators; its answer. UserError with the server's words when it refuses."""
    data = None if body is None else json.dumps(body).encode()
    code, answer = _send(url, "POST", path, _operators_key(), data, timeout_s)
    if code in (401, 403):
        raise UserError(f"{url} needs the admin key: start it with TPSERVE_ADMIN_API_KEY, and set the same here")
    try:
        content = json.loads(answer)
        if code == 200:
            return dict(content)
        raise UserError(f"{url}: {content['error']['message']}")
    except (ValueError, KeyError, TypeError):
        raise _unreadable(url, path, code) from None


def gauge(metrics: str, name: str) -> float | None:
    """The value of the first series called `name`, whatever its labels; None if there is none."""
    for line in metrics.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            return float(line.rpartition(" ")[2])
    return None


def _operators_key() -> str | None:
    keys = env.overrides()
    return keys.get("admin_api_key") or keys.get("api_key")


def _send(
    url: str, method: str, path: str, key: str | None, body: bytes | None = None, timeout_s: float | None = TIMEOUT_S
) -> tuple[int, bytes]:
    parts = urllib.parse.urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request(method, parts.path + path, body, {"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        body = response.read()
    except OSError as error:
        raise Unreachable(unreachable_text(url, error), param="url") from error
    except http.client.HTTPException as error:
        raise _not_tpserve(url) from error
    finally:
        connection.close()
    if not response.headers.get("Server", "").startswith("tpserve/"):
        raise _not_tpserve(url)
    return response.status, body


def _json(url: str, path: str, code: int, body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    if not isinstance(content, dict) or code not in (200, 503):
        raise _unreadable(url, path, code)
    return content


def _unreadable(url: str, path: str, code: int) -> UserError:
    return UserError(f"{url}{path} answers {code}, which tpserve {__version__} cannot read: use the server's version")


def _not_tpserve(url: str) -> UserError:
    return UserError(f"{url} is not a tpserve server: give the address of one with --url", param="url")
