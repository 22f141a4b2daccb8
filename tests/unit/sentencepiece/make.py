"""Makes the files beside this one: small tokenizer.model files, and what the reference libraries do with them (cases.json).

    pip install sentencepiece protobuf transformers; python tests/unit/sentencepiece/make.py

Made with sentencepiece 0.2.3 and transformers 5.23. Tests need neither library for them.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORPUS = (
    "The cat sat on the mat and the dog ran after it. A red fox lives near the old mill by the river, and it is not shy. "
    "h\u00e9llo w\u00f6rld na\u00efve \u6f22\u5b57 \u044d\u0442\u043e 12 3.5 code def f(x): return x+1 <cat>"
)
TEXTS = [
    *("", " ", "  ", "The cat", " The cat", "  The cat sat", "The cat ", "  double  spaces  ", "\n", "\n\n\n", "a\nb\r\n\tc"),
    *("h\u00e9llo w\u00f6rld", "e\u0301 a\u0308", "\U0001f389", "\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7"),
    *("\u6f22\u5b57 and \u044d\u0442\u043e", "\u0645\u0631\u062d\u0628\u0627", "\u0928\u092e\u0938\u094d\u0924\u0947"),
    *("\ufb01 \uff21 \u2460 \u00c5", "\u00a0nb\u2003em", "\ufeffbom", "\x00\x07", "\ud7ff\ue000", "a <0x41> b <0x0A>"),
    *("\u2581The", "x\u2581\u2581y", "12345 3.14", "aaaaaaaa aaaa aaaaa", "it's we'll I'M", "def f(x):\n    return x + 1\n"),
    *("<s>The", "The</s> cat", "</s>", "<s> The<unk>x", "<|user|>hi <|end|> there", "<sep>", "a<sep>b", "The<sep> cat"),
]  # fmt: skip
SPECIAL = ("<s>", "</s>", "<unk>", "<sep>", "\u2581")
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
GEMMA = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
ADDED = {
    "0": {"content": "<unk>", "special": True},
    "1": {"content": "<s>", "special": True},
    "2": {"content": "</s>", "special": True},
    "420": {"content": "<|user|>", "special": True, "lstrip": True},
    "421": {"content": "<|end|>", "special": False, "rstrip": True, "normalized": False},
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # name: model, model type, JSON files
    "llama": ("bpe", "llama", {"tokenizer_config": {**LLAMA, "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}}),
    "legacy": (
        *("bpe", "llama"),
        {
            "tokenizer_config": {
                **LLAMA,
                "add_bos_token": True,
                "add_eos_token": True,
                "legacy": True,
                "added_tokens_decoder": ADDED,
            }
        },
    ),
    "older files": (
        *("bpe", "llama"),
        {
            "tokenizer_config": {**LLAMA, "add_bos_token": False, "add_prefix_space": False},
            "special_tokens_map": {"bos_token": {"content": "<s>"}, "pad_token": "<pad>"},
            "added_tokens": {"<pad>": 420, "<|user|>": 421, "<|end|>": 422},
        },
    ),
    "gemma": ("gemma", "gemma2", {"tokenizer_config": {**GEMMA, "add_bos_token": True, "mask_token": None}}),
    "unigram": ("unigram", "", {}),
}


def train() -> None:
    import sentencepiece

    bpe = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True,
           "allow_whitespace_only_pieces": True, "character_coverage": 0.9995}  # fmt: skip
    rules = "\n".join(["FB01\t66 69", "FF21\t41", "2460\t31", "A0\t20", "2003\t20", "9\t20", "A\t20", "D\t20", "FEFF\t20"])
    gemma = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False, "control_symbols": "<start_of_turn>",
             "user_defined_symbols": ["\u2581\u2581", "\u2581\u2581\u2581", "\n\n", "<sep>"]}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "corpus").write_text("\n".join(CORPUS.split(". ") * 40))
        Path(scratch, "rules.tsv").write_text(rules)
        for name, more in {
            "bpe": {**bpe, "user_defined_symbols": "<sep>"},
            "gemma": {**bpe, **gemma},
            "unigram": {
                "normalization_rule_tsv": f"{scratch}/rules.tsv",
                "user_defined_symbols": "<sep>",
                "required_chars": "<>0x41A",  # so that its spelling is not a byte
            },
        }.items():
            sentencepiece.SentencePieceTrainer.train(
                input=f"{scratch}/corpus", model_prefix=f"{scratch}/{name}", vocab_size=420, hard_vocab_limit=False,
                byte_fallback=True, minloglevel=2, **more,
            )  # fmt: skip
            shutil.copy(f"{scratch}/{name}.model", HERE)


def by_transformers(model: str, model_type: str, files: dict[str, Any]) -> list[Any]:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(HERE / f"{model}.model", Path(scratch, "tokenizer.model"))
        for name, content in {**files, "config": {"model_type": model_type}}.items():
            Path(scratch, f"{name}.json").write_text(json.dumps(content))
        theirs = AutoTokenizer.from_pretrained(scratch)
        encoded = [(text, theirs.encode(text)) for text in TEXTS]
        return [[text, ids, theirs.decode(ids, skip_special_tokens=True), theirs.decode(ids)] for text, ids in encoded]


def by_sentencepiece(model: str) -> list[Any]:
    """Without the texts that it reads otherwise than transformers: those that spell special or user-defined tokens."""
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(str(HERE / f"{model}.model"))
    texts = [text for text in TEXTS if not any(word in text for word in SPECIAL)]
    encoded = [(text, theirs.encode(text)) for text in texts]
    return [[text, [theirs.bos_id(), *ids], theirs.decode(ids), theirs.decode(ids)] for text, ids in encoded]


if __name__ == "__main__":
    train()
    cases = [
        {"name": name, "model": model, "files": files,
         "texts": by_transformers(model, model_type, files) if model_type else by_sentencepiece(model)}
        for name, (model, model_type, files) in CASES.items()
    ]  # fmt: skip
    (HERE / "cases.json").write_text(json.dumps(cases, indent=0) + "\n")
