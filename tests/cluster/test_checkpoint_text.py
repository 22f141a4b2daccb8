"""A checkpoint as it comes, on two real ranks: SentencePiece, several templates, the makers' sampling; over HTTP and in `LLM`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import tiny_model
from tests.server import Server, free_port, running, serve
from tpserve import LLM, SamplingParams

BPE = Path(__file__).parents[1] / "unit" / "sentencepiece" / "bpe.model"
ENDS = range(3, 60)
"""So many that a sampled text soon meets one."""
MAKERS = {
    "do_sample": False,
    "max_new_tokens": 7,
    "repetition_penalty": 1.5,
    "eos_token_id": [2, *ENDS],
    "no_repeat_ngram_size": 2,
}
HELLO = [{"role": "user", "content": "The cat"}]
FLAGS: dict[str, Any] = {"tensor_parallel_size": 2, "device": "cpu", "dtype": "float32", "load_format": "dummy"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_model.save(tmp_path_factory.mktemp("model"))
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(BPE.read_bytes())
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (directory / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "whisper.jinja").write_text("{{ messages[0].content | lower }}")
    (directory / "generation_config.json").write_text(json.dumps(MAKERS))
    config = json.loads((directory / "config.json").read_text()) | {"vocab_size": 420, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    port = free_port()
    command = serve(str(model), "--device", "cpu", "-tp", "2", "--load-format", "dummy", "--chat-template", "whisper", port=port)
    with running([command], port, model / "log") as server:
        yield server
        assert server.stop() == [0]
        server.assert_nothing_left()


def chat(server: Server, **fields: Any) -> tuple[str, int, str]:
    status, body = server.post("/v1/chat/completions", {"messages": HELLO, "return_token_ids": True, **fields})
    assert status == 200, body
    return body["choices"][0]["message"]["content"], body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]


def test_requests_that_say_nothing_are_sampled_as_the_makers_want(server: Server, model: Path) -> None:
    """Greedy, for do_sample is false; seven tokens at most; and repetition is penalised as if the request had said so."""
    one = chat(server, ignore_eos=True)
    assert one == chat(server, ignore_eos=True, seed=5) and one[1:] == (7, "length")
    assert one == chat(server, ignore_eos=True, temperature=0, repetition_penalty=1.5, max_tokens=7)
    assert len({chat(server, ignore_eos=True, temperature=1, seed=seed) for seed in range(4)}) > 1
    assert chat(server, ignore_eos=True, max_tokens=12)[1] == 12
    lines = re.findall(r"default sampling parameters from .*", server.log)
    assert lines == [
        "default sampling parameters from generation_config.json: temperature 0, repetition_penalty 1.5, max_tokens 7; "
        "not supported and ignored: no_repeat_ngram_size (--generation-config none turns them off)"
    ]
    shown = server.get("/server_info")[1]["config"]["sampling_defaults"]
    assert (shown["temperature"], shown["max_tokens"], shown["unsupported"]) == (0.0, 7, ["no_repeat_ngram_size"])


def test_every_end_that_the_makers_name_ends_a_text(server: Server) -> None:
    for seed in range(4):
        body = {"prompt": [70, 71], "max_tokens": 200, "temperature": 1.5, "seed": seed, "return_token_ids": True}
        choice = server.complete(body.pop("prompt"), **body)
        *tokens, end = choice["token_ids"]
        assert (choice["finish_reason"], choice["stop_reason"], end in (2, *ENDS)) == ("stop", None, True)
        assert not {2, *ENDS} & set(tokens)


def test_a_template_by_its_name_and_sentencepiece(server: Server) -> None:
    asked = server.post("/tokenize", {"messages": HELLO, "return_token_strs": True})[1]
    assert asked["token_strs"] == ["\u2581the", "\u2581cat"]
    assert server.post("/tokenize", {"prompt": "The cat", "return_token_strs": True})[1]["token_strs"][0] == "<s>"
    assert server.post("/detokenize", {"tokens": asked["tokens"]})[1]["prompt"] == "the cat"


def test_an_llm_has_the_same_defaults(model: Path, server: Server) -> None:
    with LLM(model, **FLAGS, override_generation_config={"max_new_tokens": 9}, chat_template="whisper") as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, repetition_penalty=1.5, max_tokens=9)
        [output] = llm.chat(HELLO, use_tqdm=False)
        status, body = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 9, "return_token_ids": True})
        assert status == 200 and output.outputs[0].token_ids == body["choices"][0]["token_ids"]
        assert output.outputs[0].text == body["choices"][0]["message"]["content"]
        [drawn] = llm.generate([[70, 71]], SamplingParams(temperature=1.5, seed=1, max_tokens=200), use_tqdm=False)
        assert drawn.outputs[0].finish_reason == "stop" and drawn.outputs[0].token_ids[-1] in (2, *ENDS)
        assert llm.generate([[70, 71]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0].outputs[0].index == 0


def test_none_turns_them_off(model: Path, tmp_path: Path) -> None:
    port = free_port()
    command = serve(str(model), "--device", "cpu", "--load-format", "dummy", "--generation-config", "none", port=port)
    with running([command], port, tmp_path / "log") as server:
        assert len({chat(server, ignore_eos=True, seed=seed, max_tokens=7) for seed in range(4)}) > 1
        assert chat(server, ignore_eos=True)[1] > 7
        assert "default sampling parameters" not in server.log
        assert server.get("/server_info")[1]["config"]["sampling_defaults"] == {}
        choice = server.complete([70, 71], max_tokens=200, temperature=1.5, seed=1, return_token_ids=True)
        assert choice["token_ids"][-1] in (2, *ENDS), "the ends count all the same"
        server.stop()
