"""What the hub answers, as one line with the way out."""

import errno
from pathlib import Path

from tpserve.errors import UserError


def refusal(error: Exception, repository: str, revision: str, cache: Path, file: str = "", flag: str = "--revision") -> UserError:
    """The error to raise for what huggingface_hub raised about a repository, or about one file of it. `flag`: the revision's."""
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
        said = f"status {status}" if status is not None else f"{type(chain[-1]).__name__}: {chain[-1]}"
        text = (
            f"{constants.ENDPOINT} did not give {what} ({said}): check the network and HF_ENDPOINT, and start again; whole files "
            "are kept"
        )
    return UserError(text)


def _causes(error: BaseException | None) -> list[BaseException]:
    """The error and what it was raised from: huggingface_hub wraps what a connection said."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int | None:
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None
