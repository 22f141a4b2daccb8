"""`tpserve pause`, `resume`, `abort` and `reset-prefix-cache`: what an operator asks of a running server."""

import sys
import urllib.parse
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from msgspec import Struct

from tpserve.admin.client import post_as_operator
from tpserve.cli.command import Command
from tpserve.cli.server_url import URL, server_url
from tpserve.config.flags import Flag
from tpserve.errors import UserError

KEY_HINT = "If the server has an admin key, set\nTPSERVE_ADMIN_API_KEY."
Url = Annotated[str, Flag("Server", "Where the server answers HTTP.", parse=server_url, metavar="URL")]


class PauseFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve pause`."""

    url: Url = URL
    mode: Annotated[
        Literal["keep", "wait", "abort"],
        Flag(
            "Pause", "What becomes of requests that have begun. keep: they wait; wait: they finish first; abort: they are ended."
        ),
    ] = "keep"


class ResumeFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve resume`."""

    url: Url = URL


class AbortFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve abort`."""

    url: Url = URL
    request_id: Annotated[tuple[str, ...], Flag("Requests", "Ids of requests or answers, as the server's log has them.")] = ()
    all: Annotated[bool, Flag("Requests", "All open requests.")] = False


class ResetPrefixCacheFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve reset-prefix-cache`."""

    url: Url = URL


PAUSE = Command(
    "pause",
    "Begin no request any more; streams stay open, and what comes meanwhile waits. Returns when no step runs, with --mode wait\n"
    f"when all that had begun has ended. A pause outlives a recovery. {KEY_HINT}",
    PauseFlags,
)
RESUME = Command("resume", f"End a pause: every request goes on where it was. {KEY_HINT}", ResumeFlags)
ABORT = Command("abort", f"End open requests with an error, by their ids or all. {KEY_HINT}", AbortFlags)
RESET = Command(
    "reset-prefix-cache",
    f"Forget the prompts and outputs that later requests would find computed. Requests that run go on. {KEY_HINT}",
    ResetPrefixCacheFlags,
)
COMMANDS: tuple[Command[Any], ...] = (PAUSE, RESUME, ABORT, RESET)


def pause(argv: Sequence[str]) -> int:
    """Run `tpserve pause`; returns the exit code. Raises UserError, or HelpWanted."""
    flags = PAUSE.parse(argv).flags
    answer = post_as_operator(flags.url, "/pause?" + urllib.parse.urlencode({"mode": flags.mode}), timeout_s=None)
    if answer["mode"] is None:
        return _say(f"{flags.url}: somebody has ended the pause meanwhile")
    ended = f", {answer['num_aborted']} requests are ended" if flags.mode == "abort" else ""
    return _say(f"{flags.url}: paused{ended}; `tpserve resume` goes on")


def resume(argv: Sequence[str]) -> int:
    """Run `tpserve resume`; returns the exit code. Raises UserError, or HelpWanted."""
    flags = RESUME.parse(argv).flags
    post_as_operator(flags.url, "/resume")
    return _say(f"{flags.url}: resumed")


def abort(argv: Sequence[str]) -> int:
    """Run `tpserve abort`; returns the exit code. Raises UserError, or HelpWanted."""
    flags = ABORT.parse(argv).flags
    if bool(flags.request_id) == flags.all:
        raise UserError("give either --request-id ID ... or --all")
    body = {"abort_all": True} if flags.all else {"request_id": list(flags.request_id)}
    answer = post_as_operator(flags.url, "/abort_request", body)
    return _say(f"{flags.url}: ended {answer['num_aborted']} requests")


def reset_prefix_cache(argv: Sequence[str]) -> int:
    """Run `tpserve reset-prefix-cache`; returns the exit code. Raises UserError, or HelpWanted."""
    flags = RESET.parse(argv).flags
    post_as_operator(flags.url, "/reset_prefix_cache")
    return _say(f"{flags.url}: the prefix cache is empty")


def _say(text: str) -> int:
    sys.stdout.write(text + "\n")
    return 0
