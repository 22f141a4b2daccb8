"""`--quantization int8` with real ranks: one and two give the same bits; what says that it cannot be."""

from pathlib import Path
from typing import Any

import pytest

from tests.server import free_port, running, serve
from tpserve import LLM, SamplingParams
from tpserve_kernels.cpu.library import library

PROMPTS = ["Once upon a time there was", "The harbour of", "Mina said"]
PARAMS = [
    SamplingParams(max_tokens=24, logprobs=3, ignore_eos=True, **fields)
    for fields in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seed": 6, "top_p": 0.9})
]


def answers(**flags: Any) -> list[Any]:
    with LLM(device="cpu", log_level="warning", **flags) as llm:
        choices = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS)]
    return [
        (choice.token_ids, [{id: entry.logprob for id, entry in entries.items()} for entries in choice.logprobs or ()])
        for choice in choices
    ]


@pytest.mark.skipif(library() is None, reason="int8 needs the library of CPU kernels")
def test_two_ranks_give_the_bits_of_one() -> None:
    one, two = (answers(quantization="int8", tensor_parallel_size=size) for size in (1, 2))
    assert one == two
    assert all(len(tokens) == len(logprobs) == 24 for tokens, logprobs in one)


def test_without_the_library(tmp_path: Path) -> None:
    port = free_port()
    command = serve("--device", "cpu", "--quantization", "int8", port=port)
    with running([command], port, tmp_path / "log", ready=False, env={"TPSERVE_ISA": "off"}) as server:
        assert server.wait() == [2]
        last = server.log.splitlines()[-1]
    assert last.startswith(
        "tpserve: error: --quantization int8 needs the library of CPU kernels, which cannot be used (TPSERVE_ISA is off): install"
    ), last
