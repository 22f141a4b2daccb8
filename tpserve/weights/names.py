"""What a family's checkpoints call its weights, and how they lie there. Plain data, no torch.

Projections that share a name lie below one another in one tensor, in the order in which they are listed here (q, k, v; gate,
up). Names are given without the final `.weight` and `.bias`.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """Checkpoint names of a mixture of experts, after the layer's prefix.

    A checkpoint has the experts one by one, or stacked: gate above up [experts, 2 x channels, hidden], down
    [experts, hidden, channels], without a final `.weight`. `stacked_router`: what the router is called in the second case.
    """

    router: str = "mlp.gate"
    gate: str = "mlp.experts.{expert}.gate_proj"
    up: str = "mlp.experts.{expert}.up_proj"
    down: str = "mlp.experts.{expert}.down_proj"
    stacked_router: str = "mlp.gate"
    stacked_gate_up: str = "mlp.experts.gate_up_proj"
    stacked_down: str = "mlp.experts.down_proj"
    shared: tuple[str, str, str] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
    shared_gate: str = "mlp.shared_expert_gate"


@dataclass(frozen=True)
class WeightNames:
    """Names of a layer follow `layer`, with the layer's number in it."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    """Learned positions; the table begins with `unused_positions` rows for none."""
    unused_positions: int = 0
    project_in: str = ""
    project_out: str = ""
    """Between an embedding of its own width and the layers, and between those and the LM head."""
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{layer}."
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    experts: ExpertNames = ExpertNames()
    transposed: bool = False
    """A layer's projections are stored [inputs, outputs]."""
    unused: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """How the names of a layer's tensors end that are no weights: config.json says what they hold."""

    def layer_of(self, tensor: str) -> int | None:
        """Which layer a tensor belongs to; None: to none, or it is no weight."""
        match = re.match(re.escape(self.layer).replace(r"\{layer\}", r"(\d+)"), tensor)
        return int(match[1]) if match and not tensor.endswith(self.unused) else None


LLAMA = WeightNames()
"""What most families say too."""
