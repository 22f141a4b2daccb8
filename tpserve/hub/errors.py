"""An error of huggingface_hub as one line that names the way out."""

import errno
from pathlib import Path

from tpserve.errors import UserError


def to_user_error(
    error: Exception, repository: str, revision: str, cache: Path, file: str = "", flag: str = "--revision"
) -> UserError:
    """The UserError for an exception of huggingface_hub.

    `file`: the file of the repository that it concerns, if any. `flag`: the flag that gives the revision.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    what = f"{file} of {repository}" if file else repository
    chain = _causes(error)
    status = next((code for cause in chain if (code := _status(cause)) is not None), None)
    if any(isinstance(cause, GatedRepoError) for cause in chain):
        text = (
            f"{repository} is gated: accept its licence at https://huggingface.co/{repository} and set HF_TOKEN to a token of "
            "that account"
        )
    elif any(isinstance(cause, RevisionNotFoundError) for cause in chain):
        text = f"{repository} has no branch, tag or commit {revision}: check {flag}"
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in chain):
        text = (
            f"there is no directory {repository} here and no repository {repository} at {constants.ENDPOINT}: check the name; "
            f"for a private or gated one accept its licence at https://huggingface.co/{repository} and set HF_TOKEN"
        )
    elif any(isinstance(cause, OfflineModeIsEnabled) for cause in chain) or constants.HF_HUB_OFFLINE:
        text = (
            f"HF_HUB_OFFLINE is set, and {what} at revision {revision} is not in the cache {cache}: unset it for one start, or "
            "name the cache that has it with --download-dir or HF_HOME"
        )
    elif any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in chain):
        text = f"no room for {what} in {cache}: make room, or choose another directory with --download-dir or HF_HOME"
    elif status in (401, 403):
        text = f"{constants.ENDPOINT} refuses HF_TOKEN for {repository} (status {status}): set a valid one, or none"
    else:
        answer = f"status {status}" if status is not None else f"{type(chain[-1]).__name__}: {chain[-1]}"
        text = (
            f"{constants.ENDPOINT} did not give {what} ({answer}): check the network and HF_ENDPOINT, and start again; whole "
            "files are kept"
        )
    return UserError(text)


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and its causes. huggingface_hub wraps the errors of a connection."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status of the error's response, if it has one."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
