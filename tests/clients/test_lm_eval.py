"""lm-eval's `local-completions` and `local-chat-completions`, with the server's tokenizer, on two small tasks of files.

Its log likelihoods (lists of lists of token ids, echo, logprobs and one token) are compared with those of a text's own scores.
"""

import json
import os
import urllib.request
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

URL, MODEL = os.environ["TPSERVE_URL"], os.environ["TPSERVE_MODEL"]
CHOICES: list[dict[str, Any]] = [
    {"question": "Once upon a time", "choices": [" there was a fox", " zebra zebra", " in a"], "answer": 0},
    {"question": "The red fox", "choices": [" ran home", " xyzzy"], "answer": 0},
    {"question": "Good morning, said the", "choices": [" old mill", " cat", " qqq"], "answer": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
num_fewshot: 0
doc_to_text: "{{{{question}}}}"
metadata: {{version: 0}}
"""
MULTIPLE_CHOICE = (
    TASK
    + """
output_type: multiple_choice
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
)
GENERATE = (
    TASK
    + """
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 24, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    where = tmp_path_factory.mktemp("tasks")
    (where / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CHOICES))
    for name, text in (("tiny_choice", MULTIPLE_CHOICE), ("tiny_text", GENERATE)):
        (where / f"{name}.yaml").write_text(text.format(name=name, file=where / "test.jsonl"))
    return TaskManager(include_path=str(where), include_defaults=False)


def post(path: str, body: Any) -> Any:
    request = urllib.request.Request(path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.loads(reply.read())


def evaluate(kind: str, route: str, task: str, tasks: TaskManager, **options: Any) -> list[Any]:
    """The samples of a task, by `kind` of model."""
    arguments = f"model={MODEL},base_url={URL}/{route},num_concurrent=4,max_retries=1,max_length=2048"
    found = simple_evaluate(
        model=kind,
        model_args=arguments + options.pop("arguments", ""),
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
        **options,
    )
    samples: list[Any] = found["samples"][task]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def token_ids(text: str) -> list[int]:
    """As lm-eval asks for them: without the token that begins a text."""
    found: list[int] = post(f"{URL.removesuffix('/v1')}/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]
    return found


def likelihood(context: str, continuation: str) -> float:
    """Of a continuation, by the scores of the whole text."""
    body = {"prompt": token_ids(context + continuation), "echo": True, "logprobs": 0, "max_tokens": 0}
    return sum(post(f"{URL}/completions", body)["choices"][0]["logprobs"]["token_logprobs"][len(token_ids(context)) :])


@pytest.mark.parametrize("batch", [1, 3])
def test_likelihoods(tasks: TaskManager, batch: int) -> None:
    samples = evaluate("local-completions", "completions", "tiny_choice", tasks, batch_size=batch)
    assert len(samples) == len(CHOICES)
    for sample, line in zip(samples, CHOICES, strict=True):
        got = [float(responses[0][0]) for responses in sample["resps"]]
        expected = [likelihood(line["question"], choice) for choice in line["choices"]]
        assert got == pytest.approx(expected, abs=1e-4)


def test_texts(tasks: TaskManager) -> None:
    samples = evaluate("local-completions", "completions", "tiny_text", tasks, batch_size=1)
    for sample, line in zip(samples, CHOICES, strict=True):
        body = {"prompt": token_ids(line["question"]), "max_tokens": 24, "temperature": 0, "stop": ["."]}
        assert sample["resps"][0][0] == post(f"{URL}/completions", body)["choices"][0]["text"]


def test_chats(tasks: TaskManager) -> None:
    samples = evaluate("local-chat-completions", "chat/completions", "tiny_text", tasks, apply_chat_template=True)
    for sample, line in zip(samples, CHOICES, strict=True):
        messages = [{"role": "user", "content": line["question"]}]
        body = {"messages": messages, "max_tokens": 24, "temperature": 0, "stop": ["."]}
        assert sample["resps"][0][0] == post(f"{URL}/chat/completions", body)["choices"][0]["message"]["content"]
