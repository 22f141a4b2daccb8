"""Access rules: the keys of clients and operators, and which web pages may send requests. Owns no state.

A web page is untrusted code that runs in the browser of a user who can reach the server. Two checks protect a server without a
key from pages of other origins:

    Origin    a browser sends the page's origin with every cross-origin request and every POST. An origin that is not allowed is
              refused before the handler runs, since a page can do harm without reading the answer
    Host      a server on loopback serves only requests to a name of this machine. Any other name belongs to a page whose DNS
              entry has changed to 127.0.0.1 after it was loaded (DNS rebinding), which makes it same-origin

With a key neither check is needed: no page knows the key, and browsers do not add it by themselves. Pages of an allowed origin
may also read answers (CORS).
"""

import ipaddress
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from tpserve.errors import UserError
from tpserve.frontend.api_keys import NOBODY, ApiKeys, KeyOwner, same_key
from tpserve.frontend.openai.errors import shown

OPEN_PATHS = frozenset({"/", "/health", "/readyz", "/livez", "/ping"})
"""Served without a key and under any host name: probes have neither, and the page is where a key is typed."""
ADMIN_PATHS = frozenset({"/server_info", "/pause", "/resume", "/is_paused", "/abort_request", "/reset_prefix_cache"})
"""For operators only: they show the configuration of the server, or hold up what clients have asked for."""
KEY_OWNER = web.RequestKey("key_owner", KeyOwner)
"""Whose key a request has brought."""
METRICS_PATH = "/metrics"
KEY_HEADER = "x-api-key"
METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "POST")
MAX_PREFLIGHT_AGE_S = 600


class AccessSettings(Protocol):
    """The fields of the resolved configuration that decide access."""

    @property
    def host(self) -> str: ...
    @property
    def admin_api_key(self) -> str | None: ...
    @property
    def metrics_key(self) -> str | None: ...
    @property
    def allowed_origins(self) -> tuple[str, ...]: ...
    @property
    def allowed_methods(self) -> tuple[str, ...]: ...
    @property
    def allowed_headers(self) -> tuple[str, ...]: ...
    @property
    def allow_credentials(self) -> bool: ...


def require_key(settings: AccessSettings, api_keys: ApiKeys, exposed: bool) -> Middleware:
    """A middleware: 401 for a request without a key, where one is needed.

    Paths for operators have a key of their own; a server that is `exposed` beyond loopback closes them (403) without one.
    """

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in OPEN_PATHS:
            return await handler(request)
        sent = client_key(request)
        if request.path in ADMIN_PATHS and (exposed or settings.admin_api_key is not None):
            if settings.admin_api_key is None:
                raise UserError(
                    f"{request.path} is closed: this server does not listen on loopback alone and has no admin key; start it "
                    "with --admin-api-key or TPSERVE_ADMIN_API_KEY",
                    code="admin_key_not_set",
                    status=403,
                )
            name, opened = "admin key", same_key(sent, settings.admin_api_key)
        elif request.path == METRICS_PATH:
            name, opened = "metrics key", settings.metrics_key is None or same_key(sent, settings.metrics_key)
        else:
            owner = api_keys.find(sent) if api_keys.required else NOBODY
            name, opened = "API key", owner is not None
            request[KEY_OWNER] = owner or NOBODY
        if not opened:
            how = f"'Authorization: Bearer KEY' or '{KEY_HEADER}: KEY'"
            raise UserError(f"the {name} is missing or wrong; send it as {how}", status=401)
        return await handler(request)

    return check


def client_key(request: web.Request) -> str:
    """The key that a client sent: a Bearer token (the scheme in any case, RFC 9110), or Anthropic's header; else empty."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip(" ") if scheme.lower() == "bearer" else request.headers.get(KEY_HEADER, "").strip(" ")


@dataclass(frozen=True)
class Origins:
    """Which web pages may use the server. `keyed`: it needs a key; `exposed`: it listens beyond loopback."""

    settings: AccessSettings
    keyed: bool
    exposed: bool

    def middleware(self) -> Middleware:
        """A middleware: 403 for pages that may not use the server, and the answers to preflight requests."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            origin = request.headers.get("Origin")
            if not self.keyed and request.path not in OPEN_PATHS:
                self.check_host(request)
                if origin is not None and not self.allows(origin) and not self.is_same_origin(origin, request):
                    raise UserError(
                        f"pages of {shown(origin)} may not use this server; allow them with --allowed-origins, or set a key with "
                        "--api-key",
                        code="origin_not_allowed",
                        status=403,
                    )
            if request.method == "OPTIONS" and origin is not None and "Access-Control-Request-Method" in request.headers:
                return self.preflight(request, origin)
            return await handler(request)

        return check

    def allows(self, origin: str) -> bool:
        """Whether pages of `origin` may use the server and read its answers."""
        allowed = self.settings.allowed_origins
        if allowed:
            return "*" in allowed or origin.lower() in allowed
        parts = split_origin(origin)
        return parts is not None and is_loopback(parts)

    def is_same_origin(self, origin: str, request: web.Request) -> bool:
        """Whether a page is same-origin, as behind a proxy that serves both. On loopback the Host header proves nothing."""
        return self.exposed and origin.partition("://")[2].lower() == request.headers.get("Host", "").lower()

    def check_host(self, request: web.Request) -> None:
        """UserError 403 unless a request to a server on loopback names this machine or the host of an allowed origin."""
        header, allowed = request.headers.get("Host"), self.settings.allowed_origins
        if self.exposed or header is None or "*" in allowed:
            return
        host = split_origin(f"http://{header}")
        if host is not None and (is_loopback(host) or host == self.settings.host.lower().strip("[]")):
            return
        if host is not None and host in {split_origin(origin) for origin in allowed}:
            return
        raise UserError(
            f"this server answers to names of its own machine only, not to {shown(header)}; behind a proxy name the proxy's "
            "address with --allowed-origins, or set a key with --api-key",
            code="host_not_allowed",
            status=403,
        )

    def preflight(self, request: web.Request, origin: str) -> web.Response:
        """The answer to a preflight request: the methods and headers that pages may send. UserError 403 for others."""
        method = request.headers["Access-Control-Request-Method"]
        requested = request.headers.get("Access-Control-Request-Headers", "")
        methods, headers = self.settings.allowed_methods, self.settings.allowed_headers
        names = [name.strip().lower() for name in requested.split(",") if name.strip()]
        wrong = next((name for name in names if "*" not in headers and name not in map(str.lower, headers)), None)
        if not self.allows(origin):
            raise origin_error(f"pages of {shown(origin)} may not use this server; allow them with --allowed-origins")
        if "*" not in methods and method not in methods:
            raise origin_error(f"pages may not use the method {shown(method)}; allow it with --allowed-methods")
        if wrong is not None:
            raise origin_error(f"pages may not send the header {shown(wrong)}; allow it with --allowed-headers")
        return web.Response(
            status=204,
            headers={
                "Access-Control-Allow-Methods": ", ".join(METHODS if "*" in methods else methods),
                "Access-Control-Allow-Headers": requested if "*" in headers else ", ".join(headers),
                "Access-Control-Max-Age": str(MAX_PREFLIGHT_AGE_S),
            },
        )

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let the page of an allowed origin read the response."""
        response.headers.add("Vary", "Origin")
        origin = request.headers.get("Origin")
        if origin is None or not self.allows(origin):
            return
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = "x-request-id, X-Stream-Id, Location, Retry-After"
        if self.settings.allow_credentials:
            response.headers["Access-Control-Allow-Credentials"] = "true"


def origin_error(text: str) -> UserError:
    """A UserError 403 about a web page."""
    return UserError(text, code="origin_not_allowed", status=403)


def split_origin(origin: str) -> str | None:
    """The host of an origin, without brackets and port; None for a text without a host, such as "null"."""
    try:
        parts = urlsplit(origin)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return None
    plain = not (parts.path or parts.query or parts.fragment or parts.username or parts.password)
    return host.lower().rstrip(".") if host and plain else None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine without asking DNS: browsers and resolvers know "localhost" themselves (RFC 6761)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
