"""The tiny model: Qwen2-VL's own classes at widths of 64 and up, which is what 4-bit layers need on a CPU."""

from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

HIDDEN = 128


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    """Build random float32 weights from torch's global generator; 1.1 M parameters, embeddings tied."""
    ids = processor.tokenizer.convert_tokens_to_ids
    end, pad = ids("<|im_end|>"), ids("<|endoftext|>")
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 2 * HIDDEN,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            # The three sections (time, height, width) are pairs of a head's 32 channels.
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": pad,
            "eos_token_id": end,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 5,
            "embed_dim": 64,
            "num_heads": 4,
            "hidden_size": HIDDEN,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "initializer_range": 0.05,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad)
    return model
