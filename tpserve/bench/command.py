"""`tpserve bench ...`: the command lines of the benchmarks. Owns their flags; torch is loaded when something is measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tpserve.config import env
from tpserve.config.cli import HelpWanted, Parser
from tpserve.errors import UserError

MOST = 1 << 20
"""No count on these command lines is sensibly larger."""


def run(argv: Sequence[str]) -> int:
    """Run a benchmark; returns the exit code. Raises UserError, or HelpWanted."""
    if argv[:1] != ["step"]:
        said = f"tpserve bench {argv[0]}: there is no such benchmark" if argv else "tpserve bench: which one"
        raise UserError(f"{said}: see `tpserve bench step --help`")
    parser = _step()
    if {"--help", "-h"} & set(argv):
        raise HelpWanted(parser.format_help().rstrip())
    options = parser.parse_args(argv[1:])
    env.calm_threads()
    from tpserve.bench.step import run as run_step

    return run_step(**vars(options))


def _step() -> Parser:
    parser = Parser(
        prog="tpserve bench step",
        description="What a decode step costs rank 0 on the CPU beside the model: scheduling, encoding and broadcasting the "
        "plan, building its tensors, applying its result. The device is a fake; scheduler, sockets and tensors are real.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--batch", type=_counts, default=(1, 32, 256), metavar="N,N", help="decoding sequences (default 1,32,256)"
    )
    parser.add_argument("--context", type=_count, default=1024, metavar="N", help="prompt tokens of each (default 1024)")
    parser.add_argument(
        "--subscribers", type=_counts, default=(2, 8, 64), metavar="N,N", help="receivers of the plans (default 2,8,64)"
    )
    parser.add_argument("--steps", type=_count, default=500, metavar="N", help="steps to measure in each case (default 500)")
    parser.add_argument(
        "--transport", choices=("ipc", "tcp"), default="ipc", help="UNIX sockets, or TCP on loopback (default ipc)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there as JSON")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MOST:,}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.split(","))
