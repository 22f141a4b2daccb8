"""The rank processes of one node: forks them, waits for them, and starts one again that died.

    exit code 0      the rank has drained, and so has the service
    2, 3             an error of the user; the end that the coordinator ordered: all ranks of this node end
    anything else    the rank starts again; from the fourth early death in a row on after a pause (`RestartBackoff`), and not at
                     all when this node has been told to end

Owns the processes, the forkserver and, from one process of a rank to the next, its packed weights. Decides nothing about the
service: whether it can recover the coordinator knows, and how long it may take. Invariants: at most one process a rank is asked
for at a time; once a rank has left with 0 none starts again, and what still runs three seconds later is killed; every orphan of
a rank, which this process adopts, is waited for.
"""

import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tpserve.process.fork_client import ForkClient, ForkReply, ForkRequest, ForkserverLost
from tpserve.process.process_utils import exit_text, open_pidfd, reap_children
from tpserve.process.restart_backoff import RestartBackoff
from tpserve.process.weights_keeper import KeptWeights

logger = logging.getLogger("tpserve.agent")

DRAINED, USER_ERROR, ENDED = 0, 2, 3
FOLLOW_S = 3.0
"""How long ranks may outlive one that has left with 0. All get Stop at the same time and have two seconds to exit."""
POLL_S = 1.0


@dataclass
class RankProcess:
    """One rank of this node. `pid` is 0 while there is no process, `due_s` set while the next one has not been asked for."""

    rank: int
    pid: int = 0
    pidfd: int | None = None
    due_s: float | None = 0.0
    started_s: float = 0.0
    restarts: int = 0
    last_exit: str = ""
    exit_code: int | None = None
    """Set once the rank has ended for good."""
    backoff: RestartBackoff = field(default_factory=RestartBackoff)
    weights: KeptWeights = field(default_factory=KeptWeights)


class RankProcesses:
    """All ranks of this node. Used by one thread; `terminate` also by a signal handler."""

    def __init__(
        self,
        forkserver: ForkClient,
        new_forkserver: Callable[[], ForkClient],
        make_request: Callable[[RankProcess], ForkRequest],
        ranks: list[RankProcess],
        restart: bool = True,
        shared: Sequence[int] = (),
    ) -> None:
        """`make_request`: the request for the next process of a rank. `new_forkserver`: starts one in place of one that died.

        Without `restart` every exit code but 0 ends all ranks; else a rank has the socket of its weights as its first descriptor
        and `shared` as the next ones.
        """
        self.ranks = ranks
        self._forkserver: ForkClient | None = forkserver
        self._new_forkserver = new_forkserver
        self._forkserver_due_s = 0.0
        self._forkserver_started_s = time.monotonic()
        self._forkserver_backoff = RestartBackoff()
        self._make_request = make_request
        self._restart = restart
        self._shared = shared
        self._asked: list[RankProcess] = []
        """Ranks in the order of the requests without a reply."""
        self._terminating = False
        self._kill_s: float | None = None
        """When to kill what is left; set once no rank starts again."""

    def start(self) -> None:
        """Start all ranks; returns when each has a process, or has ended for good."""
        while any(rank.pid == 0 and rank.exit_code is None for rank in self.ranks):
            self.poll(POLL_S)

    def poll(self, timeout_s: float) -> None:
        """Do what is due, and wait for something to happen, at most `timeout_s`."""
        now = time.monotonic()
        if self._forkserver is None and self._kill_s is None and now >= self._forkserver_due_s:
            self._forkserver, self._forkserver_started_s = self._new_forkserver(), now
        for rank in self.ranks:
            if rank.due_s is not None and rank.due_s <= now:
                self._ask(rank)
        if self._kill_s is not None and now >= self._kill_s:
            for rank in self.living():
                logger.warning("rank %d (pid %d) has not ended: killing it", rank.rank, rank.pid)
            self.signal(signal.SIGKILL)
            self._kill_s = now + POLL_S
        self._wait(min([timeout_s, *(due_s - now for due_s in self._due())]))
        for rank in self.ranks:
            rank.weights.take()
        exits = reap_children()
        self._take_replies()  # now: a process has its reply sent before it runs, so that of one in `exits` has come
        for pid, code in exits.items():
            self._take_exit(pid, code)

    def stop(self, number: int, timeout_s: float) -> None:
        """Signal all ranks, and kill what is left after `timeout_s`. Ends the forkserver, too."""
        self._start_no_more(timeout_s)
        self.signal(number)
        while self.living():
            self.poll(POLL_S)
        for rank in self.ranks:
            rank.weights.close()
        if self._forkserver is not None:
            self._forkserver.close()
            self._forkserver = None

    @property
    def result(self) -> int | None:
        """The exit code of this node: 0 after a drain, 2 for an error of the user, 1 for any other failure; None before."""
        codes = [rank.exit_code for rank in self.ranks if rank.exit_code is not None]
        if USER_ERROR in codes:
            return 2
        if ENDED in codes or (not self._restart and any(codes)):
            return 1
        if len(codes) < len(self.ranks):
            return None
        return 0 if DRAINED in codes else 1

    def living(self) -> list[RankProcess]:
        """The ranks that have a process."""
        return [rank for rank in self.ranks if rank.pid]

    def pids(self) -> dict[int, str]:
        """The processes that this one has started: pid -> name."""
        forkserver = self._forkserver
        return {rank.pid: "a rank" for rank in self.living()} | ({forkserver.pid: "the forkserver"} if forkserver else {})

    def signal(self, number: int) -> bool:
        """Signal all ranks; returns whether there are any."""
        living = self.living()
        for rank in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)
        return bool(living)

    def terminate(self) -> bool:
        """Tell all ranks to drain; returns whether there are any."""
        self._terminating = True
        return self.signal(signal.SIGTERM)

    def _start_no_more(self, kill_after_s: float) -> None:
        if self._kill_s is None:
            self._kill_s = time.monotonic() + kill_after_s
        for rank in self.ranks:
            if rank.pid == 0 and rank.exit_code is None:
                rank.due_s, rank.exit_code = None, -signal.SIGTERM

    # The forkserver

    def _ask(self, rank: RankProcess) -> None:
        if self._forkserver is None:
            return
        try:
            if self._restart:
                with rank.weights.offer() as theirs:
                    self._forkserver.request(self._make_request(rank), descriptors=[theirs.fileno(), *self._shared])
            else:
                self._forkserver.request(self._make_request(rank))
        except ForkserverLost:
            return  # `_take_exit` sees its end
        rank.due_s = None
        self._asked.append(rank)

    def _take_replies(self) -> None:
        if self._forkserver is None:
            return
        with contextlib.suppress(ForkserverLost):  # `_take_exit` sees its end
            while self._asked and (reply := self._forkserver.receive()) is not None:
                self._take_reply(reply)

    def _take_reply(self, reply: ForkReply) -> None:
        rank = self._asked.pop(0)
        if reply.error:
            rank.due_s = time.monotonic() + rank.backoff.delay_s(0.0)
            logger.warning("rank %d could not be started, trying again: %s", rank.rank, reply.error)
            return
        rank.pid, rank.started_s, rank.pidfd = reply.pid, time.monotonic(), open_pidfd(reply.pid)
        rank.exit_code = None
        if self._kill_s is not None:
            os.kill(rank.pid, signal.SIGKILL)

    def _take_forkserver_exit(self, forkserver: ForkClient, code: int) -> None:
        """Start another one soon. What it was asked for and has not done is asked again."""
        for reply in forkserver.remaining():
            self._take_reply(reply)
        now = time.monotonic()
        self._forkserver_due_s = now + self._forkserver_backoff.delay_s(now - self._forkserver_started_s)
        if self._kill_s is None:
            logger.warning("the forkserver (pid %d) %s: starting another", forkserver.pid, exit_text(code))
        forkserver.close(code)
        self._forkserver = None
        for rank in self._asked:
            rank.due_s = now if rank.exit_code is None else None
        self._asked.clear()

    # Ends

    def _take_exit(self, pid: int, code: int) -> None:
        if self._forkserver is not None and pid == self._forkserver.pid:
            self._take_forkserver_exit(self._forkserver, code)
            return
        rank = next((rank for rank in self.ranks if rank.pid == pid), None)
        if rank is None:  # an orphan of a rank
            return
        now = time.monotonic()
        if rank.pidfd is not None:
            os.close(rank.pidfd)
        rank.pid, rank.pidfd = 0, None
        if code in (DRAINED, USER_ERROR, ENDED) or not self._restart or self._kill_s is not None:
            rank.exit_code = code
            if code == DRAINED and self._restart:
                self._start_no_more(FOLLOW_S)
            return
        delay_s = rank.backoff.delay_s(now - rank.started_s)
        if delay_s:
            rank.weights.drop()  # in case they are the reason
        if self._terminating and delay_s:
            rank.exit_code = code
            return
        rank.restarts += 1
        rank.last_exit = exit_cause(code)
        rank.due_s = now + delay_s
        when = f" in {delay_s:g} s" if delay_s else ""
        logger.warning("rank %d (pid %d) %s: starting it again%s", rank.rank, pid, exit_text(code), when)

    # Waiting

    def _due(self) -> list[float]:
        """When something is due: a kill, a forkserver, a rank."""
        if self._kill_s is not None:
            return [self._kill_s]
        if self._forkserver is None:
            return [self._forkserver_due_s]
        return [rank.due_s for rank in self.ranks if rank.due_s is not None]

    def _wait(self, timeout_s: float) -> None:
        poll = select.poll()
        for rank in self.living():
            for descriptor in (rank.pidfd, rank.weights.fileno()):
                if descriptor is not None:
                    poll.register(descriptor, select.POLLIN)
        if self._forkserver is not None:
            poll.register(self._forkserver, select.POLLIN)
        poll.poll(max(0.0, timeout_s) * 1000)


def exit_cause(code: int) -> str:
    """TPSERVE_LAST_EXIT for an exit code as of `Popen`: "SIGSEGV", "exit code 1"."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def rank_name(rank: int) -> str:
    """The name of a rank's process, of which the kernel keeps 15 bytes."""
    return f"tpserve rank {rank}" if rank < 100 else f"tp rank {rank}"
