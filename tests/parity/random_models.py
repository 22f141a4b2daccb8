"""Random weights for transformers' models, and what they are saved with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel


def randomised(model: PreTrainedModel, norms_around: float = 1.0) -> PreTrainedModel:
    """Weights that leave nothing neutral: norms away from 1 (or what they lie around), biases and sinks away from 0, attention
    that is not uniform.
    """
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:  # transformers keeps a layer's experts in one tensor
                # A router's near tie is a cliff in any dtype: let it decide, and the experts not shout.
                spread = 3.0 if name.endswith(("mlp.gate.weight", "mlp.router.weight")) else 1.0 if weight.ndim == 3 else 1.5
                weight.copy_(noise * (spread / weight.shape[-1] ** 0.5))
            else:
                is_norm = not name.endswith(".bias") and any(part in name for part in ("norm", "ln_"))
                weight.copy_(noise * 0.3 + is_norm * norms_around)
    return model.eval()


def rewrite(directory: Path, part: str | None = None, without: Sequence[str] = (), **fields: Any) -> None:
    """The saved config with other fields, all of it or a part."""
    config = json.loads((directory / "config.json").read_text())
    changed = config if part is None else config[part]
    for name in without:
        del changed[name]
    changed.update(fields)
    (directory / "config.json").write_text(json.dumps(config))
