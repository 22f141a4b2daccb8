"""A stand-in for the hub: what huggingface_hub asks of it, on loopback, from directories; counts every request for a file.

    with FakeHub(tmp_path) as hub:
        hub.add("org/tiny", {"config.json": b"..."})        a new commit, which main is from now on
        environment = hub.environ(cache)

Its faults are switches: `gated` repositories, `cut` (how many GETs of a file end in the middle), `dead` (files whose GETs all end
at once), `slow_s` (a pause every 16 KiB), `sizes` (claimed for files instead of their true ones).
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/models/([^/]+/[^/]+)/revision/(.+)")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHUNK = 1 << 14


class FakeHub:
    """Serves until the block ends. `gets`: (repository, file) to how many GETs it had."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.cut: Counter[str] = Counter()
        self.dead: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.slow_s = 0.0
        self.gets: Counter[tuple[str, str]] = Counter()
        self.lookups: Counter[str] = Counter()
        self.ranges: list[str] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, repository: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Push files as a new commit; returns the commit."""
        commit = hashlib.sha1(
            json.dumps([repository, sorted((n, hashlib.sha1(b).hexdigest()) for n, b in files.items())]).encode()
        )
        self.commits[repository, commit.hexdigest()] = files
        self.refs[repository, revision] = commit.hexdigest()
        return commit.hexdigest()

    def environ(self, home: Path, **more: str) -> dict[str, str]:
        """What a process must have in its environment to know no other hub."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **more}

    def note(self, counter: "Counter[Any]", key: object) -> int:
        with self._lock:
            counter[key] += 1
            return int(counter[key])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


def directory(path: Path) -> dict[str, bytes]:
    """The files of a directory, to push."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := API.fullmatch(path):
            self._info(*found.groups())
        elif found := RESOLVE.fullmatch(path):
            self._file(*found.groups(), body=body)
        else:
            self._refuse(404, "EntryNotFound")

    def _files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None after an answer that says why not."""
        if not any(name == repository for name, _ in self.hub.commits):
            self._refuse(401, "RepoNotFound")
            return None
        commit = self.hub.refs.get((repository, revision), revision)
        if (repository, commit) not in self.hub.commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit, self.hub.commits[repository, commit]

    def _info(self, repository: str, revision: str) -> None:
        self.hub.note(self.hub.lookups, repository)
        if (found := self._files(repository, revision)) is None:  # of a gated repository, too, everybody sees the list
            return
        commit, files = found
        siblings = [{"rfilename": name, "size": self.hub.sizes.get(name, len(content))} for name, content in files.items()]
        answer = json.dumps({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "tags": []}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
        if (found := self._files(repository, revision)) is None:
            return
        commit, files = found
        if repository in self.hub.gated and self.headers.get("Authorization") != "Bearer good":
            self._refuse(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return
        if name not in files:
            self._refuse(404, "EntryNotFound")
            return
        content, begin = files[name], 0
        if body:
            self.hub.note(self.hub.gets, (repository, name))
            if asked := self.headers.get("Range"):
                self.hub.ranges.append(asked)
                begin = int(asked.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):  # whoever asked has been ended
                self._send(name, content[begin:])

    def _send(self, name: str, content: bytes) -> None:
        end = 0 if name in self.hub.dead else len(content)
        if self.hub.cut[name] > 0:
            self.hub.cut[name] -= 1
            end //= 2
        for at in range(0, end, CHUNK):
            time.sleep(self.hub.slow_s)
            self.wfile.write(content[at : min(at + CHUNK, end)])
        self.close_connection = end < len(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
