"""What /metrics holds: vLLM's names on demand, and every series that the dashboard asks for."""

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tpserve.observe.metrics import VLLM_NAMES, Metrics
from tpserve.types.messages import PhaseTimes, Stats

ROOT = Path(__file__).resolve().parents[2]


def busy(*, vllm_names: bool = False) -> Metrics:
    """After a step of 7 tokens and a request of three."""
    metrics = Metrics("m", 16, vllm_names=vllm_names)
    metrics.engine(Stats(1, 0, 5, 50, 0, 1, 6, 1, epoch=1))
    metrics.first_token(0.02)
    metrics.next_tokens([0.01])
    metrics.ended("stop", 0.3, 6, 3, PhaseTimes(0.1, 0.05, 0.2))
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_the_names_of_vllm() -> None:
    ours, both = samples(busy()), samples(busy(vllm_names=True))
    assert not any(name.startswith("vllm:") for name in ours)
    theirs = {name.removeprefix("vllm:"): value for name, value in both.items() if name.startswith("vllm:")}
    assert all(both[f"tpserve:{name}"] == value for name, value in theirs.items())
    for name in VLLM_NAMES:
        assert any(found.startswith(name) for found in theirs), name
    assert not any("recover" in name or "quarantine" in name for name in theirs), "vLLM has none"


def test_values() -> None:
    found = samples(busy())
    assert found["tpserve:iteration_tokens_total_sum"] == 7 and found["tpserve:kv_cache_usage_perc"] == 0.1
    assert found["tpserve:request_time_per_output_token_seconds_sum"] == 0.1
    assert found["tpserve:request_inference_time_seconds_sum"] == 0.25
    text = busy().render().decode()
    assert 'tpserve:cache_config_info{block_size="16",model_name="m",num_gpu_blocks="50"} 1.0' in text


def test_the_dashboard_asks_for_what_is_there() -> None:
    dashboard = json.loads((ROOT / "launch" / "grafana" / "tpserve.json").read_text())
    names = set(samples(busy()))
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"tpserve:\w+", query)}
    assert len(queries) > 20 and asked <= names, asked - names
    for query in queries:
        assert query.count("(") == query.count(")") and 'model_name=~"$model"' in query
