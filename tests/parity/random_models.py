"""Random weights for transformers' models."""

import torch
from transformers import PreTrainedModel


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that leave nothing neutral: norms away from 1, biases away from 0, attention that is not uniform."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 2:
                weight.copy_(noise * (1.5 / weight.shape[1] ** 0.5))
            else:
                is_norm = not name.endswith(".bias") and any(part in name for part in ("norm", "ln_"))
                weight.copy_(noise * 0.3 + is_norm)
    return model.eval()
