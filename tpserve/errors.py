"""Errors by audience.

`UserError`      the user can mend it: a 4xx with the OpenAI body, or one line and exit code 2. Its text names the thing and
                 the way out.
`EngineFailure`  a rank, a link or a device failed: the coordinator decides what happens next.
`assert`         our own bug.
"""


class UserError(Exception):
    """Something the user asked for cannot be done; `str(error)` is one sentence that names the thing and the way out.

    `param` names the request field or flag at fault, `code` is the machine-readable code of the OpenAI error body,
    `status` the HTTP status it becomes (a command line exits with code 2 instead).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class EngineFailure(Exception):
    """A rank, a link or a device failed. Never the user's fault, never raised for one bad request."""
