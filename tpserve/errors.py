"""Errors by audience.

`UserError`      the user can fix it: an HTTP 4xx with the OpenAI body, or one line on stderr and exit code 2.
`EngineFailure`  a rank, a connection or a device failed: the coordinator decides what happens next.
`PeerLost`       the same, where another rank is the cause: this one is sound and can take part in the next epoch.
`assert`         a bug in tpserve.
"""


class UserError(Exception):
    """The input or the setup is wrong. `str(error)` is one sentence that names the problem and the way out.

    `param` names the request field or flag at fault, `code` is the machine-readable code of the OpenAI error body, and
    `status` the HTTP status of the answer (a command line exits with code 2 instead). `retry_s`: seconds after which the same
    request may succeed, where that is known; infinite when it should not be sent again though its status lets clients do so.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.retry_s = retry_s


class EngineFailure(Exception):
    """A rank, a connection or a device failed. Never the user's fault, never raised for one bad request."""


class PeerLost(EngineFailure):
    """A collective cannot complete: a peer has ended, has left the epoch, or cannot be reached."""
