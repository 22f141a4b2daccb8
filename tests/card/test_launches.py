"""How many launches a step takes: of each layer, and from the residual stream to the tokens."""

from collections import Counter

import pytest
import torch
from msgspec.structs import replace

from tests.card.engine import CardEngine
from tests.card.models import DEEPSEEK_V3, GEMMA3_4B, GPT2_XL, LLAMA_8B, QWEN3_0_6B, QWEN3_30B
from tests.card.simulated import Record, SimulatedCard
from tpserve.cli.server_flags import parse
from tpserve.config.resolve import resolve
from tpserve.planner.predictions import predict
from tpserve.types.machine import Machine
from tpserve.types.model_files import ModelFiles
from tpserve.types.model_spec import CacheGroup, ModelSpec
from tpserve.types.packed import pack
from tpserve.types.request import Request
from tpserve.types.sampling import EngineSamplingParams

PREDICTED = {
    "_norm_kernel": "norms", "mm": "products", "addmm": "products", "bmm": "products", "LM head": "products",
    "_place_heads_kernel": "rotation and KV write", "_place_latents_kernel": "rotation and KV write",
    "attention_kernel": "attention", "merge_kernel": "attention", "_gated_kernel": "activation", "_plain_kernel": "activation",
    "_router_kernel": "routing", "_route_kernel": "routing", "_permute_kernel": "routing", "_grouped_kernel": "experts",
    "_combine_kernel": "experts", "copy_": "draw", "_blocks_kernel": "draw", "_draw_kernel": "draw",
    "plan_kernel": "attention plan", "_edits_kernel": "step inputs", "_rows_kernel": "step inputs",
    "index": "other", "add": "other", "embedding": "other", "residual": "other",
}  # fmt: skip
"""Launches by the planner's names of kernels; lookups and sums are told apart by their place alone."""
BEGIN = Counter(_edits_kernel=1, _rows_kernel=1, index=1, plan_kernel=1)
"""The request pool, the rows, the embedding and the plan of attention."""


def with_layers(spec: ModelSpec, num_layers: int) -> ModelSpec:
    """All in one cache group."""
    layers = tuple(range(num_layers))
    experts = None if spec.experts is None else replace(spec.experts, layers=layers)
    return replace(spec, num_layers=num_layers, cache=(CacheGroup(layers),), experts=experts)


def of_graph(spec: ModelSpec) -> Record:
    """What a decode step of four rows launches."""
    with SimulatedCard(computes=False) as card:
        engine = CardEngine(spec, card.capture, num_blocks=1024, dtype=torch.bfloat16, max_len=8192)
        assert engine.runner.graphs is not None
        with card.recording() as record:
            engine.runner.graphs.warm_up()
    return record


def by_planner_name(launches: Counter[str]) -> Counter[str]:
    named: Counter[str] = Counter()
    for name, count in launches.items():
        named[PREDICTED.get(name, name)] += count
    return named


def predicted(spec: ModelSpec) -> Counter[str]:
    """The launches that `tpserve plan` shows."""
    config = resolve(parse(["m", "--device", "cuda"]), ModelFiles("m", "m"), spec, Machine(1, 1, 1, 1, 2, "serve"))
    return by_planner_name(Counter({work.name: work.launches for work in predict(spec, config, 0, 4, 100)}))


def of_prompt(spec: ModelSpec) -> Record:
    """What a step with a prompt launches."""
    with SimulatedCard(computes=False) as card:
        engine = CardEngine(spec, num_blocks=1024, dtype=torch.bfloat16, max_len=8192, max_num_batched_tokens=2048)
        params = EngineSamplingParams(max_tokens=4, temperature=0.8)
        engine.scheduler.add(Request(0, pack(range(1, 700)), params, seed=3), 0.0)
        plan = engine.scheduler.schedule(0.0)
        assert plan is not None and plan.num_tokens() == 699
        with card.recording() as record:
            engine.runner.launch(plan)
    return record


@pytest.mark.parametrize(
    ("spec", "limit"),
    [(LLAMA_8B, 10), (QWEN3_0_6B, 10), (GPT2_XL, 10), (GEMMA3_4B, 10), (QWEN3_30B, 14), (DEEPSEEK_V3, 22)],
    ids=lambda value: value.family if isinstance(value, ModelSpec) else "",
)
def test_launches_of_a_decode_step(spec: ModelSpec, limit: int) -> None:
    """Gemma's norms of outputs are in the launches after them. DeepSeek has two more products for queries, two for heads, and a
    shared expert."""
    specs = [with_layers(spec, num_layers) for num_layers in (2, 3)]
    records = [of_graph(spec) for spec in specs]
    two, three = (Counter(record.launches) for record in records)
    graphs = len({1, 2, 4})
    for spec, found in zip(specs, (two, three), strict=True):
        assert by_planner_name(found) == Counter({name: count * graphs for name, count in predicted(spec).items()})
    layer = three - two
    assert sum(layer.values()) <= limit * graphs, layer
    begin = Counter({name: count * graphs for name, count in BEGIN.items()})
    end = two - layer - layer - begin
    assert sum(end.values()) <= (9 if spec is GEMMA3_4B else 8) * graphs, end
    assert not records[0].waits


def test_launches_of_a_prompt() -> None:
    two, three = (Counter(of_prompt(with_layers(LLAMA_8B, num_layers)).launches) for num_layers in (2, 3))
    layer = three - two
    assert sum(layer.values()) <= 10, layer
    assert sum((two - layer - layer).values()) <= 14, two - layer - layer
