"""TLS of the HTTP socket: the certificate and its key, as files."""

import ssl
from pathlib import Path

from tpserve.errors import UserError


def server_context(certfile: str | None, keyfile: str | None) -> ssl.SSLContext | None:
    """The context of a server with this certificate; None without one. TLS 1.2 and newer.

    Files in PEM format; without `keyfile` the key is in the file of the certificate. UserError names the file that is at fault.
    """
    if certfile is None:
        if keyfile is not None:
            raise UserError("--ssl-keyfile needs --ssl-certfile, the certificate of the key", param="ssl_keyfile")
        return None
    for name, path in (("ssl_certfile", certfile), ("ssl_keyfile", keyfile)):
        if path is not None:
            _check_readable(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        of = certfile if keyfile is None else f"{certfile} and {keyfile}"
        raise UserError(
            f"{of} are not a certificate and its key, unencrypted, in PEM format: {error}", param="ssl_certfile"
        ) from error
    return context


def _check_readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise UserError(f"--{name.replace('_', '-')} {path} cannot be read: {error.strerror}", param=name) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")
