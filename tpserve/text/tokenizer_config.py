"""Reads the JSON files that configure a tokenizer, independent of the file that holds the vocabulary.

Owns tokenizer_config.json and the older special_tokens_map.json and added_tokens.json. As in transformers, the older files
count only if tokenizer_config.json has no `added_tokens_decoder`. Never knows a vocabulary: `tokenizer` checks added ids.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from tpserve.errors import UserError

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_ROLE = "_token"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty for an absent file. UserError for a broken file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download the model again")
    return content


@dataclass(frozen=True)
class TokenizerConfig:
    """`config`: tokenizer_config.json and the older files. `added`: tokens by id, which extend or replace the vocabulary's."""

    directory: Path
    config: Mapping[str, Any]
    added: Mapping[int, AddedToken]

    @staticmethod
    def of(directory: Path) -> "TokenizerConfig":
        """Read the files, any of which may be absent. UserError names a broken file."""
        config = read_json(directory / CONFIG)
        if (listed := config.get("added_tokens_decoder")) is not None:
            return TokenizerConfig(directory, config, _listed(listed, dict(_named(config)), directory / CONFIG))
        config = config | read_json(directory / SPECIAL)
        named, added = dict(_named(config)), {}
        for content, id in read_json(directory / ADDED).items():
            if type(id) is not int:
                raise UserError(f"{directory / ADDED}: {content!r} must have an id, not {id!r}; download the model again")
            added[id] = AddedToken(content, special=content in named, normalized=content not in named)
        return TokenizerConfig(directory, config, added)

    def roles(self, defaults: Mapping[str, str]) -> dict[str, str]:
        """Special tokens by role ("bos_token": "<s>"), as chat templates see them. A null in the files removes a role."""
        configured = {name: _content(value) for name, value in self.config.items() if name.endswith(_ROLE)}
        roles = {**defaults, **{name: text for name, text in configured.items() if text is not None}}
        return {name: text for name, text in roles.items() if name not in self.config or configured[name] is not None}

    def special(self, roles: Mapping[str, str]) -> Iterator[AddedToken]:
        """Special tokens that are not in `added`: those of `roles`, and those that the files list as special."""
        named = dict.fromkeys(roles.values()) | dict(_named(self.config))
        added = {token.content for token in self.added.values()}
        return (AddedToken(content, **_flags(entry), special=True) for content, entry in named.items() if content not in added)


class Vocabulary(NamedTuple):
    """The content of a vocabulary file. `roles` and `add_bos` are defaults for fields that the JSON files omit.

    `add_bos` None: the vocabulary file itself defines the tokens around a text.
    """

    rust: RustTokenizer
    roles: Mapping[str, str]
    add_bos: bool | None


def _listed(entries: Any, named: Mapping[str, Any], path: Path) -> dict[int, AddedToken]:
    """Parse `added_tokens_decoder`. Tokens in `named` are special, even if their entry does not say so."""
    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else [("", entries)]:
        content = _content(entry)
        if not key.isdecimal() or content is None:
            raise UserError(f"{path}: added_tokens_decoder must map ids to tokens, not {key!r} to {entry!r}; download it again")
        found[int(key)] = AddedToken(content, **_flags(entry), special=content in named or bool(_member(entry, "special")))
    return found


def _named(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(content, entry) of each token that has a role or is listed as special."""
    entries = [value for name, value in config.items() if name.endswith(_ROLE)]
    for extra in map(config.get, _EXTRA):
        entries += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    for entry in entries:
        if (content := _content(entry)) is not None:
            yield content, entry


def _content(entry: Any) -> str | None:
    """A token's text, from a string or an object. None for other values, such as that of add_bos_token."""
    text = _member(entry, "content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _flags(entry: Any) -> dict[str, bool]:
    return {name: bool(_member(entry, name)) for name in _FLAGS}


def _member(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, dict) else None
