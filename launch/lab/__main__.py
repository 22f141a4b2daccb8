"""A lab of virtual hosts on one machine, to try a cluster without several machines (docs/clusters.md). Needs root.

python launch/lab up --hosts 2                create the hosts node0 and node1
python launch/lab run -- MODEL -tp 2          run one `tpserve serve` a host; Ctrl-C drains them
python launch/lab watch                       show a live table of the lab, in another terminal
python launch/lab cut 1                       pull node1's cable (--silent: its packets vanish); cut 0 1: only between these two
python launch/lab slow 1 --rate 10mbit        limit node1's link
python launch/lab heal 1                      undo cuts and limits of node1
python launch/lab kill 1 --rank 1             kill -9 (--signal STOP: stop it); without --rank or --part all processes of node1
python launch/lab exec 1 -- ip addr           run a command in a host
python launch/lab down                        remove the lab
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # `python launch/lab` looks for modules beside this file

from launch.lab import hosts as lab_hosts  # noqa: E402
from launch.lab import links  # noqa: E402
from launch.lab.hosts import Host, LabError  # noqa: E402
from launch.lab.jobs import Jobs, commands, kill  # noqa: E402
from launch.lab.table import Table  # noqa: E402


def main() -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args()
    try:
        lab_hosts.check_root()
        return int(options.do(options) or 0)
    except LabError as error:
        sys.stderr.write(f"lab: error: {error}\n")
        return 2


def _up(options: argparse.Namespace) -> None:
    lab_hosts.up(options.name, options.hosts)
    _status(options)


def _down(options: argparse.Namespace) -> None:
    lab_hosts.down(options.name)


def _status(options: argparse.Namespace) -> None:
    _print(Table(_all(options), options.port).lines())


def _watch(options: argparse.Namespace) -> None:
    table = Table(_all(options), options.port)
    try:
        while True:
            _print(["\x1b[H\x1b[2J" + time.strftime("%X"), *table.lines()])
            time.sleep(options.every)
    except KeyboardInterrupt:
        return


def _cut(options: argparse.Namespace) -> None:
    chosen = _chosen(options, options.host)
    if len(set(options.host)) != len(options.host) or len(chosen) > 2:
        raise LabError("cut takes one host, or two different ones")
    links.cut(*chosen, silent=options.silent)


def _heal(options: argparse.Namespace) -> None:
    all_hosts = _all(options)
    for host in _chosen(options, options.host) or all_hosts:
        links.heal(host, [other for other in all_hosts if other is not host])


def _slow(options: argparse.Namespace) -> None:
    [host] = _chosen(options, [options.host])
    links.slow(host, options.rate, options.delay)


def _kill(options: argparse.Namespace) -> int:
    number = _signal(options.signal)
    killed = kill(_chosen(options, options.host) or _all(options), number, rank=options.rank, part=options.part)
    _print(killed or ["no such process"])
    return int(not killed)


def _exec(options: argparse.Namespace) -> int:
    [host] = _chosen(options, [options.host])
    command = _after_dashes(options.command)
    if not command:
        raise LabError("exec takes a command, such as `exec 1 -- ip addr`")
    try:
        child = host.start(command)
    except OSError as error:
        raise LabError(f"{command[0]}: {error.strerror}") from error
    while True:
        try:
            return int(child.wait())
        except KeyboardInterrupt:  # the terminal has sent SIGINT to the child, too
            continue


def _run(options: argparse.Namespace) -> int:
    all_hosts, jobs = _all(options), Jobs(sys.stdout)
    lines = commands(all_hosts, _after_dashes(options.flags), options.ranks, torchrun=options.torchrun, ipv6=options.ipv6)
    try:
        for node, (host, line) in enumerate(zip(all_hosts, lines, strict=True)):
            if node:
                time.sleep(options.stagger)
            jobs.start(host, line)
        codes = jobs.wait()
    except KeyboardInterrupt:
        jobs.signal(signal.SIGTERM)
        codes = jobs.wait()
    _print([f"{host.name}: exit code {code}" for host, code in zip(all_hosts, codes, strict=False)])
    return max(abs(code) for code in codes)


def _all(options: argparse.Namespace) -> list[Host]:
    all_hosts = lab_hosts.hosts(options.name)
    if not all_hosts:
        raise LabError(f"there is no lab {options.name!r}: create one with `python launch/lab up --hosts 2`")
    return all_hosts


def _chosen(options: argparse.Namespace, numbers: Sequence[int]) -> list[Host]:
    by_index = {host.index: host for host in _all(options)}
    for number in numbers:
        if number not in by_index:
            raise LabError(f"there is no host {number}: the lab has {', '.join(map(str, by_index))}")
    return [by_index[number] for number in numbers]


def _signal(name: str) -> signal.Signals:
    try:
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    except KeyError:
        raise LabError(f"there is no signal {name!r}: say KILL, STOP, CONT or TERM") from None


def _after_dashes(words: list[str]) -> list[str]:
    return words[1:] if words[:1] == ["--"] else words


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="lab", help="name of the lab (default: lab)")
    parser.add_argument("--port", type=int, default=8000, help="port of the server, for its /readyz in the table")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, do: object, text: str) -> argparse.ArgumentParser:
        command = verbs.add_parser(name, help=text)
        command.set_defaults(do=do)
        return command

    verb("up", _up, "create the hosts").add_argument("--hosts", type=int, default=2, help=f"2 to {lab_hosts.MOST_HOSTS}")
    verb("down", _down, "remove the lab")
    verb("status", _status, "print the table once")
    verb("watch", _watch, "print the table repeatedly").add_argument("--every", type=float, default=1.0, metavar="SECONDS")
    cut = verb("cut", _cut, "cut a host off, or two from each other")
    cut.add_argument("host", type=int, nargs="+")
    cut.add_argument("--silent", action="store_true", help="packets vanish without an error")
    verb("heal", _heal, "undo cuts and limits").add_argument("host", type=int, nargs="*", help="default: all")
    slow = verb("slow", _slow, "limit a host's link")
    slow.add_argument("host", type=int)
    slow.add_argument("--rate", help="such as 10mbit")
    slow.add_argument("--delay", help="such as 20ms, where the kernel has netem")
    killing = verb("kill", _kill, "send a signal to processes of a host")
    killing.add_argument("host", type=int, nargs="*", help="default: all")
    killing.add_argument("--rank", type=int)
    killing.add_argument("--part", choices=["serve", "agent", "frontend", "torchrun"])
    killing.add_argument("--signal", default="KILL", help="such as STOP, CONT, TERM")
    execute = verb("exec", _exec, "run a command in a host")
    execute.add_argument("host", type=int)
    execute.add_argument("command", nargs=argparse.REMAINDER)
    run = verb("run", _run, "one `tpserve serve` a host; Ctrl-C drains")
    run.add_argument(
        "--ranks",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1],
        help="ranks of each host, one number or one for each host, such as 1,2",
    )
    run.add_argument("--torchrun", action="store_true", help="bare torchrun instead of `tpserve serve`")
    run.add_argument("--ipv6", action="store_true", help="use IPv6 for the master address")
    run.add_argument("--stagger", type=float, default=0.0, metavar="SECONDS", help="between the starts of two hosts")
    run.add_argument("flags", nargs=argparse.REMAINDER, help="MODEL and flags of tpserve, after --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
