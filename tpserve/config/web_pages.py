"""Flags about web pages that may use the server: which text is a list of names, and which an origin. Pure."""

from msgspec import DecodeError, json

from tpserve.errors import UserError


def name_list(name: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """The values of a flag that takes names, or a JSON list as in vLLM. Raises UserError."""
    text = " ".join(values)
    if not text.startswith("["):
        return values
    try:
        return tuple(json.decode(text, type=list[str]))
    except (DecodeError, UnicodeDecodeError):
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{flag} must be names, or a JSON list of texts, not {text!r}", param=name) from None


def origin_list(values: tuple[str, ...]) -> tuple[str, ...]:
    """The origins as browsers send them. Raises UserError."""
    origins = tuple(origin.rstrip("/").lower() for origin in name_list("allowed_origins", values))
    for origin in origins:
        scheme, separator, host = origin.partition("://")
        if origin not in ("*", "null") and (not separator or not scheme or not host or "/" in host):
            raise UserError(
                f"--allowed-origins {origin!r} is no origin: a scheme and a host, such as https://chat.example.com",
                param="allowed_origins",
            )
    return origins
