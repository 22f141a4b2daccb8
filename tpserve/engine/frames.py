"""Check that the largest step of a configuration fits its frames. Pure; runs before anything is loaded.

A plan's frame has one share for new sequences, which the scheduler respects (`SchedulerConfig.max_admission_bytes`), and one for
chunks. A result, and the outputs that rank 0 sends to the frontend, are at most as large as the prompt logprobs of a whole step.
So no step that the scheduler makes is too large to send.
"""

from tpserve.config.engine_config import EngineConfig
from tpserve.errors import UserError
from tpserve.scheduling.scheduler_config import MAX_ADMISSION_BYTES
from tpserve.types.plan import NEW_GRAMMAR_BYTES, NewSequence, StepPlan, StepResult
from tpserve.wire import codec

PARAMS_BYTES = 1 << 20
"""A generous bound for a request's parameters without `allowed_token_ids`."""


def check_frames(config: EngineConfig, vocab_size: int, num_groups: int) -> None:
    """Raises UserError with the flag whose value makes a step too large."""
    num_seqs, num_tokens = config.max_num_seqs, config.max_num_batched_tokens
    plan = StepPlan.max_bytes(num_seqs, num_tokens, num_groups) + MAX_ADMISSION_BYTES + NEW_GRAMMAR_BYTES
    result = StepResult.max_bytes(num_seqs, num_tokens)
    if plan > codec.PLAN.max_bytes or result > min(codec.RESULT.max_bytes, codec.ENGINE_OUTPUT.max_bytes):
        raise UserError(
            f"--max-num-batched-tokens {num_tokens} with --max-num-seqs {num_seqs} makes steps that are too large to send: "
            "lower them",
            param="max_num_batched_tokens",
        )
    num_blocks = num_groups * -(-config.max_model_len // config.block_size)
    longest = NewSequence.max_bytes(PARAMS_BYTES + 5 * vocab_size, config.max_model_len, num_blocks, num_groups)
    if longest > MAX_ADMISSION_BYTES:
        raise UserError(
            f"--max-model-len {config.max_model_len} makes a sequence of {longest} bytes, and {MAX_ADMISSION_BYTES} can be sent: "
            "lower it, or raise --block-size",
            param="max_model_len",
        )
