"""Stand-ins for the other ranks: `python -m tpserve.bench.listeners INVITATION COUNT PARENT_PID` reads plans and drops them.

One process with a connection for each, so that rank 0 sends as often as it would to real ranks. Ends with its parent.
"""

import sys

import zmq
from msgspec import json

from tpserve.wire.auth import Invitation, rank_role
from tpserve.wire.channels import PlanReceiver
from tpserve.wire.lifetime import die_with


def listen(invitation: Invitation, count: int) -> None:
    """Read for ever, and decode nothing: that is other cores' work."""
    key = None if invitation.endpoint.startswith("ipc:") else invitation.accept(None).key(1, rank_role(0))
    receivers = [PlanReceiver(invitation.endpoint, 0, key) for _ in range(count)]
    poller = zmq.Poller()
    for receiver in receivers:
        poller.register(receiver.socket, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            socket.recv()


if __name__ == "__main__":
    die_with(int(sys.argv[3]))
    listen(json.decode(sys.argv[1], type=Invitation), int(sys.argv[2]))
