"""The address of a running server, as people give it."""

from urllib.parse import urlsplit

from tpserve.config.schema import WrongValue

URL = "http://127.0.0.1:8000"
"""Where a server answers unless it was told otherwise."""


def server_url(text: str) -> str:
    """With http:// where no scheme is said, and without the /v1 that clients of the API are given. Raises WrongValue."""
    url = (text if "://" in text else f"http://{text}").rstrip("/").removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment:
        raise WrongValue("an address such as " + URL)
    return url
