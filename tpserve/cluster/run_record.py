"""run.json in the runtime directory: what a frontend needs to know of the one before it, which was killed.

Ranks outlive a frontend. The next one continues their epochs, and with several nodes it listens where they dial already, with
the same keys.
"""

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from tpserve.types.messages import PauseMode
from tpserve.wire.curve import ConnectInfo


class RunRecord(Struct, frozen=True):
    """`epoch`: the last one that was started. `facts`: of the loaded model, empty before one has run. `remote`: the coordinator's
    address for other nodes; None on a single node. `pause`: the mode of a pause that goes on."""

    epoch: int = 0
    facts: dict[str, int] = {}
    remote: ConnectInfo | None = None
    pause: PauseMode | None = None


def read_run(where: Path) -> RunRecord:
    """The record; an empty one in a new runtime directory."""
    try:
        return msgspec.json.decode((where / "run.json").read_bytes(), type=RunRecord)
    except FileNotFoundError:
        return RunRecord()


def write_run(where: Path, record: RunRecord) -> None:
    """Write the record atomically, readable by this user alone: it may hold the secret of the run."""
    draft = where / "run.draft"
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(msgspec.json.encode(record))
    draft.rename(where / "run.json")
