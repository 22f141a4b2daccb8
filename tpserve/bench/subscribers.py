"""Stands in for the other ranks: `python -m tpserve.bench.subscribers CONNECT_INFO COUNT PARENT_PID` receives and drops plans.

One process with a connection for each rank, so that rank 0 sends as often as to real ranks. Ends with its parent.
"""

import sys

import zmq
from msgspec import json

from tpserve.process.process_utils import die_with
from tpserve.wire.channels import PlanReceiver
from tpserve.wire.curve import ConnectInfo, rank_role


def subscribe(connect_info: ConnectInfo, count: int) -> None:
    """Receive without end. Decodes nothing, since real ranks decode on other cores."""
    curve_client = None if connect_info.endpoint.startswith("ipc:") else connect_info.keyring(None).curve_client(1, rank_role(0))
    receivers = [PlanReceiver(connect_info.endpoint, 0, curve_client) for _ in range(count)]
    poller = zmq.Poller()
    for receiver in receivers:
        poller.register(receiver.socket, zmq.POLLIN)
    while True:
        for socket, _ in poller.poll():
            socket.recv()


if __name__ == "__main__":
    die_with(int(sys.argv[3]))
    subscribe(json.decode(sys.argv[1], type=ConnectInfo), int(sys.argv[2]))
