"""Fill in the middle: the prompt for a text between a prefix and a suffix, with the special tokens of the model's family.

Source: Bavarian et al. 2022, arXiv:2207.14255; the order prefix, suffix, middle (PSM).
"""

from tpserve.errors import UserError
from tpserve.text.tokenizer import Tokenizer

FORMS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma, Granite
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, SmolLM
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
)
"""What stands before the prefix, before the suffix and before the middle."""


def fill_in_form(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the tokens before prefix, suffix and middle. UserError for a model that has none."""
    for form in FORMS:
        before_prefix, before_suffix, before_middle = (tokenizer.id_of(name) for name in form)
        if before_prefix is not None and before_suffix is not None and before_middle is not None:
            return before_prefix, before_suffix, before_middle
    raise UserError(
        "suffix: this model's tokenizer has no tokens for filling in, such as <|fim_middle|>; leave it out",
        param="suffix",
        code="unsupported_parameter",
    )


def fill_in_ids(tokenizer: Tokenizer, prefix: str, suffix: str, add_special_tokens: bool) -> list[int]:
    """The ids of the whole prompt: what the tokenizer begins a text with, then prefix and suffix with their tokens."""
    before_prefix, before_suffix, before_middle = fill_in_form(tokenizer)
    bos = None if tokenizer.bos_token is None else tokenizer.id_of(tokenizer.bos_token)
    begin = [id for id in tokenizer.encode("", add_special_tokens)[:1] if id == bos]
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in (prefix, suffix)]
    return [*begin, before_prefix, *texts[0], before_suffix, *texts[1], before_middle]
