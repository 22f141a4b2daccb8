"""What a configuration's largest step takes on the wire, against real encodings of such steps."""

import struct

import pytest
from msgspec.structs import replace

from tests.unit.test_server_info import CONFIG
from tpserve.engine.frames import check_frames
from tpserve.errors import UserError
from tpserve.types.packed import pack
from tpserve.types.plan import Chunk, NewSequence, PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from tpserve.types.sampling import MAX_LOGPROBS, EngineSamplingParams
from tpserve.wire import codec


def test_usual_sizes_pass() -> None:
    check_frames(replace(CONFIG, max_num_seqs=1024, max_num_batched_tokens=65536, max_model_len=1 << 20), 256_000, 2)


@pytest.mark.parametrize(("change", "flag"), [({"max_num_batched_tokens": 1 << 20}, "--max-num-batched-tokens 1048576"),
                                              ({"max_model_len": 10**7}, "--max-model-len 10000000")])  # fmt: skip
def test_what_could_not_be_sent_is_refused_by_its_flag(change: dict[str, int], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        check_frames(replace(CONFIG, **change), 32000, 1)


def test_the_bounds_hold_for_the_largest_steps() -> None:
    most, num_seqs, num_tokens = (1 << 31) - 1, 64, 512
    blocks = tuple((most,) * (num_tokens // num_seqs) for _ in range(2))
    chunks = [Chunk(most, most, 8, True, (most,) * 8, blocks, True, 16) for _ in range(num_seqs)]
    plan = StepPlan.of(1 << 40, 1 << 40, chunks, releases=[most] * num_seqs)
    assert len(codec.PLAN.encode([plan])) <= StepPlan.max_bytes(num_seqs, num_tokens, 2)
    new_sequence = NewSequence(
        most, pack([most] * 1000), most, EngineSamplingParams(), (1 << 64) - 1, most, (pack([most] * 50),) * 2
    )
    params_bytes = len(codec.PLAN.encode([EngineSamplingParams()]))  # type: ignore[list-item]
    assert len(codec.PLAN.encode([new_sequence])) <= 5 + NewSequence.max_bytes(params_bytes, 1000, 100, 2)  # type: ignore[list-item]
    entry = TokenLogprobs(-0.1, (most,) * MAX_LOGPROBS, (-0.1,) * MAX_LOGPROBS)
    floats = struct.pack("f", -0.1) * 8
    scores = PromptLogprobs(MAX_LOGPROBS, floats, floats * MAX_LOGPROBS, floats * MAX_LOGPROBS)
    numbered = range(num_seqs)
    result = StepResult(
        1 << 40,
        1 << 40,
        pack([most] * num_seqs),
        tuple((i, entry) for i in numbered),
        tuple((i, scores) for i in numbered),
        redrawn=tuple((i, pack([most] * 8)) for i in numbered),
    )
    assert len(codec.RESULT.encode([result])) <= StepResult.max_bytes(num_seqs, num_tokens)
