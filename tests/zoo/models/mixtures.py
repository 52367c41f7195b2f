"""Language models with mixtures of experts."""

from tests.zoo.models.tiny import INNER, WIDTH, model, tiny

MIXTURES = {
    "mixtral": model("MixtralForCausalLM", "MixtralConfig"),
    "qwen2_moe": model("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
    "qwen3_moe": model("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
    "deepseek_v2": model("DeepseekV2ForCausalLM", "DeepseekV2Config", num_key_value_heads=4),
    "deepseek_v3": model("DeepseekV3ForCausalLM", "DeepseekV3Config", num_key_value_heads=4),
    "gpt_oss": model("GptOssForCausalLM", "GptOssConfig", intermediate_size=32, sliding_window=8),
    "olmoe": model("OlmoeForCausalLM", "OlmoeConfig"),
    "llama4_text": model("Llama4ForCausalLM", "Llama4TextConfig", intermediate_size_mlp=INNER, attention_chunk_size=16),
    "phimoe": model("PhimoeForCausalLM", "PhimoeConfig"),
    "granitemoe": model("GraniteMoeForCausalLM", "GraniteMoeConfig"),
    "granitemoeshared": model("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", shared_intermediate_size=24),
    "dbrx": model(
        "DbrxForCausalLM",
        lambda: tiny(
            "DbrxConfig",
            attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
        ),
    ),
    "jetmoe": model("JetMoeForCausalLM", "JetMoeConfig", kv_channels=8, num_key_value_heads=2),
    "ernie4_5_moe": model(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=0,
        moe_num_shared_experts=1,
    ),
    "glm4_moe": model("Glm4MoeForCausalLM", "Glm4MoeConfig"),
    "dots1": model("Dots1ForCausalLM", "Dots1Config"),
    "hunyuan_moe": model("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", moe_topk=2),
    "minimax": model("MiniMaxForCausalLM", "MiniMaxConfig", block_size=4),
    "minimax_m2": model("MiniMaxM2ForCausalLM", "MiniMaxM2Config", rotary_dim=8),
    "flex_olmo": model("FlexOlmoForCausalLM", "FlexOlmoConfig"),
    "longcat_flash": model(
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        num_key_value_heads=4,
        ffn_hidden_size=INNER,
        expert_ffn_hidden_size=24,
        zero_expert_num=2,
        moe_topk=2,
    ),
}
