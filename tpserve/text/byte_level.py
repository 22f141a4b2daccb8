"""Builds a Rust tokenizer from vocab.json and merges.txt: byte-level BPE (GPT-2, Radford et al. 2019).

The two files do not contain the rule that splits a text into words before the merges. The tokenizer class determines it, by
its name in tokenizer_config.json or else by the model type. Owns that table, and the characters that spell bytes.
"""

from collections.abc import Mapping
from typing import NamedTuple

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from tpserve.errors import UserError
from tpserve.text.tokenizer_config import CONFIG, TokenizerConfig, Vocabulary, read_json

FILES = ("vocab.json", "merges.txt")
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class _TokenizerClass(NamedTuple):
    """`words`: the pattern that splits a text into words; None: GPT-2's."""

    words: str | None
    roles: Mapping[str, str]
    add_bos: bool = False


_END = "<|endoftext|>"
_GPT2 = _TokenizerClass(None, {"bos_token": _END, "eos_token": _END, "unk_token": _END})
_QWEN2 = _TokenizerClass(QWEN_WORDS, {"eos_token": _END, "unk_token": _END, "pad_token": _END})
_OPT = _TokenizerClass(None, {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}, add_bos=True)
_CLASSES = {"GPT2Tokenizer": _GPT2, "Qwen2Tokenizer": _QWEN2}
_TYPES = {"gpt2": _GPT2, "opt": _OPT} | dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _QWEN2)


def load(tokenizer_config: TokenizerConfig) -> Vocabulary:
    """Read both files of a directory. UserError for a broken file or an unknown tokenizer class."""
    vocab, merges = (tokenizer_config.directory / name for name in FILES)
    kind = _class(tokenizer_config)
    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the Rust library raises bare Exception for every broken file
        raise UserError(f"{vocab} and {merges.name} are no byte-level BPE: {error}; download the model again") from error
    rust = RustTokenizer(model)
    prefix = bool(tokenizer_config.config.get("add_prefix_space"))
    if kind.words is None:
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        rust.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(kind.words), behavior="isolated")
        rust.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)])
    rust.decoder = decoders.ByteLevel()
    return Vocabulary(rust, kind.roles, kind.add_bos)


def _class(tokenizer_config: TokenizerConfig) -> _TokenizerClass:
    name = str(tokenizer_config.config.get("tokenizer_class") or "")
    if (known := _CLASSES.get(name.removesuffix("Fast"))) is not None:
        return known
    config = read_json(tokenizer_config.directory / "config.json")
    if not name and (known := _TYPES.get(str(config.get("model_type")))) is not None:
        return known
    what = f"{CONFIG} names {name}" if name else f"neither {CONFIG} nor config.json names its class"
    raise UserError(
        f"{tokenizer_config.directory} has its tokenizer in {' and '.join(FILES)}, and {what}: known are {', '.join(_CLASSES)}; "
        "make a tokenizer.json with transformers' AutoTokenizer.save_pretrained, or name another with --tokenizer"
    )


def byte_alphabet() -> dict[str, int]:
    """The characters that spell bytes in byte-level BPE: printable bytes spell themselves, the others map to characters above
    255, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


BYTE_OF = byte_alphabet()
