"""What any tpserve server must do with log probabilities of prompts, with `best_of` and its prefix cache. As `checks`."""

import random
from typing import Any

from tests.http.checks import Client, Json, is_error


def wrong_requests(base_url: str) -> None:
    """A wrong field, or a wrong combination, is a 400 that names it."""
    client = Client(base_url)
    wrong: list[tuple[Json, str]] = [
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"best_of": 10**6}, "best_of"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"priority": 2**31}, "priority"),
        ({"priority": -(2**31) - 1}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"cache_salt": 7}, "cache_salt"),
        ({"prompt_logprobs": 1, "n": 3, "best_of": 2}, "best_of"),
        ({"stream": True, "best_of": 2}, "best_of"),
    ]
    for fields, param in wrong:
        is_error(client.completion(**fields), 400, param=param, code="invalid_value", says=param)
        reply = client.chat(**fields)
        is_error(reply, 400, param=param, says=param, code="unsupported_parameter" if param == "best_of" else "invalid_value")
    is_error(client.completion(echo=True, max_tokens=0, min_tokens=1), 400, param="min_tokens")
    is_error(client.completion(echo=True, max_tokens=-1), 400, param="max_tokens")


def best_of(base_url: str) -> None:
    """The n likeliest of more choices, best first; usage knows of all; who asked for no logprobs sees none."""
    client = Client(base_url)
    fields: Json = {"prompt": ["The red fox", "One day"], "max_tokens": 6, "ignore_eos": True, "temperature": 1}
    drawn = client.completion(**fields, n=5, logprobs=0, return_token_ids=True).json["choices"]
    answer = client.completion(**fields, n=2, best_of=5, return_token_ids=True).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for number in range(2):
        of_prompt = drawn[5 * number : 5 * number + 5]
        of_prompt.sort(key=lambda choice: sum(choice["logprobs"]["token_logprobs"]), reverse=True)  # all are of one length
        expected = [choice["token_ids"] for choice in of_prompt[:2]]
        chosen = answer["choices"][2 * number : 2 * number + 2]
        assert [choice["token_ids"] for choice in chosen] == expected
        assert all(choice["prompt_token_ids"] == drawn[5 * number]["prompt_token_ids"] for choice in chosen)
    assert all(choice["logprobs"] is None for choice in answer["choices"]) and answer["usage"]["completion_tokens"] == 60
    shown = client.completion(**fields, n=2, best_of=5, logprobs=1).json["choices"]
    assert [c["text"] for c in shown] == [c["text"] for c in answer["choices"]]
    assert all(len(choice["logprobs"]["tokens"]) == 6 for choice in shown)
    assert len(client.completion(**fields, n=2, best_of=2, stream=True).events) > 4, (
        "no choice is left out, so it may be streamed"
    )


def scored_prompts(base_url: str, model_is_real: bool = True) -> None:
    """Echo with logprobs as evaluation harnesses use it, and `prompt_logprobs`; both say what generation says."""
    client = Client(base_url)
    prompts = [
        client.post("/tokenize", prompt=text).json["tokens"] for text in ("The red fox", "One day — 漢字 🎉, ", "The old " * 40)
    ]
    greedy: Json = {"temperature": 0, "seed": 1234, "max_tokens": 5, "ignore_eos": True}
    said = client.completion(**greedy, prompt=prompts, logprobs=1, return_token_ids=True).json["choices"]
    contexts = [ids + choice["token_ids"] for ids, choice in zip(prompts, said, strict=True)]
    scoring: Json = {"prompt": contexts, "temperature": 0, "logprobs": 1, "echo": True}
    answer = client.completion(**scoring, max_tokens=1).json
    for ids, choice, own in zip(prompts, answer["choices"], said, strict=True):
        logprobs = choice["logprobs"]
        values, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
        assert values[0] is None and tops[0] is None and len(values) == len(tops) == len(ids) + 6
        assert_close(values[len(ids) : -1], own["logprobs"]["token_logprobs"])
        likeliest = [max(top.values()) == value for value, top in zip(values[len(ids) : -1], tops[len(ids) : -1], strict=True)]
        assert all(likeliest) or not model_is_real, "what was drawn greedily is the likeliest"
        offsets = [*logprobs["text_offset"], len(choice["text"])]
        pieces = [choice["text"][a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
        shown = [
            pair
            for pair in zip(pieces, logprobs["tokens"], strict=True)
            if not pair[1].startswith("bytes:") and "\ufffd" not in pair[0]
        ]
        assert all(piece == token for piece, token in shown[1:]) and shown[0][0] in ("", shown[0][1]), "but what begins a text"
    nothing = client.completion(**scoring, max_tokens=0).json
    assert nothing["usage"]["completion_tokens"] == 0
    for empty, choice in zip(nothing["choices"], answer["choices"], strict=True):
        assert empty["finish_reason"] == "length" and choice["text"].startswith(empty["text"])
        assert empty["logprobs"] == {name: values[:-1] for name, values in choice["logprobs"].items()}
    for max_tokens in (0, 3):
        fields: Json = scoring | {"prompt": ["The red fox", "One day"], "max_tokens": max_tokens, "n": 2, "temperature": 1}
        streamed_echo(client, fields)
    plain = client.completion(prompt="The red fox", echo=True, max_tokens=0, return_token_ids=True).json["choices"][0]
    assert (plain["text"], plain["finish_reason"], plain["logprobs"], plain["token_ids"]) == ("The red fox", "length", None, [])
    prompt_logprobs(client)


def streamed_echo(client: Client, fields: Json) -> None:
    """A stream's chunks joined are the whole answer, and the choices of a prompt show the same scores."""
    whole = client.completion(**fields).json["choices"]
    chunks = [chunk["choices"][0] for chunk in client.completion(**fields, stream=True).events]
    for index, expected in enumerate(whole):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == expected["text"] and own[-1]["finish_reason"] == "length"
        shapes = [chunk["logprobs"] for chunk in own if chunk["logprobs"]]
        assert {name: [value for shape in shapes for value in shape[name]] for name in shapes[0]} == expected["logprobs"]
        length = len(client.post("/tokenize", prompt=fields["prompt"][index // 2]).json["tokens"])
        twin = whole[index - index % 2]["logprobs"]
        assert all(values[:length] == twin[name][:length] for name, values in expected["logprobs"].items())


def prompt_logprobs(client: Client) -> None:
    """vLLM's shape, in each choice or beside the chat's, with the values of an echo."""
    fields: Json = {"n": 2, "max_tokens": 2, "return_token_ids": True}
    answer = client.completion(prompt="The red fox", prompt_logprobs=3, echo=True, logprobs=0, **fields).json["choices"]
    chat = client.chat(prompt_logprobs=3, **fields).json
    assert answer[0]["prompt_logprobs"] == answer[1]["prompt_logprobs"]
    for ids, entries in ((c["prompt_token_ids"], c["prompt_logprobs"]) for c in (*answer, chat)):
        assert entries[0] is None and len(entries) == len(ids)
        for token, entry in zip(ids[1:], entries[1:], strict=True):
            assert len(entry) - (entry[str(token)]["rank"] is None) == 3 and all(int(id) >= 0 for id in entry)
            ranked = sorted((value["rank"], -value["logprob"]) for value in entry.values() if value["rank"])
            assert [rank for rank, _ in ranked] == [1, 2, 3] and ranked == sorted(ranked, key=lambda pair: pair[1])
            assert entry[str(token)]["decoded_token"] is not None
    echoed = answer[0]["logprobs"]["token_logprobs"][1 : len(ids)]
    own = [
        entry[str(t)]["logprob"]
        for t, entry in zip(answer[0]["prompt_token_ids"], answer[0]["prompt_logprobs"], strict=True)
        if entry
    ]
    assert own == echoed[: len(own)]
    alone = client.completion(prompt=[5], prompt_logprobs=3, max_tokens=1).json["choices"][0]
    assert alone["prompt_logprobs"] == [None] and alone["logprobs"] is None


def assert_close(values: list[float], expected: list[float]) -> None:
    assert len(values) == len(expected) and all(abs(a - b) < 1e-4 for a, b in zip(values, expected, strict=True)), (
        values,
        expected,
    )


def cached_tokens(base_url: str) -> None:
    """Usage and metrics tell of tokens found in the prefix cache: whole answers, streams, lists, more choices than are shown."""
    client, ids = Client(base_url), [5 + i for i in range(70)]

    def cached(salt: str, **fields: Any) -> int:
        fields = {"cache_salt": salt, "max_tokens": 1, "ignore_eos": True} | fields
        if fields.get("stream"):
            events = client.completion(**fields, stream_options={"include_usage": True}).events
            return int(events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])
        return int(client.completion(**fields).json["usage"]["prompt_tokens_details"]["cached_tokens"])

    hits, salt = client.gauge("prefix_cache_hits_total"), str(random.getrandbits(64))
    assert cached(salt, prompt=ids) == 0
    again = cached(salt, prompt=ids)
    assert 0 < again < len(ids) and cached(f"{salt}!", prompt=ids) == 0
    assert cached(salt, prompt=ids, stream=True) == cached(salt, prompt=ids, n=2, best_of=3) == again
    assert cached(salt, prompt=[ids, ids]) == 2 * again
    a_stop = client.completion(prompt=ids, max_tokens=1, ignore_eos=True, temperature=0).json["choices"][0]["text"][:1]
    assert not a_stop or cached(salt, prompt=ids, temperature=0, stop=a_stop) == again
    assert cached(salt, prompt=ids, echo=True, logprobs=1) == 0, "a prompt that is scored is computed whole"
    assert client.gauge("prefix_cache_hits_total") >= hits + 5 * again
    assert client.gauge("prefix_cache_queries_total") > client.gauge("prefix_cache_hits_total")
