"""What a family's checkpoints call its weights, and how they lie there. Plain data, no torch.

Projections that share a name lie below one another in one tensor, in the order in which they are listed here (q, k, v; gate,
up). Names are given without the final `.weight` and `.bias`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """Checkpoint names of a mixture of experts, after the layer's prefix.

    A checkpoint has the experts one by one, or stacked: gate above up [experts, 2 x channels, hidden], down
    [experts, hidden, channels], without a final `.weight`; biases are stacked, and end on `_bias`. `stacked_router`: what the
    router is called in the second case. `router_bias`: in full.
    """

    router: str = "mlp.gate"
    router_bias: str = ""
    gate: str = "mlp.experts.{expert}.gate_proj"
    up: str = "mlp.experts.{expert}.up_proj"
    down: str = "mlp.experts.{expert}.down_proj"
    stacked_router: str = "mlp.gate"
    stacked_gate_up: str = "mlp.experts.gate_up_proj"
    stacked_down: str = "mlp.experts.down_proj"
    transposed: bool = False
    """Always stacked; an expert's matrices lie [inputs, outputs], and among the outputs gate and up take turns."""
    shared: tuple[str, str, str] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
    shared_gate: str = "mlp.shared_expert_gate"


@dataclass(frozen=True)
class LatentNames:
    """Checkpoint names of latent attention, after the layer's prefix: down to a compressed query and up to heads again; down to
    the latent with the shared key below it, and up to each head's key above its value. Queries that are not compressed are
    `WeightNames.q`.
    """

    q_down: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"


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
    attention_out_norm: str = ""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str = ""
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    experts: ExpertNames = ExpertNames()
    latent: LatentNames = LatentNames()
    transposed: bool = False
    """A layer's projections are stored [inputs, outputs]."""
    unused: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """How the names of tensors end that are no weights: config.json says what they hold."""

    def layer_of(self, tensor: str) -> int | None:
        """Which layer a tensor belongs to; None: to none."""
        match = re.match(re.escape(self.layer).replace(r"\{layer\}", r"(\d+)"), tensor)
        return int(match[1]) if match else None

    def known(self, stored: Collection[str]) -> dict[str, str]:
        """What each tensor of a checkpoint is called here, with what it is called there.

        A transformer that was saved alone or inside another model has other modules before its own: "embed_tokens" and
        "language_model.model.embed_tokens" are "model.embed_tokens".
        """
        ours = re.sub(r"\w+\.\{layer\}\.$", "", self.layer)
        theirs = self._outside_in(stored, ours)
        found = {}
        for name in stored:
            before, head, after = name.rpartition(f"{self.head}.")
            known = name
            if head and (not before or before.endswith(".")):
                known = head + after
            elif name.startswith(theirs):
                known = ours + name.removeprefix(theirs)
            found[name if known in stored else known] = name
        return found

    def _outside_in(self, stored: Collection[str], ours: str) -> str:
        """What stands there before the transformer's modules, which are told by an embedding and the most layers beside it."""
        embedding, layers = f"{self.embedding}.weight".removeprefix(ours), self.layer.removeprefix(ours).partition("{")[0]
        found = {name.removesuffix(embedding) for name in stored if f".{name}".endswith(f".{embedding}")}
        sizes = {outside: sum(name.startswith(outside + layers) for name in stored) for outside in sorted(found)}
        return ours if sizes.get(ours) else max(sizes, key=lambda outside: sizes[outside], default=ours)


LLAMA = WeightNames()
"""What most families say too."""
