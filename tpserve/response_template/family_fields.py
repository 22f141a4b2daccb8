"""Fields of the `response_template` of families whose format says too little: what their models write beside what they should.

Facts of the models: their cards and chat templates.
"""

import re
from collections.abc import Mapping
from typing import Any

from tpserve.response_template.format import KEY, TYPE, TaggedArguments
from tpserve.response_template.spec import START

HARMONY_CALL = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
_TURN = r"(?:<\|start\|>assistant)?\s*"
_TO = r"to=(?:functions\.(?P<name>[\w.:/-]{1,256})|(?P<name>\w{1,128}\.[\w.]{1,128}))\s*"
_WORD = r"\w{1,32}"
HARMONY_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "thinking": {
        "open_pattern": _TURN + r"<\|channel\|>analysis\s*<\|message\|>",
        "close_pattern": r"<\|end\|>|(?=<\|start\|>|<\|channel\|>)",
        "content": "text",
        "repeats": True,
        "join": "\n",
    },
    "content": {
        "open_pattern": _TURN + r"<\|channel\|>(?:final|commentary)\s*(?:<\|constrain\|>\s*\w{1,32}\s*)?(?:<\|message\|>|(?=\{))",
        "close_pattern": r"<\|end\|>|<\|return\|>|<\|call\|>|(?=<\|start\|>|<\|channel\|>)",
        "content": "text",
        "repeats": True,
        "join": "\n",
    },
    "tool_calls": {
        "open_pattern": _TURN
        + rf"(?:{_TO}<\|channel\|>{_WORD}|<\|channel\|>{_WORD}\s+{_TO})\s*(?:(?:<\|constrain\|>)?\s*{_WORD}\s*)?<\|message\|>",
        "close_pattern": r"<\|call\|>|<\|end\|>|(?=<\|start\|>|<\|channel\|>)",
        "repeats": True,
        "content": "json",
        "transform": HARMONY_CALL,
    },
}
GEMMA_CALL = {
    "open_pattern": r"\s*<\|tool_call>\s*call:(?P<name>[\w.:/-]{1,256})\s*(?=\{)",
    "close_pattern": r"\s*<tool_call\|>\s*",
    "repeats": True,
    "content": "json",
    "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
    "transform": HARMONY_CALL,
}
GEMMA_VALUES = TaggedArguments("", ":", "", ",", mark='<|"|>', sorts=True)
FUNCTIONGEMMA_CALL = {
    "open_pattern": r"\s*<start_function_call>\s*call:(?P<name>[\w.:/-]{1,256})\s*\{",
    "close_pattern": r"\s*\}?\s*<end_function_call>\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"(?P<key>[^\s,:<>{}]{1,256})\s*:\s*<escape>(?P<value>.*?)<escape>",
        "tag_end": "<escape>",
    },
    "transform": HARMONY_CALL,
}
MUSE_CONTENT = {"open_pattern": r"\s*to=user\s*<\|message\|>", "close": "<|eom|>", "content": "text"}
MUSE_CALL = {
    "open_pattern": r"(?:<\|eom\|>)?(?:<\|start\|>assistant)?\s*(?:to=[\w.:/-]+\s*<\|message\|>)?\s*(?:<atem:function_calls>)?\s*"
    r"<atem:invoke name=\"(?P<name>[^\"]{1,256})\">",
    "close_pattern": r"\s*</atem:invoke>(?:\s*</atem:function_calls>)?(?:\s*<\|eom\|>)?\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<atem:parameter name=\"(?P<key>[^\"]{1,256})\"[^<>]{0,256}>(?P<value>.*?)</atem:parameter>",
        "tag_end": "</atem:parameter>",
    },
    "transform": HARMONY_CALL,
}
KIMI_K3_TAGS = TaggedArguments(
    '<|open|>argument key="', '" type="string"<|sep|>', "<|close|>argument<|sep|>", "", f'" type="{TYPE}"<|sep|>'
)
KIMI_K3_CONTENT = {"close_pattern": r"<\|close\|>response<\|sep\|>(?:<\|close\|>message<\|sep\|>)?", "content": "text"}
KIMI_K3_CALL = {
    "open_pattern": r"(?:<\|close\|>response<\|sep\|>)?\s*(?:<\|open\|>tools<\|sep\|>)?\s*"
    r"<\|open\|>call tool=\"(?P<name>[^\"]{1,256})\"[^<>]{0,256}<\|sep\|>",
    "close_pattern": r"<\|close\|>call<\|sep\|>(?:\s*<\|close\|>tools<\|sep\|>(?:\s*<\|close\|>message<\|sep\|>)?)?\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<\|open\|>argument key=\"(?P<key>[^\"]{1,256})\"[^<>]{0,256}<\|sep\|>"
        r"(?P<value>.*?)<\|close\|>argument<\|sep\|>",
        "tag_end": r"<\|close\|>argument<\|sep\|>",
    },
    "transform": HARMONY_CALL,
}
M3 = "]<]minimax[>["
"""Stands before every tag of MiniMax M3's calls."""
M3_TAGS = TaggedArguments(f"{M3}<", ">", f"{M3}</{KEY}>", item="item")
MINIMAX_M3_CALL = {
    "open_pattern": rf"\s*(?:{re.escape(M3)}<tool_call>\s*)?{re.escape(M3)}<invoke\s+name=\"(?P<name>[^\"]{{1,256}})\"\s*>",
    "close_pattern": rf"\s*{re.escape(M3)}</invoke>(?:\s*{re.escape(M3)}</tool_call>)?\s*",
    "repeats": True,
    "content": "nested-tags",
    "content_args": {"marker": M3},
    "transform": HARMONY_CALL,
}
MINICPM_CALL = {
    "open_pattern": r"\s*<function\s+name=\"(?P<name>[^\"]{1,256})\"\s*>",
    "close_pattern": r"\s*</function>\s*",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<param\s+name=\"(?P<key>[^\"]{1,256})\"\s*>(?:<!\[CDATA\[(?P<value>.*?)\]\]>|(?P<value>.*?))</param>",
        "tag_end": "</param>",
    },
    "transform": HARMONY_CALL,
}
KIMI_K2_CALL = {
    "open_pattern": r"\s*(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*"
    r"(?P<id>(?:functions\.)?(?P<name>[\w./-]{1,256}?)(?::\d{1,9})?)\s*<\|tool_call_argument_begin\|>\s*(?=\{)",
    "close_pattern": r"\s*<\|tool_call_end\|>(?:\s*<\|tool_calls_section_end\|>)?\s*",
    "repeats": True,
    "content": "json",
    "transform": {"id": "{id}", **HARMONY_CALL},
}
MISTRAL_CALL = {
    "open_pattern": r"\s*(?:\[TOOL_CALLS\]\s*){1,4}(?:(?P<name>[\w.:/-]{1,256}?)\s*"
    r"(?:\[CALL_ID\]\s*(?P<id>\w{1,64})\s*|(?P<id>))(?:\[ARGS\]\s*)?(?=\{)|(?=\[\s*\{|\{\s*\"))",
    "close_pattern": r"(?=\s*\[TOOL_CALLS\])",
    "repeats": True,
    "content": "json",
    "transform": {"id": "{id}", **HARMONY_CALL},
}
"""All that Mistral's models have had since V3: a list, or a name with or without [CALL_ID] and [ARGS]."""
_OBJECT = r"\{\s*\"(?:name|arguments|parameters|id|type)\""
LLAMA_CALL = {
    "open_pattern": rf"(?:{START}\s*(?:<\|python_tag\|>)?|\s*<\|python_tag\|>|(?<=\}})\s*;)\s*(?={_OBJECT})",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.parameters}"}},
}
PYTHONIC_CALLS = {
    "open_pattern": rf"(?:{START}\s*(?:<\|python_start\|>)?|\s*<\|python_start\|>)\s*(?=\[\s*[A-Za-z_][\w.-]{{0,256}}\()",
    "close_pattern": r"\s*<\|python_end\|>\s*",
    "content": "python-call-list",
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
    "transform_each": True,
}
GRANITE_CALLS = {
    "open_pattern": r"\s*(?:<\|tool_call\|>|<tool_call>)\s*(?=\[)",
    "content": "json",
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
    "transform_each": True,
}
GRANITE_THINKING = {
    "open_pattern": r"Here(?: is|'s) my thought process:",
    "close_pattern": r"Here(?: is|'s) my response:",
    "content": "text",
}
