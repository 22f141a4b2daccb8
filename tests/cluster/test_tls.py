"""HTTPS: a real server with a certificate of its own."""

import json
import shutil
import ssl
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.server import Server, free_port, running, serve
from tpserve.errors import UserError
from tpserve.frontend.tls import server_context

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, which makes a certificate")


def make_certificate(place: Path, *key: str) -> tuple[Path, Path]:
    """A certificate for localhost, and its key. `key`: how the key is written."""
    certificate, key_file = place / "cert.pem", place / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", str(key_file), "-out", str(certificate), "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", *(key or ("-nodes",))],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key_file


def test_https_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.create_default_context(cafile=str(certificate))

    def get(server: Server, path: str, timeout_s: float = 10.0) -> tuple[int, Any]:
        with urllib.request.urlopen(f"https://localhost:{server.port}{path}", timeout=timeout_s, context=context) as response:
            return response.status, json.loads(response.read())

    monkeypatch.setattr(Server, "get", get)
    monkeypatch.setattr(Server, "pids", lambda server: [])
    port = free_port()
    flags = ["--nproc-per-node", "1", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    with running([serve(*flags, port=port)], port, tmp_path / "log") as server:
        body = json.dumps({"prompt": "Once", "max_tokens": 5}).encode()
        request = urllib.request.Request(f"https://localhost:{port}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60, context=context) as response:
            assert json.loads(response.read())["usage"]["completion_tokens"] == 5
        with pytest.raises(OSError, match="."):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=10)
        assert f" on https://127.0.0.1:{port}, " in server.log
        assert server.stop() == [0]


def test_files_that_do_not_serve(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    assert server_context(None, None) is None and server_context(str(certificate), str(key)) is not None
    (other := tmp_path / "other").mkdir()
    _, wrong = make_certificate(other)
    (locked := tmp_path / "locked").mkdir()
    encrypted = make_certificate(locked, "-passout", "pass:secret")
    for files, says in (
        ((None, str(key)), "--ssl-keyfile needs --ssl-certfile"),
        ((str(tmp_path / "none"), None), "--ssl-certfile .*none cannot be read: No such file"),
        ((str(certificate), str(tmp_path / "none")), "--ssl-keyfile .*none cannot be read"),
        ((str(certificate), str(wrong)), "are not a certificate and its key"),
        ((str(certificate), None), "are not a certificate and its key"),
        ((str(encrypted[0]), str(encrypted[1])), "the key is encrypted"),
    ):
        with pytest.raises(UserError, match=says):
            server_context(*files)
