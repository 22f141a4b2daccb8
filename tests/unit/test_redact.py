"""No key, token or secret in what others will read; and nothing else is taken out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpserve.admin.redact import HIDDEN, is_secret, redact

SECRET = "q7Zp0xW3"


@pytest.mark.parametrize(
    "value",
    [
        {"api_key": SECRET}, {"admin_api_key": SECRET}, {"a": [{"HF_TOKEN": SECRET}]}, {"Authorization": SECRET},
        f"Authorization: Bearer {SECRET}", f"curl -H 'X-Api-Key: {SECRET}'", f"--api-key {SECRET} --port 1",
        f"--api-key={SECRET}",
        f"TPSERVE_API_KEY={SECRET}", f'{{"password": "{SECRET}"}}', f"http://me:{SECRET}@host/", f"https://host/?token={SECRET}&a=1",
        f"hf_{SECRET}{SECRET}", f"sk-{SECRET}{SECRET}",
    ],
    ids=str,
)  # fmt: skip
def test_secrets_are_taken_out(value: object) -> None:
    assert SECRET not in str(redact(value)) and HIDDEN in str(redact(value))


@given(st.text(st.characters(codec="ascii"), max_size=20), st.text(st.characters(codec="ascii"), max_size=20))
def test_known_secrets_are_taken_out_wherever_they_stand(before: str, after: str) -> None:
    assert SECRET not in str(redact({"x": [before + SECRET + after]}, [SECRET, "short"]))


@pytest.mark.parametrize(
    "value",
    [
        {"max_num_batched_tokens": 2048, "tokenizer": "dir", "max_tokens": 3, "api_key": None, "cluster_secret_file": "/a/b"},
        "up to 2,048 tokens a sequence, 256 sequences and 2,048 tokens a step", "CPU KV cache size: 4,190,192 tokens",
        "tpserve:prompt_tokens_total{model_name=\"m\"} 3.0", 7, None, True, ["http://127.0.0.1:8000"],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_secret_stays(value: object) -> None:
    assert redact(value) == value


def test_variables_by_name() -> None:
    assert all(map(is_secret, ("HF_TOKEN", "TPSERVE_API_KEY", "AWS_SECRET", "DB_PASSWORD")))
    assert not any(map(is_secret, ("PATH", "TOKENIZERS_PARALLELISM", "NCCL_DEBUG", "HOME")))
