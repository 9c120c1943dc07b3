"""The sizes of the random targets that the tests of this package make, of drafts for them, and the layers they read."""

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "eos_token_id": 1, "pad_token_id": 0,
    "bos_token_id": 2, "initializer_range": 0.2, "tie_word_embeddings": False, "num_experts": 2,
    "num_experts_per_tok": 1, "moe_intermediate_size": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": None,
}  # fmt: skip
TAPS = (1, 4, 6)
SMALL = {"block_size": 4, "ttt_length": 4, "num_anchors": 8, "num_layers": 2, "mask_token_id": 47}
