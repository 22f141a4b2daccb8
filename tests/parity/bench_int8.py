"""How far int8 takes a model from float32: the mean Kullback-Leibler divergence over positions, and equal most likely tokens.

    python -m tests.parity.bench_int8

The reference is the same decoder in float32 with the same weights (bfloat16 numbers). Two random layers of real widths, and the
built-in model on its own held-out text.
"""

import json
import tempfile
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.random_models import randomised
from tests.parity.runner import Runner, whole
from tpserve.builtin import path
from tpserve.builtin.train import documents
from tpserve.config.flags import Quantization
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline

WIDTHS = ((1024, 2816), (2048, 5632), (4096, 11008))
LENGTH, NUM_SEQUENCES = 128, 3
FORMS: tuple[tuple[str, torch.dtype, Quantization | None], ...] = (
    ("bfloat16", torch.bfloat16, None),
    ("int8", torch.bfloat16, "int8"),
    ("int8-head", torch.bfloat16, "int8-head"),
    ("int8, float32", torch.float32, "int8"),
)


def logits(directory: Path, sequences: list[list[int]], dtype: torch.dtype, quantization: Quantization | None) -> torch.Tensor:
    runner = Runner.load(directory, 1, 1, 0, Group(), Pipeline(None, None), dtype, quantization=quantization)
    return torch.cat(runner.run(sequences, whole([len(tokens) for tokens in sequences])))


def compare(name: str, directory: Path, sequences: list[list[int]]) -> None:
    wanted = logits(directory, sequences, torch.float32, None).log_softmax(-1)
    cells = []
    for _, dtype, quantization in FORMS:
        got = logits(directory, sequences, dtype, quantization).log_softmax(-1)
        far = (wanted.exp() * (wanted - got)).sum(-1).mean()
        cells.append(f"{far:.1e}; {(got.argmax(-1) == wanted.argmax(-1)).float().mean():.1%}")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    print(f"| model | {' | '.join(name for name, _, _ in FORMS)} |\n|---|{'---|' * len(FORMS)}", flush=True)
    tokenizer = Tokenizer.from_file(str(path() / "tokenizer.json"))
    texts = islice(documents(0, held_out=True), 40)
    compare("built-in", path(), [tokenizer.encode(text).ids[:380] for text in texts])
    generator = torch.Generator().manual_seed(7)
    for hidden, inner in WIDTHS:
        sizes = {"vocab_size": 8192, "num_hidden_layers": 2, "num_attention_heads": hidden // 64, "max_position_embeddings": 400}
        config = LlamaConfig(**sizes, hidden_size=hidden, intermediate_size=inner, num_key_value_heads=hidden // 256)
        with tempfile.TemporaryDirectory() as folder:
            randomised(LlamaForCausalLM(config)).bfloat16().save_pretrained(folder)
            assert json.loads((Path(folder) / "config.json").read_text())["hidden_size"] == hidden
            sequences = [torch.randint(8192, (LENGTH,), generator=generator).tolist() for _ in range(NUM_SEQUENCES)]
            compare(f"two random layers of {hidden:,} and {inner:,}", Path(folder), sequences)


if __name__ == "__main__":
    main()
