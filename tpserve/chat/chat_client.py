"""The chat API of a server, over the standard library: an answer is an iterator of pieces, and closing it ends the request.

Any server with the OpenAI API will do; only tpserve's tells how far a start is. Every failure is a UserError of one sentence.
"""

import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal, NamedTuple

from tpserve.errors import UserError
from tpserve.host.network import unreachable_text

CONNECT_S = 10.0
SILENCE_S = 300.0
"""How long a server may say nothing. tpserve sends a comment every 10 s."""
POLL_S = 0.5
ERROR_CHARS = 500


class AnswerPiece(NamedTuple):
    """A part of an answer. `end`: the text is the finish reason."""

    kind: Literal["content", "reasoning", "call", "end"]
    text: str


class ChatClient:
    """A server by its URL. Each call has a connection of its own. `key`: sent as the Bearer token, unless it is None."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def models(self) -> list[str]:
        """The names of the models that are served."""
        with self._send("GET", "/v1/models") as response:
            return [str(model["id"]) for model in self._json(response)["data"]]

    def wait_ready(self, progress: Callable[[str], None]) -> None:
        """Wait while the server starts; `progress` gets every new phase. A server of another kind counts as ready."""
        last = ""
        while True:
            with self._send("GET", "/readyz", any_status=True) as response:
                state = self._state(response)
            if state.get("state") not in ("starting", "stopped"):
                return
            if state["state"] == "stopped":
                raise UserError(f"the server at {self.url} has stopped: {state.get('reason')}")
            if (text := f"the server is starting, {state.get('percent')}%: {state.get('phase')}") != last:
                progress(text)
                last = text
            time.sleep(POLL_S)

    def answer(self, body: dict[str, Any]) -> Generator[AnswerPiece, None, None]:
        """The pieces of an answer as they come. Closing the iterator ends the request."""
        with self._send("POST", "/v1/chat/completions", body | {"stream": True}) as response:
            for event in self._events(response):
                yield from pieces(event)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """The events of a stream up to [DONE]. UserError for an error in it, and when it is cut."""
        try:
            for line in response:
                data = line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise UserError(error_text(data))
                yield event
        except ValueError:
            raise UserError(f"{self.url} sends what is no answer of the OpenAI API") from None
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error
        raise UserError("the connection was cut before the answer was complete")

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None, *, any_status: bool = False) -> "OpenResponse":
        parts = urllib.parse.urlsplit(self.url)
        connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = connect(parts.hostname or "", parts.port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE_S)
            connection.request(method, parts.path + path, None if body is None else json.dumps(body).encode(), self._headers)
            response = connection.getresponse()
            if response.status != 200 and not any_status:
                raise self._refused(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._lost(error) from error
        except BaseException:
            connection.close()
            raise
        return OpenResponse(connection, response)

    def _lost(self, error: Exception) -> UserError:
        return UserError(unreachable_text(self.url, error), param="url")

    def _refused(self, status: int, body: bytes) -> UserError:
        way_out = "; give the key with --api-key or TPSERVE_API_KEY" if status == 401 else ""
        return UserError(f"{error_text(body) or f'HTTP {status}'}{way_out}")

    def _json(self, response: http.client.HTTPResponse) -> Any:
        try:
            return json.loads(response.read())
        except ValueError:
            raise UserError(f"{self.url} is no server with the OpenAI API: give the address of one with --url") from None

    def _state(self, response: http.client.HTTPResponse) -> dict[str, Any]:
        """The body of /readyz; empty for a server that has none."""
        try:
            body = json.loads(response.read())
        except ValueError:
            return {}
        return body if isinstance(body, dict) else {}


class OpenResponse:
    """A response for the length of a `with` block, which closes its connection."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response

    def __enter__(self) -> http.client.HTTPResponse:
        return self._response

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()


def pieces(event: dict[str, Any]) -> Iterator[AnswerPiece]:
    """What one event of a stream adds to the answer."""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            yield AnswerPiece("reasoning", reasoning)
        if content := delta.get("content"):
            yield AnswerPiece("content", content)
        for call in delta.get("tool_calls") or ():
            function = call.get("function") or {}
            yield AnswerPiece("call", f"\n{name} " if (name := function.get("name")) else function.get("arguments") or "")
            if name and (arguments := function.get("arguments")):
                yield AnswerPiece("call", arguments)
        if finish := choice.get("finish_reason"):
            yield AnswerPiece("end", finish)


def error_text(body: bytes) -> str:
    """The message of an error body, in the forms of OpenAI's and other servers; else the body itself."""
    try:
        message: Any = json.loads(body)
        while isinstance(message, dict):
            message = next(message[name] for name in ("error", "message", "detail") if name in message)
    except (ValueError, StopIteration):
        message = body.decode(errors="replace")
    return " ".join(str(message).split())[:ERROR_CHARS]
