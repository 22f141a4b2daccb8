"""Renders small conversations with words that no chat template contains, and compares what it got.

A template is untrusted: what it renders is bounded in size, and the renderings in number, after which it counts as refusing.
Comparisons go by atoms, so that no tag and no word is cut: "<a></b>" and "<c></b>" end alike in "</b>" only.
"""

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tpserve.errors import UserError
from tpserve.response_template.format import INDEX
from tpserve.text.chat import ChatTemplate

MAX_CHARS = 1 << 20
MAX_RENDERINGS = 256
USER = "Uqopzix"
CONTENT = "Cwaxhuv"
REASONING = "Rjyfqel"
RESULT = "Tkovzug"
NAMES = ("gpaxu_fow", "hbizo_qet")
KEYS = ("kevmox", "ladquf")
VALUES = ("Vorgyx", "Wisjep")
TOOLS: tuple[Mapping[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Zenqub",
            "parameters": {"type": "object", "properties": {key: {"type": "string", "description": "Yutbim"} for key in KEYS}},
        },
    }
    for name in NAMES
)
ATOM = re.compile(r"<[^<>\s]{1,64}>|\[/?[A-Z_]+\]|\w+|.", re.DOTALL)


class Probe:
    """A chat template; a rendering is None when the template refuses it."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._renderings = 0

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = TOOLS,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str | None:
        """The whole text; `prompt` opens the assistant's turn."""
        if self._renderings == MAX_RENDERINGS:
            return None
        self._renderings += 1
        try:
            text = self._template.render(messages, add_generation_prompt=prompt, tools=tools, variables=variables)
        except UserError:
            return None
        return text if len(text) <= MAX_CHARS else None

    def turn(self, message: Mapping[str, Any], variables: Mapping[str, Any] = MappingProxyType({})) -> str:
        """The text after the user's words, when the assistant answers with `message`. Empty when refused."""
        return after(self.render([user(), {"role": "assistant", **message}], variables=variables), USER)

    def opening(self, *, prompt: bool = True, variables: Mapping[str, Any] = MappingProxyType({})) -> str:
        """The text after the user's words before the assistant answers. Empty when refused."""
        return after(self.render([user()], prompt=prompt, variables=variables), USER)


def answer_in(turn: str, header: str, anchor: str) -> str | None:
    """The answer in the text after the user's words: behind `header`, or at least behind `anchor`. None when it has neither."""
    if turn.startswith(header):
        return turn[len(header) :]
    at = turn.find(anchor) if anchor.strip() else -1
    return turn[at + len(anchor) :] if at >= 0 else None


def user() -> dict[str, Any]:
    """The user's message."""
    return {"role": "user", "content": USER}


def after(text: str | None, word: str) -> str:
    """The text after the last `word`; empty when it is not there."""
    return text[at + len(word) :] if text is not None and (at := text.rfind(word)) >= 0 else ""


def common_prefix(first: str, second: str) -> str:
    """The atoms that both begin with; a number 0 in the first and 1 in the second is INDEX."""
    return "".join(_common(ATOM.findall(first), ATOM.findall(second)))


def common_suffix(first: str, second: str) -> str:
    """The atoms that both end with, as in `common_prefix`."""
    return "".join(reversed(_common(ATOM.findall(first)[::-1], ATOM.findall(second)[::-1])))


def _common(first: Sequence[str], second: Sequence[str]) -> list[str]:
    common = []
    for one, other in zip(first, second, strict=False):
        if one != other and (one, other) != ("0", "1"):
            break
        common.append(one if one == other else INDEX)
    return common


def without_prefix(text: str, prefix: str) -> str:
    """The text after as many characters as `prefix` has, in which INDEX stands for one digit."""
    return text[len(prefix.replace(INDEX, "0")) :]


def without_suffix(text: str, suffix: str) -> str:
    """The text before `suffix`, counted as in `without_prefix`."""
    return text[: len(text) - len(suffix.replace(INDEX, "0"))]
