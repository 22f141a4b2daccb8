"""`tpserve reload`: a running server takes over other flags, or other weights of the same shape."""

import sys
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct, to_builtins

from tpserve.admin.client import post_as_operator
from tpserve.admin.control import KEY_HINT, Url
from tpserve.cli.command import Command
from tpserve.cli.server_flags import given_flags
from tpserve.cli.server_url import URL


class ReloadFlags(Struct, frozen=True, kw_only=True):
    """The flags of `tpserve reload`, besides those of the server."""

    url: Url = URL


COMMAND = Command(
    "reload",
    "Let a running server take over other flags, or another MODEL of the same shape; the flags that are not named stay. All is\n"
    "checked before anything stops; then the ranks start again, while streams stay open and what comes meanwhile waits. If the\n"
    "ranks cannot start with them, the flags of before come back. Without flags the weights are read again from their files.\n"
    f"Not for bare torchrun. {KEY_HINT}",
    ReloadFlags,
    takes_server_flags=True,
)


def run(argv: Sequence[str]) -> int:
    """Run `tpserve reload`; returns the exit code. Raises UserError, or HelpWanted."""
    parsed = COMMAND.parse(argv)
    values = given_flags(parsed.rest)
    for name in ("model", "tokenizer"):
        if name in values and Path(values[name]).is_dir():  # the server has another working directory
            values[name] = str(Path(values[name]).absolute())
    answer = post_as_operator(parsed.flags.url, "/reload", to_builtins(values), timeout_s=None)
    changed = ", ".join(f"{name}={value}" for name, value in answer["changes"].items()) or "the flags of the start"
    sys.stdout.write(
        f"{parsed.flags.url}: reloaded in {answer['took_s']:g} s with {changed}; requests that were open go on, "
        f"{answer['resumption']}\n"
    )
    return 0
