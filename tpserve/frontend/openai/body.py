"""From bytes to a checked call. Every way a body can be wrong ends here in a UserError that names the field.

Nothing here keeps the event loop for long: a body is scanned in slices before it is decoded, and large ones one at a time.
"""

import asyncio
import logging
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown
from tpserve.frontend.openai.json_scan import SLICE, scan
from tpserve.frontend.openai.schema import ALIASES, LABELS, NEUTRAL

log = logging.getLogger(__name__)

Call = TypeVar("Call", bound=msgspec.Struct)
MAX_WARNINGS = 16
MAX_LOGGED_NAMES = 256
PLACE = re.compile(r"(?s)(.*) - at `(?:key` in `)?\$\.?(.*)`$")


async def read_object(request: web.Request, large: asyncio.Lock) -> dict[str, Any]:
    """The body as a JSON object. UserError when it is none, or holds more values than can be decoded at once.

    `large`: held while a body of more than a slice is decoded, so that many of them do not keep the event loop together.
    """
    if (encoding := request.headers.get("Content-Encoding", "identity")) != "identity":
        raise UserError(f"the body is encoded as {shown(encoding)!r}; send it plain", code="unsupported_encoding", status=415)
    try:
        data = await request.read()
    except web.RequestPayloadError as error:
        raise UserError(f"the body cannot be read: {error}") from error
    if not data:
        raise UserError("the body is empty; send a JSON object")
    if len(data) <= SLICE:
        for _ in scan(data):
            pass
        value = decode(data)
    else:
        async with large:
            for _ in scan(data):
                await asyncio.sleep(0)  # others have their turn
            value = decode(data)
            await asyncio.sleep(0)
    if not isinstance(value, dict):
        raise UserError(f"the body must be a JSON object, this is {type(value).__name__}")
    return value


def decode(data: bytes) -> Any:
    """The value of a JSON text. UserError when it is none."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is not valid JSON: {error}", code="invalid_json") from error


def parse(
    body: dict[str, Any], schema: type[Call], logged: set[str], defaults: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Call, list[str]]:
    """The call and its warnings. UserError names the field that is refused or out of range.

    `defaults`: fields that the body need not say, in place of the schema's own.
    `logged`: unknown names the log has had; each is logged once, and not without end, for clients choose them.
    """
    fields = {ALIASES.get(name, name): value for name, value in body.items() if value is not None}
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = {name: value for name, value in options.items() if value is not None}
    known = {field.encode_name for field in msgspec.structs.fields(schema)}
    unknown = [name for name in fields if name not in known and not neutral(name, fields)]
    for name in unknown:
        if name in NEUTRAL:
            raise UserError(
                f"{name} is not supported by this server; leave it out{hint(name)}", param=name, code="unsupported_parameter"
            )
    try:
        call = msgspec.convert({**defaults, **fields}, schema, str_keys=True)  # JSON's names of members are strings: logit_bias
    except msgspec.ValidationError as error:
        raise invalid(str(error), fields) from None
    for name in unknown[:MAX_WARNINGS]:
        if name not in logged and len(logged) < MAX_LOGGED_NAMES:
            logged.add(name)
            log.warning("unknown request field %.64r ignored; further ones of this name are not logged", name)
    return call, [f"unknown field {name[:64]!r} ignored" for name in unknown[:MAX_WARNINGS]]


def neutral(name: str, fields: dict[str, Any]) -> bool:
    """Whether a field that is not honoured asks for nothing."""
    return name in LABELS or fields[name] in NEUTRAL.get(name, ())


def hint(name: str) -> str:
    allowed = NEUTRAL[name]
    return f" or set it to {msgspec.json.encode(allowed[0]).decode()}" if allowed else ""


def invalid(text: str, fields: dict[str, Any]) -> UserError:
    """msgspec's sentence with its path as `param`, and the value where a range was missed."""
    match = PLACE.match(text)
    sentence, param = (match[1], match[2]) if match else (text, "")
    if missing := re.search(r"missing required field `(\w+)`", sentence):
        return UserError(f"{missing[1]} is required", param=missing[1], code="missing_required_parameter")
    value = fields.get(param)
    got = f", got {shown(value)}" if isinstance(value, int | float) and "got" not in sentence else ""
    sentence = sentence[0].lower() + sentence[1:]
    return UserError(f"{param}: {sentence}{got}", param=param or None, code="invalid_value")
