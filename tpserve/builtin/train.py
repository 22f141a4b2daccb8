"""Trains the built-in model: `python -m tpserve.builtin.train`. Generates the text, trains tokenizer and model, saves both.

Owns the model's sizes, the chat template and the training. Never runs while serving; needs transformers, unlike serving.
Everything is a function of SEED; the weights agree between machines up to the order of floating-point sums. The recipe:
Muon (Jordan et al. 2024; arXiv:2502.16982 for its scale) and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), linear
warm-up and cosine decay, packed documents, each seen once.
Letters in names: B sequences, L tokens of a sequence.
"""

import argparse
import json
import math
import sys
import time
from array import array
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tpserve.builtin import NAME, path
from tpserve.builtin.dialogues import dialogue
from tpserve.builtin.stories import tale
from tpserve.builtin.world import Dice

SEED = 1
TOKENS = 5_000_000
VOCAB_SIZE = 2048
BATCH_TOKENS = 2048
LENGTHS = ((0.6, 256), (0.9, 512), (1.0, 2048))
"""(end of a phase as a fraction of the training, sequence length in tokens)"""
PEAK_RATE = 5e-3
WARM_UP_STEPS = 100
HELD_OUT_DOCUMENTS = 600
TOKENIZER_DOCUMENTS = 8000

BEGIN, END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- set asked = messages[0].content | trim if messages and messages[0].role == 'system' else '' %}"
    "{%- if tools %}"
    "{{- '<|system|>' ~ (asked ~ '\n' if asked else '') ~ 'Functions:\n' }}"
    "{%- for tool in tools %}{{- tool.function | tojson ~ '\n' }}{%- endfor %}"
    '{{- \'A call: <tool_call>\n{"name": NAME, "arguments": {...}}\n</tool_call>\' ~ eos_token }}'
    "{%- elif asked %}{{- '<|system|>' ~ asked ~ eos_token }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' or message.role == 'user' %}"
    "{{- '<|' ~ message.role ~ '|>' ~ (message.content or '') | trim }}"
    "{%- for call in message.tool_calls or () %}"
    "{{- '<tool_call>\n{\"name\": ' ~ call.function.name | tojson ~ ', \"arguments\": ' ~ call.function.arguments | tojson }}"
    "{{- '}\n</tool_call>' ~ ('' if loop.last else '\n') }}"
    "{%- endfor %}{{- eos_token }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|user|><tool_response>\n' ~ message.content | trim ~ '\n</tool_response>' ~ eos_token }}"
    "{%- elif message.role != 'system' %}"
    "{{- raise_exception('roles are system, user, assistant and tool, not ' ~ message.role) }}"
    "{%- elif not loop.first %}{{- '<|system|>' ~ message.content | trim ~ eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
"""Text as in training for conversations without tools; for those with tools, a form that many models have."""

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": SPECIAL.index(BEGIN),
    "eos_token_id": SPECIAL.index(END),
    "dtype": "bfloat16",
}
GENERATION_CONFIG = {name: CONFIG[name] for name in ("bos_token_id", "eos_token_id")}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BEGIN,
    "eos_token": END,
    "model_max_length": CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}


@cache
def chat_template() -> jinja2.Template:
    """The compiled chat template."""
    template: jinja2.Template = jinja2.Template(CHAT_TEMPLATE)
    return template


def document(dice: Dice) -> str:
    """One complete text: prose, chat, or (for questions in completion requests) a conversation without roles."""
    kind = dice.number(1, 100)
    if kind <= 42:
        return f"{BEGIN}{tale(dice)}{END}"
    messages = dialogue(dice)
    if kind <= 47:
        return BEGIN + " ".join(message["content"] for message in messages if message["role"] != "system") + END
    return chat_template().render(messages=messages, bos_token=BEGIN, eos_token=END)


def documents(seed: int, held_out: bool = False) -> Iterator[str]:
    """An endless sequence of documents, a function of seed and side."""
    dice = Dice(seed, held_out)
    while True:
        yield document(dice)


def train_tokenizer() -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909): it encodes any text, and common words as one id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = documents(SEED)
    tokenizer.train_from_iterator((next(source) for _ in range(TOKENIZER_DOCUMENTS)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, SPECIAL.index(BEGIN))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def stream(tokenizer: Tokenizer, source: Iterator[str], count: int) -> torch.Tensor:
    """At least `count` ids of packed documents, int64 [tokens]."""
    ids = array("q")
    while len(ids) < count:
        for encoding in tokenizer.encode_batch([next(source) for _ in range(256)], add_special_tokens=False):
            ids.extend(encoding.ids)
    return torch.frombuffer(ids, dtype=torch.int64)


def rate(done: float, steps: int) -> float:
    """The learning rate as a fraction of the peak; `done`: fraction of the steps done."""
    warm_up = min(1.0, (done * steps + 1) / WARM_UP_STEPS)
    return warm_up * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def print_line(line: str) -> None:
    """Write a line to stdout at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def new_model() -> Any:
    """A transformers Llama with seeded random weights in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG, "dtype": "float32"}))


def optimizers_of(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embeddings and the gains of norms."""
    hidden = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(hidden, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def fit(model: Any, ids: torch.Tensor) -> None:
    """Train one epoch on `ids`, int64 [tokens]."""
    optimizers, steps, start = optimizers_of(model), len(ids) // BATCH_TOKENS, time.monotonic()
    for step in range(steps):
        done = step / steps
        length = next(length for until, length in LENGTHS if done < until)
        x_BL = ids[step * BATCH_TOKENS : (step + 1) * BATCH_TOKENS].view(-1, length)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=x_BL, labels=x_BL).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_RATE * rate(done, steps)
            optimizer.step()
        model.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            speed = (step + 1) * BATCH_TOKENS / (time.monotonic() - start)
            print_line(f"step {step + 1} of {steps}  loss {loss.item():.3f}  {speed:.0f} tokens/s")


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Tokenizer, num_documents: int = HELD_OUT_DOCUMENTS) -> dict[str, float]:
    """Mean loss per token (nats) on documents with held-out combinations, in prose and in chat."""
    sums: dict[str, list[float]] = {"prose": [0.0, 0], "chat": [0.0, 0]}
    source = documents(SEED + 1, held_out=True)
    for _ in range(num_documents):
        text = next(source)
        x_1L = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
        entry = sums["chat" if ASSISTANT in text else "prose"]
        entry[0] += model(input_ids=x_1L, labels=x_1L).loss.item() * (x_1L.numel() - 1)
        entry[1] += x_1L.numel() - 1
    total = [sum(column) for column in zip(*sums.values(), strict=True)]
    return {name: loss / tokens for name, (loss, tokens) in {**sums, "all": total}.items()}


def save(model: Any, tokenizer: Tokenizer, directory: Path) -> None:
    """Write the model directory, in bfloat16. The output projection is the embedding, so it is not written."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    weights = {name: weight.bfloat16().contiguous() for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train, save and evaluate the model."""
    parser = argparse.ArgumentParser(description=f"Re-create {NAME}, the built-in model.")
    parser.add_argument("--output", type=Path, default=path(), help="model directory to write (default: the one in the package)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens to train on (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()
    tokenizer = train_tokenizer()
    ids = stream(tokenizer, documents(SEED), arguments.tokens)[: arguments.tokens // BATCH_TOKENS * BATCH_TOKENS]
    print_line(f"{len(ids)} tokens generated in {time.monotonic() - start:.0f} s")
    model = new_model()
    fit(model, ids)
    seconds = time.monotonic() - start
    save(model, tokenizer, arguments.output)
    model.bfloat16().float().eval()  # the saved bfloat16 weights, computed in float32
    losses = {name: round(loss, 3) for name, loss in held_out_loss(model, tokenizer).items()}
    report = {"tokens": len(ids), "training_s": round(seconds), "held_out_loss": losses}
    (arguments.output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print_line(json.dumps(report))


if __name__ == "__main__":
    main()
