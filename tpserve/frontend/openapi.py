"""GET /openapi.json and /docs: the routes as OpenAPI 3.1, made from the router and the structs that check bodies.

A body's schema is what msgspec accepts, and null for every field, as the API does. Fields that are not there are warnings, so
`additionalProperties` is open; known fields that are refused are in docs/http.md. `openapi_answers` has the answers.
"""

import functools
import html
import json
import re
from typing import Any

import msgspec
from aiohttp import web

from tpserve.frontend.admin_routes import AbortRequest
from tpserve.frontend.anthropic.schema import MessageInput
from tpserve.frontend.endpoints import ENDPOINTS
from tpserve.frontend.openai.schema import DetokenizeRequest, TokenizeChatRequest, TokenizeRequest
from tpserve.frontend.openai.service import SERVICE
from tpserve.frontend.openapi_answers import QUERIES, SCHEMAS, responses
from tpserve.frontend.responses.schema import InputFields
from tpserve.version import __version__

Json = dict[str, Any]
BODIES: dict[str, tuple[type[msgspec.Struct], ...]] = {
    **{path: (endpoint.schema,) for path, endpoint in ENDPOINTS.items()},
    "/tokenize": (TokenizeRequest, TokenizeChatRequest),
    "/detokenize": (DetokenizeRequest,),
    "/v1/messages/count_tokens": (MessageInput,),
    "/v1/responses/input_tokens": (InputFields,),
    "/abort_request": (AbortRequest,),
}
"""The structs that the body of a POST may be."""
TOKENS: Json = {"type": "array", "items": {"type": "integer", "minimum": 0}}
ROLE: Json = {"type": "object", "required": ["role"], "properties": {"role": {"type": "string", "minLength": 1}}}
TURN: Json = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object", "required": ["type"]}}]},
    },
}
MEMBERS: dict[str, dict[str, Json]] = {
    "CompletionRequest": {
        "prompt": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [{"type": "string"}, TOKENS]}}, TOKENS]}
    },
    "DetokenizeRequest": {"tokens": TOKENS},
    "ChatCompletionRequest": {"messages": {"items": ROLE}},
    "TokenizeChatRequest": {"messages": {"items": ROLE}},
    "MessageInput": {"messages": {"items": TURN}},
    "MessageRequest": {"messages": {"items": TURN}},
}
"""What the handlers demand of fields beyond the types of their structs, by the struct and the field."""
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>tpserve: routes</title><style>body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}
pre{overflow:auto;background:#8881;padding:1rem}summary{cursor:pointer}:root{color-scheme:light dark}</style><h1>Routes</h1>
<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


def specification(app: web.Application, root_path: str) -> Json:
    """The OpenAPI document of the application's routes, which lie under `root_path`."""
    structs = sorted({struct for bodies in BODIES.values() for struct in bodies}, key=lambda struct: struct.__name__)
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    for struct, schema in components.items():
        for name, members in MEMBERS.get(struct, {}).items():
            schema["properties"][name] |= members
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": list(app[SERVICE].names)}
        if "logit_bias" in schema.get("properties", {}):
            schema["properties"]["logit_bias"]["propertyNames"] = {"pattern": "^[0-9]{1,9}$"}
        required = schema.get("required", ())
        schema["properties"] = {
            name: field if name in required else _or_null(field) for name, field in schema.get("properties", {}).items()
        }
    components |= SCHEMAS
    paths: dict[str, Json] = {}
    for route in app.router.routes():
        resource = route.resource
        if resource is None or route.method not in ("GET", "POST", "DELETE"):
            continue
        path = re.sub(r"\{(\w+):[^}]*\}", r"{\1}", resource.canonical)
        paths.setdefault(path, {})[route.method.lower()] = _operation(path, route.method, (route.handler.__doc__ or "").strip())
    return {
        "openapi": "3.1.0",
        "info": {"title": "tpserve", "version": __version__},
        "servers": [{"url": root_path or "/"}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"header": []}, {}],
    }


def _operation(path: str, method: str, text: str) -> Json:
    _, _, summary = text.partition(": ")
    takes_body = method == "POST" and path in BODIES
    operation: Json = {
        "summary": " ".join(summary.split()),
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_"),
        "responses": responses(method, path, takes_body),
    }
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"\{(\w+)\}", path)
    ]
    if parameters := [*in_path, *({"in": "query", **query} for query in QUERIES.get((method, path), ()))]:
        operation["parameters"] = parameters
    if takes_body:
        schemas = [{"$ref": f"#/components/schemas/{struct.__name__}"} for struct in BODIES[path]]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _or_null(schema: Json) -> Json:
    """A field that may be null, which stands for its default."""
    if schema.get("type") == "null" or any(each.get("type") == "null" for each in schema.get("anyOf", ())):
        return schema
    outer: Json = {name: schema[name] for name in ("default", "description") if name in schema}
    inner = {name: value for name, value in schema.items() if name not in outer}
    return {**outer, "anyOf": [inner, {"type": "null"}]}


def page(document: Json) -> str:
    """The same for people, without scripts."""
    parts = [HEAD]
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            summary = html.escape(operation["summary"])
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{summary}</p>\n")
            for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(operation.get("requestBody", {}))):
                shown = html.escape(json.dumps(schemas[name], indent=1))
                parts.append(f"<details><summary>The body: {name}</summary><pre>{shown}</pre></details>\n")
    return "".join(parts)


def add_routes(app: web.Application, root_path: str) -> None:
    """Add GET /openapi.json and GET /docs; after all other routes."""

    @functools.cache
    def document() -> Json:
        return specification(app, root_path)

    async def openapi(_request: web.Request) -> web.Response:
        """GET /openapi.json: this document."""
        return web.Response(body=msgspec.json.encode(document()), content_type="application/json")

    async def docs(_request: web.Request) -> web.Response:
        """GET /docs: the routes, for people."""
        return web.Response(text=page(document()), content_type="text/html", headers={"Content-Security-Policy": POLICY})

    app.router.add_get("/openapi.json", openapi)
    app.router.add_get("/docs", docs)
