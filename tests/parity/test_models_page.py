"""docs/models.md is what the registry says, every family is in the parity run, and the model that the page adds gives what
transformers gives.
"""

import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import SeedOssConfig, SeedOssForCausalLM

from tests.parity.random_models import randomised
from tests.parity.runner import Runner, whole
from tests.parity.test_parity import MODELS
from tpserve import models
from tpserve.models import reference
from tpserve.parallel.group import Group
from tpserve.parallel.pipeline import Pipeline

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text()


def test_the_page_is_current() -> None:
    assert reference.markdown() == PAGE, "run `python -m tpserve.models.reference > docs/models.md`"


def test_every_family_is_in_the_parity_run(tmp_path: Path) -> None:
    made = set()
    for name, make in MODELS.items():
        make(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        made.add(models.model_spec(config, name).family)
    assert made == {family.name for family in models.families()}


def test_the_model_that_the_page_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    biases = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
    config = SeedOssConfig(vocab_size=200, intermediate_size=48, max_position_embeddings=400, **sizes, **biases)
    oracle = randomised(SeedOssForCausalLM(config))
    oracle.save_pretrained(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    module = ModuleType("seed_oss")
    exec(code, module.__dict__)  # noqa: S102
    monkeypatch.setattr(models, "_FAMILIES", (*models.families(), module.FAMILY))
    tokens = list(range(0, 180, 3))
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    runner = Runner.load(tmp_path, 1, 1, 0, Group(), Pipeline(), torch.float32)
    [logits] = runner.run([tokens], whole([len(tokens)]))
    torch.testing.assert_close(logits.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)
