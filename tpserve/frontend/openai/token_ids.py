"""Checks of a client's token ids. Each is one pass in C, since there may be hundreds of thousands."""

from collections.abc import Sequence
from typing import Any

from tpserve.errors import UserError
from tpserve.frontend.openai.errors import shown
from tpserve.frontend.openai.service import ModelLimits
from tpserve.text.tokenizer import Tokenizer


def check_ids(ids: Sequence[Any], vocab_size: int, param: str) -> None:
    """UserError unless all `ids` are integers in [0, vocab_size)."""
    if not ids:
        return
    if others := set(map(type, ids)) - {int}:
        names = ", ".join(sorted(kind.__name__ for kind in others))
        raise UserError(f"{param}: expected token ids or texts, got {names} among them", param=param, code="invalid_value")
    for token in (min(ids), max(ids)):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"{param}: token id {shown(token)} is out of vocabulary: the model has {vocab_size} ids",
                param=param,
                code="invalid_value",
            )


def refuse_unknown(ids: Sequence[int], tokenizer: Tokenizer, limits: ModelLimits, param: str) -> None:
    """UserError for a token of the tokenizer without an embedding in the model, such as a padding token that was added later."""
    if (token := max(ids)) >= limits.vocab_size:
        raise UserError(
            f"{param}: the model has no token {tokenizer.piece(token)!r} (id {token} of its tokenizer, vocabulary of "
            f"{limits.vocab_size}); leave it out",
            param=param,
            code="invalid_value",
        )
