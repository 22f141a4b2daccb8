"""What is served from latents does not depend on chunking, company, the prefix cache or preemption; what they take; and
configurations beside those of the parity run.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace as with_fields
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from tests.parity.expert_models import LATENTS as LATENTS_OF_TRANSFORMERS
from tests.parity.expert_models import YARN
from tests.parity.random_models import randomised
from tests.parity.runner import Runner, whole
from tests.parity.test_worker import LIMITS, layout, make_requests, serve
from tests.specs import LATENTS, small
from tpserve.models.decoder import Decoder
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams
from tpserve.weights.dummy import dummy


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    experts = with_fields(LATENTS["experts"], layers=(1, 2))
    spec = small(**{**LATENTS, "experts": experts}, num_layers=3, max_position=1024)
    made = Decoder(spec, layout(), 0, Group(), request.param, torch.device("cpu"), LIMITS.max_model_len)
    dummy(made.parameters(), seed=3)
    made.prepack()
    return made


def test_any_schedule_gives_the_same_bits(decoder: Decoder) -> None:
    alone = {r.id: serve(decoder, [r], LIMITS)[0][r.id] for r in make_requests()}
    again = [with_fields(r, id=r.id + 100) for r in make_requests()]
    twice = alone | {id + 100: answer for id, answer in alone.items()}
    for change in ({"max_num_batched_tokens": 37}, {"depth": 3, "sync_sampling": True, "block_size": 32, "num_blocks": 150}):
        answers, scheduler = serve(decoder, make_requests() + again, replace(LIMITS, **change))
        assert answers == twice and scheduler.stats().prefix_cache_hits > 0


def test_preempted_and_recomputed(decoder: Decoder) -> None:
    growing = [Request(i, pack(range(i, i + 20)), EngineSamplingParams(max_tokens=60, logprobs=0), seed=i) for i in range(5)]
    undisturbed, _ = serve(decoder, growing, LIMITS)
    batched, scheduler = serve(decoder, growing, replace(LIMITS, num_blocks=16))
    assert batched == undisturbed and scheduler.stats().preemptions > 0, "the pool is small enough to run short"


@pytest.mark.parametrize(
    "own",
    [
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        {"rope_interleave": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "num_key_value_heads": None},
        {"first_k_dense_replace": 3, "rope_parameters": {**YARN, "mscale_all_dim": 0.0}},
    ],
    ids=str,
)
def test_other_configurations(own: dict[str, Any], tmp_path: Path) -> None:
    config = DeepseekV3Config(**{**LATENTS_OF_TRANSFORMERS, "n_group": 4, "topk_group": 2, "q_lora_rank": 28, **own})
    oracle = randomised(DeepseekV3ForCausalLM(config))
    oracle.save_pretrained(tmp_path)
    tokens = list(range(0, 420, 3))
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    runner = Runner.load(tmp_path, 1, 1, 0, Group(), Pipeline(), torch.float32)
    [logits] = runner.run([tokens], whole([len(tokens)]))
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_token_leaves_its_latent_and_the_shared_key(decoder: Decoder) -> None:
    assert decoder.kv_layout.num_bytes(3, 16, decoder.dtype) == 3 * 16 * (32 + 8) * decoder.dtype.itemsize
