"""The list of commands: what each is for, and the names that other servers have for it."""

import difflib
from collections.abc import Collection

ABOUT = {
    "serve": "serve a model over HTTP with the OpenAI API, on one node or several",
    "plan": "which layouts hold a model on which GPUs, without having them",
    "doctor": "check whether these machines can serve a model together, and how well",
    "bench": "measure: serve (a running server), latency, throughput, frontend, step",
    "chat": "talk to a running server in the terminal, or through a pipe",
    "status": "a running server's nodes, ranks, memory and queue",
    "report": "write one file about a server and this host, for a ticket",
    "pause": "let a running server begin no request; streams stay open, and nothing is lost",
    "resume": "end a pause",
    "abort": "end open requests of a running server, by their ids or all",
    "reset-prefix-cache": "let a running server forget what later requests would find computed",
    "template": "how a model's reasoning and tool calls are read, and whether that holds",
    "completion": "the script with which bash, zsh or fish completes tpserve's commands and flags",
    "secret": "make a secret that the nodes of a server share",
    "version": "the version of tpserve; --version is the same",
    "help": "this page, or `tpserve help COMMAND`",
}

COMMAND_ALIASES = {
    **dict.fromkeys(("run", "start", "launch", "launch-server", "launch_server", "server", "up", "api-server", "api_server",
                     "load"), "serve"),
    **dict.fromkeys(("complete", "generate", "ask", "prompt", "repl"), "chat"),
    **dict.fromkeys(("ps", "ls", "list", "info", "show", "health"), "status"),
    **dict.fromkeys(("collect-env", "collect_env", "env"), "report"),
    **dict.fromkeys(("benchmark", "perf"), "bench"),
    **dict.fromkeys(("check", "check-env", "check_env", "test", "diagnose"), "doctor"),
    **dict.fromkeys(("estimate", "size", "memory"), "plan"),
}  # fmt: skip
"""Commands of vLLM, SGLang, Ollama and others, and likely guesses -> tpserve's command."""

_OVERVIEW = """Serves large language models over tensor and pipeline parallel ranks.

usage: tpserve COMMAND ...
       torchrun --nproc-per-node N -m tpserve [MODEL] [flags of serve]

commands:
{}

To try it: `tpserve serve` serves a small built-in model at http://127.0.0.1:8000; `tpserve serve MODEL` a directory or a
repository ORG/NAME of Hugging Face. Flags: `tpserve serve --help`."""


def overview() -> str:
    """The text of `tpserve --help`: a line for each command."""
    return _OVERVIEW.format("\n".join(f"  {name:<20}{about}" for name, about in ABOUT.items()))


def suggest_command(name: str, commands: Collection[str]) -> str:
    """The command that `name` stands for in other servers, or the one with the closest spelling; empty without one."""
    name = name.lower()
    return COMMAND_ALIASES.get(name) or next(iter(difflib.get_close_matches(name, commands, n=1)), "")
