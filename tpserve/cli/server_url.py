"""Parses the URL of a running server, for the commands that connect to one."""

from urllib.parse import urlsplit

from tpserve.config.flags import WrongValue

URL = "http://127.0.0.1:8000"
"""The default address of a server."""


def server_url(text: str) -> str:
    """The base URL: adds http:// when there is no scheme, and removes the /v1 that API clients use. Raises WrongValue."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise WrongValue("an address such as " + URL)
    return url
