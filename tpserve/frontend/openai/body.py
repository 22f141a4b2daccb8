"""Decoding and validation of a request body. Every error is a UserError that names the field.

Nothing here blocks the event loop for long: a body is scanned in slices before it is decoded, and large bodies take turns.
"""

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown
from tpserve.frontend.openai.json_scan import SLICE, scan
from tpserve.frontend.openai.schema import OPENAI_RULES, FieldRules

log = logging.getLogger(__name__)

ApiRequest = TypeVar("ApiRequest", bound=msgspec.Struct)
MAX_BODY_BYTES = 8 << 20
"""A text of this size has about 2 million tokens and takes about 50 ms to decode."""
JSON_TYPE = "application/json"
MAX_WARNINGS = 16
MAX_LOGGED_NAMES = 256
MAX_NAMED = 5
"""The most wrong keys that one error names."""
TOKEN_ID = re.compile(r"[0-9]{1,18}")
ERROR_PATH = re.compile(r"(?s)(.*) - at `(?:key` in `)?\$\.?(.*)`$")


async def read_object(request: web.Request, large: asyncio.Lock) -> dict[str, Any]:
    """The body as a JSON object. UserError when it is not one, or has more values than the server decodes at once.

    `large` is held while a body of more than one slice is decoded, so that several large bodies take turns.
    """
    if (encoding := request.headers.get("Content-Encoding", "identity")) != "identity":
        raise UserError(f"the body is encoded as {shown(encoding)!r}; send it plain", code="unsupported_encoding", status=415)
    media_type = request.headers.get("Content-Type", JSON_TYPE).partition(";")[0].strip().lower()
    if media_type != JSON_TYPE and not media_type.endswith("+json"):
        raise UserError(
            f"the body is sent as {shown(media_type)!r}; send JSON with the header 'Content-Type: {JSON_TYPE}'",
            code="unsupported_media_type",
            status=415,
        )
    try:
        data = await request.read()
    except web.RequestPayloadError as error:
        raise UserError(f"the body cannot be read: {error}") from error
    return await decode_object(data, large)


async def decode_object(data: bytes, large: asyncio.Lock) -> dict[str, Any]:
    """The same of a body that has been read."""
    if not data:
        raise UserError("the body is empty; send a JSON object")
    if len(data) <= SLICE:
        for _ in scan(data):
            pass
        value = decode(data)
    else:
        async with large:
            for _ in scan(data):
                await asyncio.sleep(0)  # let other tasks run
            value = decode(data)
            await asyncio.sleep(0)
    if not isinstance(value, dict):
        raise UserError(f"the body must be a JSON object, this is {type(value).__name__}")
    return value


def decode(data: bytes) -> Any:
    """The value of a JSON text. UserError when it is not JSON."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"the body is not valid JSON: {error}", code="invalid_json") from error


def parse(
    body: dict[str, Any],
    schema: type[ApiRequest],
    logged: set[str],
    defaults: Mapping[str, Any] = MappingProxyType({}),
    rules: FieldRules = OPENAI_RULES,
) -> tuple[ApiRequest, list[str]]:
    """The request and its warnings. UserError for a field that is not supported or out of range.

    `defaults`: values of fields that the body leaves out, in place of the schema's.
    `logged`: unknown field names that have been logged. Each is logged once, up to `MAX_LOGGED_NAMES`, since clients choose them.
    """
    fields = {rules.aliases.get(name, name): value for name, value in body.items() if value is not None}
    if isinstance(options := fields.get("stream_options"), dict):
        fields["stream_options"] = {name: value for name, value in options.items() if value is not None}
    known = schema.__struct_encode_fields__
    unknown = [name for name in fields if name not in known and not is_neutral(name, fields, rules)]
    for name in unknown:
        if name in rules.neutral:
            hint = neutral_hint(rules.neutral[name])
            raise UserError(
                f"{name} is not supported by this server; leave it out{hint}", param=name, code="unsupported_parameter"
            )
    for name, value in fields.items():
        if type(value) is float and value.is_integer():  # some clients have no integers; a field of floats takes one as well
            fields[name] = int(value)
    try:
        call = msgspec.convert({**defaults, **fields}, schema, str_keys=True)  # the keys of logit_bias are strings in JSON
    except msgspec.ValidationError as error:
        raise to_validation_error(str(error), fields) from None
    for name in unknown[:MAX_WARNINGS]:
        if name not in logged and len(logged) < MAX_LOGGED_NAMES:
            logged.add(name)
            log.warning("unknown request field %.64r ignored; further ones of this name are not logged", name)
    return call, [f"unknown field {name[:64]!r} ignored" for name in unknown[:MAX_WARNINGS]]


def is_neutral(name: str, fields: dict[str, Any], rules: FieldRules) -> bool:
    """Whether a field that is not supported has a value without effect."""
    return name in rules.labels or fields[name] in rules.neutral.get(name, ())


def neutral_hint(allowed: Sequence[Any]) -> str:
    """The end of an error about an unsupported field: a value that is accepted, if there is one."""
    return f" or set it to {msgspec.json.encode(allowed[0]).decode()}" if allowed else ""


def to_validation_error(text: str, fields: dict[str, Any]) -> UserError:
    """The error of msgspec with its path as `param`, and the value where it is out of range."""
    match = ERROR_PATH.match(text)
    sentence, param = (match[1], match[2]) if match else (text, "")
    if missing := re.search(r"missing required field `(\w+)`", sentence):
        return UserError(f"{missing[1]} is required", param=missing[1], code="missing_required_parameter")
    if param.startswith("logit_bias") and isinstance(bias := fields.get("logit_bias"), dict):
        keys = [shown(repr(key)) for key in bias if not TOKEN_ID.fullmatch(key)]
        if keys:
            text = ", ".join(keys[:MAX_NAMED]) + (f" and {len(keys) - MAX_NAMED} more" if len(keys) > MAX_NAMED else "")
            return UserError(f"logit_bias: {text}: not the id of a token", param="logit_bias", code="invalid_value")
    value = fields.get(param)
    got = f", got {shown(value)}" if isinstance(value, int | float) and "got" not in sentence else ""
    sentence = sentence[0].lower() + sentence[1:]
    return UserError(f"{param}: {sentence}{got}", param=param or None, code="invalid_value")
