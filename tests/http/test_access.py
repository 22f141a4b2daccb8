"""Who may use the server: keys in every spelling, and no web page that was not allowed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.http import checks
from tests.http.inprocess import Server, serving

EVIL = "https://evil.example"
FRIEND = "https://chat.example.com"
BODY = b'{"prompt": "The red fox", "max_tokens": 1}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("model")) as server:
        yield server


def ask(server: Server, method: str = "POST", path: str = "/v1/completions", **headers: str) -> checks.Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return checks.Client(server.url).send(method, path, BODY if method == "POST" else None, names)


def preflight(server: Server, origin: str, method: str = "POST", headers: str = "authorization,content-type") -> checks.Reply:
    asked = {"Access_Control_Request_Method": method, "Access_Control_Request_Headers": headers}
    return ask(server, "OPTIONS", Origin=origin, **asked)


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "http://localhost.evil.example", "http://127.0.0.1.evil.example", "http://[", "x"]
)
def test_no_foreign_page_uses_a_server_without_a_key(server: Server, origin: str) -> None:
    before = len(server.engine.requests)
    reply = ask(server, Origin=origin, Content_Type="text/plain")  # a "simple" request, which no browser asks for first
    checks.is_error(reply, 403, code="origin_not_allowed", says="--allowed-origins")
    assert "access-control-allow-origin" not in reply.headers
    checks.is_error(preflight(server, origin), 403, code="origin_not_allowed")
    assert len(server.engine.requests) == before


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1", "https://app.localhost", "http://[::1]:8080"])
def test_pages_of_this_machine_may(server: Server, origin: str) -> None:
    reply = ask(server, Origin=origin)
    assert reply.status == 200 and reply.headers["access-control-allow-origin"] == origin and "Origin" in reply.headers["vary"]
    asked = preflight(server, origin)
    assert asked.status == 204 and asked.headers["access-control-allow-origin"] == origin and asked.headers["x-request-id"]
    assert asked.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in asked.headers["access-control-allow-methods"]
    wrong = checks.Client(server.url).send("POST", "/v1/completions", b"{", {"Origin": origin})
    assert wrong.status == 400 and wrong.headers["access-control-allow-origin"] == origin, "a page can read its errors"


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1"]
)
def test_no_rebound_name_reaches_a_server_of_this_machine(server: Server, host: str) -> None:
    """The page is of the server's own origin then, and a GET carries no Origin."""
    for reply in (ask(server, Host=host), ask(server, "GET", "/v1/models", Host=host), ask(server, "GET", "/metrics", Host=host)):
        checks.is_error(reply, 403, code="host_not_allowed", says="--allowed-origins")
    assert ask(server, "GET", "/livez", Host=host).status == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "a.localhost."])
def test_names_of_this_machine(server: Server, host: str) -> None:
    assert ask(server, Host=host).status == 200


def test_origins_that_are_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, allowed_origins=(FRIEND,), allow_credentials=True) as server:
        reply = ask(server, Origin=FRIEND, Host="chat.example.com")
        assert reply.status == 200 and reply.headers["access-control-allow-origin"] == FRIEND
        assert reply.headers["access-control-allow-credentials"] == "true"
        for origin in (EVIL, "http://localhost", "http://chat.example.com"):
            checks.is_error(ask(server, Origin=origin), 403, code="origin_not_allowed")
        checks.is_error(ask(server, Host="evil.example"), 403, code="host_not_allowed")
    with serving(tmp_path, allowed_origins=("*",), allowed_methods=("POST",), allowed_headers=("Content-Type",)) as server:
        assert ask(server, Origin=EVIL, Host="evil.example").headers["access-control-allow-origin"] == EVIL
        assert preflight(server, EVIL, headers="content-type").headers["access-control-allow-methods"] == "POST"
        checks.is_error(preflight(server, EVIL, method="DELETE"), 403, says="--allowed-methods")
        checks.is_error(preflight(server, EVIL, headers="x-a"), 403, says="--allowed-headers")


def test_a_server_that_others_reach_has_names_of_its_own(tmp_path: Path) -> None:
    with serving(tmp_path, exposed=True) as server:
        assert ask(server, Host="gpu7.example:8000").status == 200
        assert ask(server, Host="gpu7.example:8000", Origin="http://gpu7.example:8000").status == 200
        checks.is_error(ask(server, Host="gpu7.example:8000", Origin=EVIL), 403, code="origin_not_allowed")


def test_a_key_is_enough(tmp_path: Path) -> None:
    """Browsers do not add it by themselves, so a page that has it was given it; reading answers is another matter."""
    with serving(tmp_path, api_key="s3cret") as server:
        reply = ask(server, Origin=EVIL, Host="evil.example", Authorization="Bearer s3cret")
        assert reply.status == 200 and "access-control-allow-origin" not in reply.headers
        checks.is_error(ask(server, Origin=EVIL), 401)
        assert preflight(server, "http://localhost").status == 204, "no key comes with the question"
        checks.is_error(preflight(server, EVIL), 403, code="origin_not_allowed")


def test_the_scheme_of_a_key_in_any_case(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="s3cret", metrics_key="m3trics") as server:
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):
            assert ask(server, Authorization=f"{scheme} s3cret").status == 200
        for wrong in ("Basic s3cret", "Bearer S3CRET", "Bearer", "s3cret", "bearer s3cretx"):
            checks.is_error(ask(server, Authorization=wrong), 401, code="invalid_api_key", says="API key")
        for wrong in ("", "Bearer s3cret"):
            checks.is_error(ask(server, "GET", "/metrics", Authorization=wrong), 401, says="metrics key")
        assert ask(server, "GET", "/metrics", Authorization="bearer m3trics").status == 200


def test_metrics_need_no_key_unless_they_have_one(tmp_path: Path) -> None:
    with serving(tmp_path, api_key="s3cret", exposed=True) as server:
        assert ask(server, "GET", "/metrics").status == 200
