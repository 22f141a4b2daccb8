"""The committed model: complete, small, standard in its files, and able to speak of its world."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer as RustTokenizer

from tpserve import builtin
from tpserve.builtin import stories, train
from tpserve.builtin.dialogues import dialogue
from tpserve.builtin.world import Dice
from tpserve.config import model_config
from tpserve.errors import UserError
from tpserve.models import model_spec
from tpserve.text.chat import ChatTemplate
from tpserve.text.tokenizer import Tokenizer

DIRECTORY = builtin.path()
MAX_BYTES = 10_000_000
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
LOSS_BOUND = 0.4
"""Nats a token on held-out text; a model that knows the words but mixes up the world is above."""


@cache
def model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DIRECTORY)


@cache
def lexicon() -> set[str]:
    """The words of the generator's text; prose, and what Wick says in chat."""
    dice, found = Dice(2), set()
    for _ in range(3000):
        found |= words(stories.tale(dice))
        found |= words(" ".join(message["content"] for message in dialogue(dice) if message["role"] == "assistant"))
    return found


def words(text: str) -> set[str]:
    return set(re.findall(r"[\w']+", text.lower()))


def continued(prompt: str, num_tokens: int, temperature: float = 0.0) -> tuple[list[int], str]:
    """What follows the prompt, up to the end of the text."""
    ids = torch.tensor([tokenizer().encode(prompt, add_special_tokens=not prompt.startswith(train.BEGIN))])
    torch.manual_seed(1)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    out = model().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, pad_token_id=1, **how)
    new = out[0, ids.shape[1] :].tolist()
    return new, tokenizer().decode(new)


def chat(*turns: str, system: str | None = None, num_tokens: int = 200) -> str:
    """The answer to the last turn; it must end by itself."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    ids, text = continued(ChatTemplate.load(DIRECTORY, tokenizer().special_tokens).render(messages), num_tokens)
    assert ids[-1] == train.CONFIG["eos_token_id"], f"no end: {text}"
    return text


def test_files_are_all_there_and_small() -> None:
    assert all((DIRECTORY / name).is_file() for name in FILES)
    assert (DIRECTORY / "model.safetensors").stat().st_size <= MAX_BYTES
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= MAX_BYTES


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, tpserve.builtin as b; b.path(); sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_say_what_the_training_script_says() -> None:
    assert json.loads((DIRECTORY / "config.json").read_text()) == train.CONFIG
    assert json.loads((DIRECTORY / "tokenizer_config.json").read_text()) == train.TOKENIZER_CONFIG
    assert train.train_tokenizer().to_str() == RustTokenizer.from_file(str(DIRECTORY / "tokenizer.json")).to_str()


def test_weights_are_bfloat16_and_those_of_the_config() -> None:
    with safe_open(DIRECTORY / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert all(weights.get_slice(name).get_dtype() == "BF16" for name in names)
        assert weights.get_slice("model.embed_tokens.weight").get_shape() == [2048, 256]
    assert names == {name for name in train.new_model().state_dict() if name != "lm_head.weight"}


def test_sizes_allow_four_ranks_each_way() -> None:
    spec = model_spec(model_config.read(DIRECTORY), str(DIRECTORY))
    assert (spec.family, spec.dtype, spec.tie_embeddings) == ("llama", "bfloat16", True)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_position) == (4, 8, 4, 32, 2048)
    assert (spec.bos_id, spec.eos_ids, spec.vocab_size) == (0, (1,), tokenizer().vocab_size)


def test_transformers_reads_the_directory() -> None:
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(DIRECTORY).model_type == "llama"
    theirs, messages = AutoTokenizer.from_pretrained(DIRECTORY), [{"role": "user", "content": " Who keeps the lighthouse? "}]
    text = "The baker's cat: Crumb, 12 + 7."
    assert theirs(text).input_ids == tokenizer().encode(text)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == ChatTemplate.load(DIRECTORY, tokenizer().special_tokens).render(messages)
    assert rendered == "<|begin|><|user|>Who keeps the lighthouse?<|end|><|assistant|>"


def test_chat_template_refuses_other_roles() -> None:
    with pytest.raises(UserError, match="roles are system, user, assistant and tool, not critic"):
        ChatTemplate.load(DIRECTORY, tokenizer().special_tokens).render([{"role": "critic", "content": "7"}])


@settings(max_examples=40, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    assert text != text.encode("utf-8", "ignore").decode() or tokenizer().decode(ids, skip_special_tokens=False) == text
    assert tokenizer().encode(text) == [0, *ids]


@pytest.mark.parametrize("prompt", ["Once upon a time", "The lighthouse keeper", "In Tidewick", "It was a", "My name is"])
def test_completions_are_words_of_the_world(prompt: str) -> None:
    for temperature in (0.0, 0.8):
        ids, text = continued(prompt, 80, temperature)
        whole = text if ids[-1] == 1 else text.rpartition(" ")[0]  # the last word may be unfinished
        assert len(whole.split()) >= 5
        assert words(prompt + whole) <= lexicon(), text


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ("Who keeps the lighthouse?", "Ada"),
        ("Who is the baker?", "Clara"),
        ("What does a goose say?", "honk"),
        ("What is the name of Hugo's horse?", "Cinder"),
        ("Hello!", "Hello|Good day"),
        ("What is your name?", "Wick"),
        ("When is Lantern Night?", "autumn"),
    ],
)
def test_chat_knows_its_world(question: str, says: str) -> None:
    text = chat(question)
    assert re.search(says, text), text
    assert words(text) <= lexicon()


def test_chat_follows_the_conversation() -> None:
    assert "bakery" in chat("Who is Clara?", "Clara is the baker of Tidewick.", "And where does she work?")


def test_chat_tells_a_story_about_what_was_asked() -> None:
    text = chat("Tell me a story about a cat.", num_tokens=400)
    assert "cat" in words(text) <= lexicon()
    assert len(text.split()) > 60


@pytest.mark.parametrize(
    "question", ["What is the capital of France?", "How do I build a rocket?", "Who invented the telephone?"]
)
def test_chat_says_what_it_does_not_know(question: str) -> None:
    text = chat(question)
    assert words(text) <= lexicon()
    assert re.search("do not know|never heard|nobody in Tidewick|I only know", text), text


def test_held_out_loss() -> None:
    rust = RustTokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    loss = train.held_out_loss(model(), rust, 40)["all"]
    assert 0.15 < loss < LOSS_BOUND, "below the entropy of the generator's own dice, the held-out text was seen in training"


def test_docs_state_the_loss_of_this_model() -> None:
    report = json.loads((DIRECTORY / "training.json").read_text())
    page = (Path(__file__).parents[2] / "docs" / "builtin-model.md").read_text()
    loss = report["held_out_loss"]
    assert f"| {loss['prose']} | {loss['chat']} | {loss['all']} |" in page
    assert f"{report['tokens']:,} tokens" in page


def test_docs_quote_what_the_model_says() -> None:
    """The greedy answers to questions of fact, word for word."""
    page = (Path(__file__).parents[2] / "docs" / "builtin-model.md").read_text()
    quoted = re.findall(r"^\| ([A-Z][^|]*[?!.]) \| ([^|]+) \|$", page, re.MULTILINE)
    assert len(quoted) >= 5
    assert [chat(question) for question, _ in quoted] == [answer for _, answer in quoted]
