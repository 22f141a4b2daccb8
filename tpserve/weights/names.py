"""Names and orientation of the weights in a family's checkpoints. Plain data, no torch.

Projections with the same name are concatenated in one tensor, in the order of the fields here (q, k, v; gate, up). Names
omit the final `.weight` and `.bias`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertNames:
    """Checkpoint names of a mixture of experts, after the layer's prefix.

    A checkpoint stores each expert on its own, or stacks them: gate and up concatenated [experts, 2 x channels, hidden], down
    [experts, hidden, channels], without a final `.weight`; biases are stacked, and their names end in `_bias`.
    `stacked_router`: the router's name in a checkpoint with stacked experts. `router_bias`: the full tensor name.
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
    """Experts are always stacked, their matrices are [inputs, outputs], and gate and up outputs are interleaved."""
    shared: tuple[str, str, str] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
    shared_gate: str = "mlp.shared_expert_gate"


@dataclass(frozen=True)
class LatentNames:
    """Checkpoint names of latent attention, after the layer's prefix.

    `q_down`, `q_up`: to the compressed query, and from it to the heads. `kv_down`: latent rows, then shared key rows. `kv_up`:
    each head's key rows, then its value rows. Models without compressed queries use `WeightNames.q`.
    """

    q_down: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"


@dataclass(frozen=True)
class WeightNames:
    """Checkpoint names of all weights. Names inside a layer follow the prefix `layer`, which contains the layer number."""

    embedding: str = "model.embed_tokens"
    positions: str = ""
    """Learned positions; the first `unused_positions` rows of the table belong to no position."""
    unused_positions: int = 0
    project_in: str = ""
    project_out: str = ""
    """Projections from the embedding size to the hidden size, and back before the LM head."""
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
    """Suffixes of tensors that are no weights: config.json determines their values."""

    def layer_of(self, tensor: str) -> int | None:
        """The layer that a tensor belongs to, or None."""
        match = re.match(re.escape(self.layer).replace(r"\{layer\}", r"(\d+)"), tensor)
        return int(match[1]) if match else None

    def known(self, stored: Collection[str]) -> dict[str, str]:
        """Map the model's names to a checkpoint's stored names.

        A transformer that was saved alone or inside another model has another prefix: "embed_tokens" and
        "language_model.model.embed_tokens" both mean "model.embed_tokens".
        """
        ours = re.sub(r"\w+\.\{layer\}\.$", "", self.layer)
        theirs = self._stored_prefix(stored, ours)
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

    def _stored_prefix(self, stored: Collection[str], ours: str) -> str:
        """The checkpoint's prefix of the transformer: the one with an embedding and the most layers."""
        embedding, layers = f"{self.embedding}.weight".removeprefix(ours), self.layer.removeprefix(ours).partition("{")[0]
        found = {name.removesuffix(embedding) for name in stored if f".{name}".endswith(f".{embedding}")}
        sizes = {outside: sum(name.startswith(outside + layers) for name in stored) for outside in sorted(found)}
        return ours if sizes.get(ours) else max(sizes, key=lambda outside: sizes[outside], default=ours)


LLAMA = WeightNames()
"""Llama's names, which most families share."""
