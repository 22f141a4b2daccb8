"""A small agent, with the standard library alone: the model calls a function of this program until it can answer.

    python docs/examples/tool_loop.py [URL]

The first call is required, which makes even a small model call; with a model that was trained on tools "auto" is enough.
"""

import json
import sys
import urllib.request
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
DOORS = {"Mina": "yellow", "Ines": "blue", "Elsa": "green"}
FUNCTIONS = {"door_color": lambda name: DOORS[name]}
NAMES = {"type": "object", "properties": {"name": {"enum": list(DOORS)}}, "required": ["name"], "additionalProperties": False}
TOOL = {"name": "door_color", "description": "The color of somebody's door.", "parameters": NAMES, "strict": True}


def ask(messages: list[dict[str, Any]], tool_choice: str) -> dict[str, Any]:
    """The model's next message: words, or calls of functions."""
    body: dict[str, Any] = {"messages": messages, "tools": [{"type": "function", "function": TOOL}], "tool_choice": tool_choice}
    body |= {"parallel_tool_calls": False, "temperature": 0, "max_tokens": 200}
    request = urllib.request.Request(
        f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        message: dict[str, Any] = json.load(response)["choices"][0]["message"]
    return message


messages: list[dict[str, Any]] = [{"role": "user", "content": "Which color has the door of Mina?"}]
for turn in range(5):
    answer = ask(messages, "auto" if turn else "required")
    messages.append(answer)
    for call in answer.get("tool_calls") or []:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        result = FUNCTIONS[name](**arguments)
        print(f"{name}({arguments}) is {result}")
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(result)})
    if not answer.get("tool_calls"):
        break
print(answer["content"])
