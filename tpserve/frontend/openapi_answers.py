"""What the routes answer, as OpenAPI 3.1: statuses, content types, schemas of bodies, and links between operations.

Objects are open: answers may have members that are not named here. `required` names what every answer has.
"""

from typing import Any

from tpserve.frontend.access import ADMIN_PATHS, OPEN_PATHS
from tpserve.frontend.admin_routes import MODES
from tpserve.frontend.endpoints import ENDPOINTS

Json = dict[str, Any]
TEXT, INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("string", "integer", "number", "boolean"))
ANYTHING: Json = {}
NULL: Json = {"type": "null"}


def obj(**members: Json) -> Json:
    """An object that has all of `members`."""
    return {"type": "object", "required": list(members), "properties": members}


def listed(item: Json) -> Json:
    """A list of `item`."""
    return {"type": "array", "items": item}


def const(value: object) -> Json:
    """Just this value."""
    return {"const": value}


def optional(schema: Json) -> Json:
    """`schema`, or null."""
    return {"anyOf": [schema, NULL]}


def ref(name: str) -> Json:
    """The schema of this name."""
    return {"$ref": f"#/components/schemas/{name}"}


WARNINGS = {"type": "array", "items": TEXT}
FINISH = {"enum": ["stop", "length", "tool_calls", "abort", None]}
ERROR = obj(error=obj(message=TEXT, type=TEXT, param=optional(TEXT), code=optional(TEXT)))
ANTHROPIC_ERROR = obj(type=const("error"), error=obj(type=TEXT, message=TEXT), request_id=TEXT)
USAGE = obj(
    prompt_tokens=INTEGER,
    completion_tokens=INTEGER,
    total_tokens=INTEGER,
    prompt_tokens_details=obj(cached_tokens=INTEGER),
    completion_tokens_details=obj(reasoning_tokens=INTEGER),
)
MODEL = obj(
    id=TEXT, object=const("model"), created=INTEGER, owned_by=TEXT, root=TEXT, parent=NULL, max_model_len=optional(INTEGER)
)
TOP_LOGPROBS = optional({"type": "object", "additionalProperties": NUMBER})
COMPLETION_LOGPROBS = obj(
    tokens=listed(TEXT), token_logprobs=listed(optional(NUMBER)), top_logprobs=listed(TOP_LOGPROBS), text_offset=listed(INTEGER)
)
PROMPT_LOGPROBS = optional(listed(optional({"type": "object", "additionalProperties": obj(logprob=NUMBER, decoded_token=TEXT)})))
IDS = optional(listed(INTEGER))


def answer(kind: str, choice: dict[str, Json], **more: Json) -> Json:
    """A completion of either API: what is in each of its choices, and what else it has."""
    each = obj(index=INTEGER, finish_reason=FINISH, stop_reason=ANYTHING, token_ids=IDS, **choice)
    head = {"id": TEXT, "object": const(kind), "created": INTEGER, "model": TEXT, "system_fingerprint": TEXT}
    return obj(**head, choices=listed(each), usage=USAGE, **more)


COMPLETION = answer(
    "text_completion",
    {"text": TEXT, "logprobs": optional(COMPLETION_LOGPROBS), "prompt_token_ids": IDS, "prompt_logprobs": PROMPT_LOGPROBS},
)
CHAT_LOGPROB = obj(token=TEXT, logprob=NUMBER, bytes=IDS)
CHAT_LOGPROBS = obj(
    content=listed(CHAT_LOGPROB | {"properties": CHAT_LOGPROB["properties"] | {"top_logprobs": listed(CHAT_LOGPROB)}})
)
CALL = obj(id=TEXT, type=const("function"), function=obj(name=TEXT, arguments=TEXT))
MESSAGE = obj(role=const("assistant"), content=optional(TEXT), refusal=NULL)
MESSAGE["properties"] |= {"tool_calls": listed(CALL), "reasoning": TEXT, "reasoning_content": TEXT}
CHAT_COMPLETION = answer(
    "chat.completion",
    {"message": MESSAGE, "logprobs": optional(CHAT_LOGPROBS)},
    prompt_token_ids=IDS,
    prompt_logprobs=PROMPT_LOGPROBS,
)
OUTPUT_ITEM = obj(id=TEXT, type={"enum": ["message", "reasoning", "function_call"]}, status=TEXT)
RESPONSE = obj(
    id={"type": "string", "pattern": "^resp_"},
    object=const("response"),
    created_at=INTEGER,
    model=TEXT,
    background=BOOLEAN,
    status={"enum": ["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]},
    error=optional(obj(code=TEXT, message=TEXT)),
    incomplete_details=optional(obj(reason=TEXT)),
    output=listed(OUTPUT_ITEM),
    usage=optional(obj(input_tokens=INTEGER, output_tokens=INTEGER, total_tokens=INTEGER)),
    tools=listed({"type": "object"}),
    text={"type": "object"},
    temperature=NUMBER,
    top_p=NUMBER,
    metadata={"type": "object", "additionalProperties": TEXT},
    previous_response_id=optional(TEXT),
)
ANTHROPIC_MESSAGE = obj(
    id={"type": "string", "pattern": "^msg_"},
    type=const("message"),
    role=const("assistant"),
    model=TEXT,
    content=listed(obj(type={"enum": ["text", "thinking", "tool_use"]})),
    stop_reason={
        "enum": ["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use", None],
    },
    stop_sequence=optional(TEXT),
    usage=obj(input_tokens=INTEGER, output_tokens=INTEGER, cache_read_input_tokens=INTEGER, cache_creation_input_tokens=INTEGER),
)
STREAM_STATUS = obj(id=TEXT, object=const("stream.status"), status={"enum": ["queued", "in_progress"]})
STATE = obj(state=TEXT)
READINESS = obj(state=TEXT, phase=TEXT, percent=INTEGER, reason=TEXT)
ID_LISTS = {"first_id": optional(TEXT), "last_id": optional(TEXT), "has_more": BOOLEAN}

SCHEMAS: dict[str, Json] = {
    "Error": ERROR,
    "AnthropicError": ANTHROPIC_ERROR,
    "Model": MODEL,
    "Completion": COMPLETION,
    "ChatCompletion": CHAT_COMPLETION,
    "Response": RESPONSE,
    "Message": ANTHROPIC_MESSAGE,
    "StreamStatus": STREAM_STATUS,
}
"""Schemas with a name of their own, for `ref`."""

ANSWERS: dict[tuple[str, str], Json] = {
    ("GET", "/health"): READINESS,
    ("GET", "/readyz"): READINESS,
    ("GET", "/livez"): STATE,
    ("GET", "/ping"): STATE,
    ("GET", "/version"): obj(version=TEXT),
    ("GET", "/load"): obj(server_load=INTEGER),
    ("GET", "/server_info"): STATE,
    ("GET", "/v1/models"): obj(object=const("list"), data=listed(ref("Model"))),
    ("GET", "/v1/models/{id}"): ref("Model"),
    ("GET", "/tokenizer_info"): obj(vocab_size=INTEGER, chat_template=optional(TEXT)),
    ("POST", "/tokenize"): obj(count=INTEGER, max_model_len=INTEGER, tokens=listed(INTEGER), token_strs=optional(listed(TEXT))),
    ("POST", "/detokenize"): obj(prompt=TEXT),
    ("POST", "/v1/completions"): ref("Completion"),
    ("POST", "/v1/chat/completions"): ref("ChatCompletion"),
    ("POST", "/v1/responses"): ref("Response"),
    ("GET", "/v1/responses/{id}"): ref("Response"),
    ("DELETE", "/v1/responses/{id}"): obj(id=TEXT, object=const("response"), deleted=const(True)),
    ("POST", "/v1/responses/{id}/cancel"): ref("Response"),
    ("GET", "/v1/responses/{id}/input_items"): obj(object=const("list"), data=listed(obj(id=TEXT, type=TEXT)), **ID_LISTS),
    ("POST", "/v1/responses/input_tokens"): obj(object=const("response.input_tokens"), input_tokens=INTEGER),
    ("POST", "/v1/messages"): ref("Message"),
    ("POST", "/v1/messages/count_tokens"): obj(input_tokens=INTEGER),
    ("GET", "/v1/streams/{id}"): {"anyOf": [ref("Completion"), ref("ChatCompletion"), ref("Response"), ref("Message")]},
    ("DELETE", "/v1/streams/{id}"): obj(id=TEXT, object=const("stream.deleted"), deleted=const(True)),
    ("POST", "/pause"): obj(status=const("paused"), mode=optional(TEXT), num_aborted=INTEGER),
    ("POST", "/resume"): obj(status=const("resumed")),
    ("GET", "/is_paused"): obj(is_paused=BOOLEAN, mode=optional(TEXT)),
    ("POST", "/abort_request"): obj(num_aborted=INTEGER),
    ("POST", "/reset_prefix_cache"): obj(status=const("reset")),
    ("POST", "/reload"): obj(status=const("reloaded"), changes={"type": "object"}, resumption=optional(TEXT), took_s=NUMBER),
}
"""The JSON of status 200, by method and path. A route that is not here answers with some object."""
TEXTS = {"/metrics": "text/plain", "/": "text/html", "/docs": "text/html"}
"""Answers that are no JSON."""
STREAMS = frozenset({*((("POST", path)) for path in ENDPOINTS), ("GET", "/v1/streams/{id}"), ("GET", "/v1/responses/{id}")})
"""Operations that may answer with server-sent events."""
FROM = {"name": "from", "schema": {"type": "string", "pattern": r"^\d{1,9}(\.\d{1,9})?$"}}
QUERIES: dict[tuple[str, str], list[Json]] = {
    ("POST", "/pause"): [
        {"name": "mode", "schema": {"type": "string", "enum": list(MODES), "default": "keep"}},
        {"name": "clear_cache", "schema": BOOLEAN | {"default": False}},
    ],
    ("GET", "/v1/streams/{id}"): [FROM],
    ("GET", "/v1/responses/{id}"): [
        {"name": "stream", "schema": BOOLEAN},
        {"name": "starting_after", "schema": {"type": "integer", "minimum": 0, "maximum": 10**12 - 1}},
    ],
    ("GET", "/v1/responses/{id}/input_items"): [
        {"name": "limit", "schema": {"type": "integer", "minimum": 1, "maximum": 100}},
        {"name": "order", "schema": {"enum": ["asc", "desc"]}},
        {"name": "after", "schema": TEXT},
    ],
}
"""The parameters in the query of an operation, all of them optional."""
BY_ID = {"id": "$response.body#/id"}
RESPONSE_LINKS = {
    name: {"operationId": f"{method}_v1_responses_id{suffix}", "parameters": BY_ID}
    for name, method, suffix in (
        ("retrieve", "get", ""),
        ("cancel", "post", "_cancel"),
        ("input_items", "get", "_input_items"),
        ("delete", "delete", ""),
    )
}
STREAM_LINKS = {method: {"operationId": f"{method}_v1_streams_id", "parameters": BY_ID} for method in ("get", "delete")}
MODEL_LINKS = {"model": {"operationId": "get_v1_models_id", "parameters": {"id": "$response.body#/data/0/id"}}}
LINKS: dict[tuple[str, str, int], Json] = {
    ("GET", "/v1/models", 200): MODEL_LINKS,
    ("POST", "/v1/responses", 200): RESPONSE_LINKS,
    **{("POST", path, 202): STREAM_LINKS for path in ENDPOINTS if path != "/v1/responses"},
}
"""What may be done next with an answer, by method, path and status."""


def responses(method: str, path: str, takes_body: bool) -> Json:
    """The `responses` of an operation: every status that it can have. `takes_body`: of JSON."""
    found = {str(status): _error(path) for status in sorted(_error_statuses(method, path, takes_body))}
    found |= {"200": _answer(method, path)}
    if (path in ENDPOINTS and path != "/v1/responses") or (path == "/v1/streams/{id}" and method == "GET"):
        found["202"] = _json("The answer is not there yet", ref("StreamStatus"))
    if (method, path) == ("GET", "/v1/streams/{id}"):
        found["204"] = {"description": "The stream has nothing more"}
    for (of_method, of_path, status), links in LINKS.items():
        if (of_method, of_path) == (method, path):
            found[str(status)]["links"] = links
    return dict(sorted(found.items()))


def _answer(method: str, path: str) -> Json:
    if path in TEXTS:
        return {"description": "The answer", "content": {TEXTS[path]: {"schema": TEXT}}}
    answer = _json("The answer", ANSWERS.get((method, path), {"type": "object"}))
    if (method, path) in STREAMS:
        answer["content"]["text/event-stream"] = {}  # events have no schema before OpenAPI 3.2
    return answer


def _error(path: str) -> Json:
    """An error in the form of the path's API; what is no HTTP at all has OpenAI's form everywhere."""
    is_anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
    return _json("An error", {"anyOf": [ref("AnthropicError"), ref("Error")]} if is_anthropic else ref("Error"))


def _json(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _error_statuses(method: str, path: str, takes_body: bool) -> set[int]:
    """400, 403, 404 and 405 can come before a handler runs; a stored answer may be an error of the request that it is of."""
    statuses = {400, 403, 404, 405, 413, 500}
    if path not in OPEN_PATHS:
        statuses |= {401}
    if takes_body:
        statuses |= {415}
    if takes_body or path in ("/health", "/readyz") or path in ADMIN_PATHS:
        statuses |= {503}
    if path == "/reload":
        statuses |= {409}
    if path in ENDPOINTS or path.startswith(("/v1/streams/", "/v1/responses/")):
        statuses |= {409, 410, 429, 503, 504, 507}
    return statuses
