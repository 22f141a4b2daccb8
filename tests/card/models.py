"""Shapes of real models, for a card without memory: what is launched and compiled for them."""

from tests.specs import small
from tpserve.types.model_spec import CacheGroup, ClampedSwiglu, ExpertsSpec, LatentSpec, ModelSpec, RopeSpec, RoutingSpec


def shaped(**fields: object) -> ModelSpec:
    """In bfloat16, with few layers."""
    return small(dtype="bfloat16", num_layers=2, max_position=8192, **fields)


LLAMA_8B = shaped(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_heads=32, num_kv_heads=8, head_dim=128,
)  # fmt: skip
QWEN3_0_6B = shaped(
    family="qwen3", vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_heads=16, num_kv_heads=8, head_dim=128,
    qk_norm="head", tie_embeddings=True,
)  # fmt: skip
GEMMA3_4B = shaped(
    family="gemma3", vocab_size=262_208, hidden_size=2560, intermediate_size=10_240, num_heads=8, num_kv_heads=4, head_dim=256,
    qk_norm="head", norm_offset=1.0, norm_place="around", activation="gelu_tanh", tie_embeddings=True,
    cache=(CacheGroup((0,), window=1024), CacheGroup((1,))), window_rope=RopeSpec(theta=10_000.0),
)  # fmt: skip
GPT2_XL = shaped(
    family="gpt2", vocab_size=50_257, hidden_size=1600, intermediate_size=6400, num_heads=25, num_kv_heads=25, head_dim=64,
    norm="layer", rope=None, gated=False, activation="gelu_tanh", qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
QWEN3_30B = shaped(
    family="qwen3_moe", vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_heads=32, num_kv_heads=4, head_dim=128,
    qk_norm="head", experts=ExpertsSpec(128, 768, RoutingSpec(8, renormalise=True), layers=(0, 1)),
)  # fmt: skip
GPT_OSS_20B = shaped(
    family="gpt_oss", vocab_size=201_088, hidden_size=2880, intermediate_size=2880, num_heads=64, num_kv_heads=8, head_dim=64,
    sinks=True, cache=(CacheGroup((0,), window=128), CacheGroup((1,))), qkv_bias=True, out_bias=True,
    experts=ExpertsSpec(
        32, 2880, RoutingSpec(4, bias="logits", renormalise=True), layers=(0, 1), bias=True,
        clamped=ClampedSwiglu(alpha=1.702, limit=7.0),
    ),
)  # fmt: skip
DEEPSEEK_V3 = shaped(
    family="deepseek_v3", vocab_size=129_280, hidden_size=7168, intermediate_size=18_432, num_heads=128, num_kv_heads=128,
    head_dim=192, attention_scale=0.1, rope=RopeSpec(interleaved=True),
    latent=LatentSpec(kv_rank=512, rope_dim=64, nope_dim=128, v_dim=128, q_rank=1536),
    experts=ExpertsSpec(
        256, 2048, RoutingSpec(8, "sigmoid", "choice", num_groups=8, num_top_groups=4, group_best=2, renormalise=True, scale=2.5),
        layers=(0, 1), shared_size=2048,
    ),
)  # fmt: skip
MODELS = {
    "llama-8b": LLAMA_8B, "qwen3-0.6b": QWEN3_0_6B, "gemma3-4b": GEMMA3_4B, "gpt2-xl": GPT2_XL, "qwen3-30b-a3b": QWEN3_30B,
    "gpt-oss-20b": GPT_OSS_20B, "deepseek-v3": DEEPSEEK_V3,
}  # fmt: skip
