"""An answer that obeys a JSON schema, with the standard library alone.

    python docs/examples/structured_output.py [URL]

Only tokens that continue a valid document can be drawn, so the answer parses, whatever the model. It can still be cut by
`max_tokens`: the lengths in the schema bound it, and `finish_reason` tells.
"""

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,11}$"},
        "work": {"enum": ["baker", "beekeeper", "doctor", "sailor"]},
        "friends": {"type": "array", "items": {"type": "string", "pattern": "^[A-Z][a-z]{2,11}$"}, "maxItems": 3},
    },
    "required": ["name", "work", "friends"],
    "additionalProperties": False,
}
body = {
    "messages": [{"role": "user", "content": "Describe Mina, the beekeeper of Tidewick, as JSON."}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    "temperature": 0,
    "max_tokens": 400,
}
request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as response:
    choice = json.load(response)["choices"][0]
if choice["finish_reason"] != "stop":
    sys.exit(f"the answer was cut: {choice['message']['content']}")
print(json.dumps(json.loads(choice["message"]["content"]), indent=2))
