"""A running server as operators see it, over HTTP. Every way in which there is no such server is a UserError of one sentence.

Owns the keys it sends; they come from TPSERVE_API_KEY, TPSERVE_ADMIN_API_KEY and TPSERVE_METRICS_KEY. Never retries.
"""

import http.client
import json
import urllib.parse
from typing import Any, NamedTuple

from tpserve.config import env
from tpserve.errors import UserError
from tpserve.host.network import os_error_text
from tpserve.version import __version__

TIMEOUT_S = 10.0
INFO = "/server_info"


class Unreachable(UserError):
    """Nobody answers there."""


class ServerFacts(NamedTuple):
    """What a server says of itself. `ready`: the body of /readyz; `metrics`: empty where the key for them is missing."""

    url: str
    ready: dict[str, Any]
    info: dict[str, Any]
    metrics: str


def ask(url: str) -> ServerFacts:
    """All of it. UserError when nobody answers, when it is no tpserve, and when a key is missing."""
    keys = env.overrides()
    ready = _json(url, "/readyz", *_get(url, "/readyz", None))
    code, body = _get(url, INFO, keys.get("admin_api_key") or keys.get("api_key"))
    if code in (401, 403):
        state = f"{url} is {ready.get('state')} ({ready.get('phase')})"
        if code == 403:
            raise UserError(f"{state}, and {INFO} is closed there: start it with --admin-api-key or TPSERVE_ADMIN_API_KEY")
        raise UserError(f"{state}, and {INFO} needs the admin key: set TPSERVE_ADMIN_API_KEY to that of the server")
    info = _json(url, INFO, code, body)
    if info.get("version") != __version__:
        raise UserError(f"{url} is tpserve {info.get('version')} and this is {__version__}: ask with the server's own version")
    code, metrics = _get(url, "/metrics", keys.get("metrics_key"))
    return ServerFacts(url, ready, info, metrics.decode() if code == 200 else "")


def gauge(metrics: str, name: str) -> float | None:
    """The value of the series called `name`, whatever its labels; None where there is none."""
    for line in metrics.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            return float(line.rpartition(" ")[2])
    return None


def _get(url: str, path: str, key: str | None) -> tuple[int, bytes]:
    parts = urllib.parse.urlsplit(url)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connect(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        body = answer.read()
    except OSError as error:
        raise Unreachable(
            f"no server answers at {url}: {os_error_text(error)}; give its address with --url (this one asks from this host)",
            param="url",
        ) from error
    except http.client.HTTPException as error:
        raise _foreign(url) from error
    finally:
        connection.close()
    if not answer.headers.get("Server", "").startswith("tpserve/"):
        raise _foreign(url)
    return answer.status, body


def _json(url: str, path: str, code: int, body: bytes) -> dict[str, Any]:
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict) or code not in (200, 503):
        raise UserError(f"{url}{path} answers {code} and not what tpserve {__version__} reads: ask with the server's own version")
    return said


def _foreign(url: str) -> UserError:
    return UserError(f"{url} is no tpserve server: give the address of one with --url", param="url")
