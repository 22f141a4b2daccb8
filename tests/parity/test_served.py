"""A model with nothing even about it, through real ranks and HTTP: what transformers says, and the same in a preempted crowd.

Six query heads, three key/value heads and an odd vocabulary on two ranks; three layers dealt one to two; a head dimension of its
own; a window that is no multiple of a block; tensors of one layer too many; rope in the old spelling; end tokens that only
generation_config.json names; a cache too small for what is asked, and smaller than one sequence is long.
"""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.http import checks, tiny_tokenizer
from tests.parity.test_parity import LLAMA3, randomised
from tests.server import Server, free_port, running, torchrun

VOCAB, CONTEXT, WINDOW, BLOCKS = 1537, 96, 25, 11
END_IDS = range(2, 120)
"""So many that a sampled answer soon meets one."""
FLAGS = ["-tp", "2", "-pp", "2", "--pipeline-layer-map", "1,2", "--max-num-seqs", "6", "--max-num-batched-tokens", "32",
         "--block-size", "8", "--num-gpu-blocks-override", str(BLOCKS)]  # fmt: skip
Answer = list[tuple[list[int], str]]


def make(directory: Path) -> PreTrainedModel:
    sizes = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6}
    rope = {"rope_theta": 5e5, **LLAMA3}
    more = {
        "vocab_size": VOCAB,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": rope,
        "sliding_window": WINDOW,
    }
    model = randomised(MistralForCausalLM(MistralConfig(**sizes, **more)))
    model.save_pretrained(directory, max_shard_size="300KB")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {f"model.layers.3.{name}.weight": "more.safetensors" for name in ("enorm", "hnorm")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({f"model.layers.3.{name}.weight": torch.ones(48) for name in ("enorm", "hnorm")}, directory / "more.safetensors")
    config = json.loads((directory / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": config.pop("dtype"), "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [*END_IDS]}))
    tiny_tokenizer.save(tiny_tokenizer.byte_level(), directory)
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, PreTrainedModel]]:
    directory, port = tmp_path_factory.mktemp("odd"), free_port()
    model = make(directory)
    with running([torchrun(str(directory), *FLAGS, ranks=4, port=port)], port, directory / "log") as server:
        yield server, model
        checks.idle(server.url)
        server.stop()
        server.assert_nothing_left()


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(f"{length} {seed}").choices(range(max(END_IDS) + 1, VOCAB), k=length)


def ask(server: Server, **body: Any) -> Answer:
    """Token ids and finish reason of every choice."""
    status, answer = server.post("/v1/completions", {"return_token_ids": True, **body})
    assert status == 200, answer
    return [(choice["token_ids"], choice["finish_reason"]) for choice in answer["choices"]]


@torch.inference_mode()
def continued(model: PreTrainedModel, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The greedy continuation, and its log probabilities."""
    ids, logprobs = list(ids), []
    for _ in range(count):
        row = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return ids[-count:], logprobs


@pytest.mark.parametrize("length", [1, 33, CONTEXT - 6])
def test_what_transformers_says(served: tuple[Server, PreTrainedModel], length: int) -> None:
    server, model = served
    tokens, logprobs = continued(model, prompt(length), 6)
    choice = server.complete(prompt(length), max_tokens=6, temperature=0, ignore_eos=True, logprobs=1, return_token_ids=True)
    assert choice["token_ids"] == tokens
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-4)


def test_unused_tensors_are_told_once(served: tuple[Server, PreTrainedModel]) -> None:
    """Not by every rank, and not those that another rank uses."""
    server, _ = served
    lines = [line for line in server.log.splitlines() if "not used of the checkpoint" in line]
    assert [line.partition("checkpoint: ")[2] for line in lines] == ["2 tensors: model.layers.3.* (2)"]


def test_the_last_position_is_used(served: tuple[Server, PreTrainedModel]) -> None:
    server, _ = served
    for length, size in ((1, CONTEXT - 1), (CONTEXT - 1, 1), (CONTEXT - 3, 3)):
        [(tokens, finish)] = ask(server, prompt=prompt(length), max_tokens=size, temperature=0, ignore_eos=True)
        assert (len(tokens), finish) == (size, "length")
        assert server.post("/v1/completions", {"prompt": prompt(length), "max_tokens": size + 1})[0] == 400


def test_end_tokens_of_the_generation_config(served: tuple[Server, PreTrainedModel]) -> None:
    server, _ = served
    body = {"prompt": prompt(5), "max_tokens": 60, "seed": 3, "n": 3}
    for (tokens, finish), (all_tokens, _) in zip(ask(server, **body), ask(server, **body, ignore_eos=True), strict=True):
        assert tokens == all_tokens[: len(tokens)] and (finish, tokens[-1] in END_IDS) == ("stop", True)
        assert not set(tokens[:-1]) & set(END_IDS)


def test_a_crowd_beyond_the_cache_says_what_each_says_alone(served: tuple[Server, PreTrainedModel]) -> None:
    server, _ = served
    draws = [{"temperature": 0}, {"seed": 2**64 - 1, "n": 2}, {"temperature": 0.7, "seed": 5}]
    bodies = [
        {"prompt": prompt(1 + 4 * i, seed=i), "max_tokens": 56, "ignore_eos": True, **draws[i % len(draws)]} for i in range(6)
    ]
    alone = [ask(server, **body) for body in bodies]
    before = preemptions(server)
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(lambda body: ask(server, **body), bodies)) == alone
    assert preemptions(server) > before, "the cache was never short"


def preemptions(server: Server) -> float:
    text: str = server.get("/metrics")[1]
    [line] = [line for line in text.splitlines() if line.startswith("tpserve:num_preemptions_total{")]
    return float(line.split()[-1])
