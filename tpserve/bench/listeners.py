"""Stand-ins for the other ranks: `python -m tpserve.bench.listeners ENDPOINT COUNT PARENT_PID` reads plans and drops them.

One process with a connection for each, so that rank 0 sends as often as it would to real ranks. Ends with its parent.
"""

import sys

import zmq

from tpserve.wire.channels import PlanReceiver
from tpserve.wire.lifetime import die_with


def listen(endpoint: str, count: int) -> None:
    """Read for ever, and decode nothing: that is other cores' work."""
    receivers = [PlanReceiver(endpoint, epoch=0) for _ in range(count)]
    poller = zmq.Poller()
    for receiver in receivers:
        poller.register(receiver.socket, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            socket.recv()


if __name__ == "__main__":
    die_with(int(sys.argv[3]))
    listen(sys.argv[1], int(sys.argv[2]))
