"""Pictures and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.zoo.models.tiny import (
    INNER,
    VOCAB,
    WIDTH,
    Inputs,
    image,
    model,
    noise,
    text,
    tiny,
    tokens,
)

IMAGE_TOKEN = 97


def with_image(count: int, before: tuple[int, ...] = ()) -> Inputs:
    """Token ids, ``count`` of them in the place of a picture, and their mask."""
    ids = text(T=12, vocab=90)["input_ids"]
    head = torch.tensor([[*before, *[IMAGE_TOKEN] * count]] * 2)
    full = torch.cat([head, ids], 1)
    return {"input_ids": full, "attention_mask": torch.ones_like(full)}


def with_patches() -> Inputs:
    """Inputs of the Qwen-VL family: patches of 16 pixels, four of which become one token."""
    inputs = with_image(4, before=(95,))
    ids = inputs["input_ids"]
    ids = torch.cat([ids[:, :5], torch.full((2, 1), 96), ids[:, 5:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
        "pixel_values": noise(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def qwen_vl(name: str, **vision: Any) -> Callable[[], Any]:
    """A configuration of the Qwen-VL family."""
    rope = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    sizes = {"depth": 2, "hidden_size": WIDTH, "num_heads": 4, "patch_size": 4}
    merged = {"spatial_merge_size": 2, "temporal_patch_size": 2}

    def make() -> Any:
        return getattr(transformers, f"{name}Config")(
            vision_config={**sizes, **merged, **vision},
            text_config=tiny(f"{name}TextConfig", rope_parameters=rope).to_dict(),
            image_token_id=IMAGE_TOKEN,
            video_token_id=94,
            vision_start_token_id=95,
            vision_end_token_id=96,
        )

    return make


MULTIMODAL = {
    "clip": model(
        "CLIPModel",
        lambda: transformers.CLIPConfig(
            text_config=tiny("CLIPTextConfig", projection_dim=16).to_dict(),
            vision_config=tiny("CLIPVisionConfig", projection_dim=16).to_dict(),
            projection_dim=16,
        ),
        lambda: {**text(), **image()},
    ),
    "siglip": model(
        "SiglipModel",
        lambda: transformers.SiglipConfig(
            text_config=tiny("SiglipTextConfig", projection_size=WIDTH).to_dict(),
            vision_config=tiny("SiglipVisionConfig").to_dict(),
        ),
        lambda: {**tokens(), **image()},
    ),
    "blip": model(
        "BlipForConditionalGeneration",
        lambda: transformers.BlipConfig(
            text_config=tiny("BlipTextConfig", encoder_hidden_size=WIDTH, projection_dim=16).to_dict(),
            vision_config=tiny("BlipVisionConfig").to_dict(),
            projection_dim=16,
        ),
        lambda: {**text(), **image()},
    ),
    "llava": model(
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            vision_config=tiny("CLIPVisionConfig"),
            text_config=tiny("LlamaConfig"),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=16,
            vision_feature_layer=-1,
            pad_token_id=0,
        ),
        lambda: {**with_image(16), **image()},
    ),
    "paligemma": model(
        "PaliGemmaForConditionalGeneration",
        lambda: transformers.PaliGemmaConfig(
            vision_config=tiny("SiglipVisionConfig", vision_use_head=False),
            text_config=tiny("GemmaConfig"),
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
            projection_dim=WIDTH,
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            pad_token_id=0,
        ),
        lambda: {**with_image(16), **image()},
    ),
    "gemma3": model(
        "Gemma3ForConditionalGeneration",
        lambda: transformers.Gemma3Config(
            vision_config=tiny("SiglipVisionConfig", vision_use_head=False),
            text_config=tiny("Gemma3TextConfig", sliding_window=8),
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
            boi_token_index=95,
            eoi_token_index=96,
        ),
        lambda: {
            **with_image(4),
            **image(),
            "token_type_ids": torch.cat([torch.ones(2, 4), torch.zeros(2, 12)], 1).long(),
        },
    ),
    "idefics3": model(
        "Idefics3ForConditionalGeneration",
        lambda: transformers.Idefics3Config(
            vision_config=tiny("Idefics3VisionConfig"),
            text_config=tiny("LlamaConfig"),
            scale_factor=2,
            image_token_id=IMAGE_TOKEN,
            pad_token_id=0,
        ),
        lambda: {**with_image(4), "pixel_values": image()["pixel_values"][:, None]},
    ),
    "smolvlm": model(
        "SmolVLMForConditionalGeneration",
        lambda: transformers.SmolVLMConfig(
            vision_config=tiny("SmolVLMVisionConfig"),
            text_config=tiny("LlamaConfig"),
            scale_factor=2,
            image_token_id=IMAGE_TOKEN,
            pad_token_id=0,
        ),
        lambda: {**with_image(4), "pixel_values": image()["pixel_values"][:, None]},
    ),
    "qwen2_vl": model(
        "Qwen2VLForConditionalGeneration", qwen_vl("Qwen2VL", embed_dim=WIDTH, mlp_ratio=2), with_patches
    ),
    "qwen2_5_vl": model(
        "Qwen2_5_VLForConditionalGeneration",
        qwen_vl(
            "Qwen2_5_VL", out_hidden_size=WIDTH, intermediate_size=INNER, window_size=16, fullatt_block_indexes=[1]
        ),
        with_patches,
    ),
    "qwen3_vl": model(
        "Qwen3VLForConditionalGeneration",
        qwen_vl(
            "Qwen3VL",
            out_hidden_size=WIDTH,
            intermediate_size=INNER,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        with_patches,
    ),
    "qwen3_vl_moe": model(
        "Qwen3VLMoeForConditionalGeneration",
        qwen_vl(
            "Qwen3VLMoe",
            out_hidden_size=WIDTH,
            intermediate_size=INNER,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        with_patches,
    ),
    "blip2": model(
        "Blip2ForConditionalGeneration",
        lambda: transformers.Blip2Config(
            vision_config=tiny("Blip2VisionConfig").to_dict(),
            qformer_config=tiny("Blip2QFormerConfig", encoder_hidden_size=WIDTH, cross_attention_frequency=1).to_dict(),
            text_config=tiny("OPTConfig", word_embed_proj_dim=WIDTH).to_dict(),
            num_query_tokens=4,
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
        ),
        lambda: {**with_image(4), **image()},
    ),
    "instructblip": model(
        "InstructBlipForConditionalGeneration",
        lambda: transformers.InstructBlipConfig(
            vision_config=tiny("InstructBlipVisionConfig").to_dict(),
            qformer_config=tiny(
                "InstructBlipQFormerConfig", encoder_hidden_size=WIDTH, cross_attention_frequency=1
            ).to_dict(),
            text_config=tiny("OPTConfig", word_embed_proj_dim=WIDTH).to_dict(),
            num_query_tokens=4,
            image_token_index=IMAGE_TOKEN,
            image_token_id=IMAGE_TOKEN,
        ),
        lambda: {**with_image(4), **image(), "qformer_input_ids": tokens()["input_ids"]},
    ),
    "florence2": model(
        "Florence2ForConditionalGeneration",
        lambda: transformers.Florence2Config(
            vision_config=tiny(
                "Florence2VisionConfig",
                embed_dim=[8, 16, 24, 32],
                depths=[1, 1, 1, 1],
                num_heads=[1, 2, 2, 4],
                num_groups=[1, 2, 2, 4],
                window_size=4,
                projection_dim=WIDTH,
                patch_size=[7, 3, 3, 3],
                drop_path_rate=0.0,
                max_position_embeddings=16,
                max_temporal_embeddings=8,
            ).to_dict(),
            text_config=tiny("BartConfig").to_dict(),
            image_token_id=IMAGE_TOKEN,
            is_encoder_decoder=True,
        ),
        lambda: {**with_image(5), **image(64), "decoder_input_ids": tokens(T=5)["input_ids"]},
    ),
    "mllama": model(
        "MllamaForConditionalGeneration",
        lambda: transformers.MllamaConfig(
            vision_config=tiny(
                "MllamaVisionConfig",
                num_global_layers=1,
                attention_heads=4,
                vision_output_dim=64,
                intermediate_layers_indices=[0],
                supported_aspect_ratios=[[1, 1]],
                max_num_tiles=1,
            ).to_dict(),
            text_config=tiny(
                "MllamaTextConfig",
                num_hidden_layers=3,
                cross_attention_layers=[1],
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            ).to_dict(),
            image_token_index=98,
        ),
        lambda: {
            **text(vocab=90),
            "pixel_values": noise(2, 1, 1, 3, 16, 16),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(2, 9, 1, 1, dtype=torch.long),
        },
    ),
    "llama4": model(
        "Llama4ForConditionalGeneration",
        lambda: transformers.Llama4Config(
            vision_config=tiny(
                "Llama4VisionConfig",
                projector_input_dim=32,
                projector_output_dim=32,
                vision_output_dim=32,
                pixel_shuffle_ratio=0.5,
                intermediate_size=128,
            ).to_dict(),
            text_config=tiny("Llama4TextConfig", intermediate_size_mlp=INNER, attention_chunk_size=32).to_dict(),
            image_token_index=IMAGE_TOKEN,
            boi_token_index=95,
            eoi_token_index=96,
        ),
        lambda: {**with_image(4), **image()},
    ),
    "internvl": model(
        "InternVLForConditionalGeneration",
        lambda: transformers.InternVLConfig(
            vision_config=tiny("InternVLVisionConfig", image_size=[16, 16], patch_size=[4, 4]).to_dict(),
            text_config=tiny("Qwen2Config").to_dict(),
            image_token_id=IMAGE_TOKEN,
            downsample_ratio=0.5,
        ),
        lambda: {**with_image(4), **image()},
    ),
    "git": model(
        "GitForCausalLM", "GitConfig", lambda: {**text(), **image()}, vision_config=tiny("GitVisionConfig").to_dict()
    ),
    "vilt": model("ViltForQuestionAnswering", "ViltConfig", lambda: {**text(), **image()}),
    "owlvit": model(
        "OwlViTForObjectDetection",
        lambda: transformers.OwlViTConfig(
            text_config=tiny("OwlViTTextConfig", max_position_embeddings=16).to_dict(),
            vision_config=tiny("OwlViTVisionConfig").to_dict(),
            projection_dim=WIDTH,
        ),
        lambda: {**text(), **image()},
    ),
    "layoutlmv3": model(
        "LayoutLMv3ForSequenceClassification",
        "LayoutLMv3Config",
        lambda: {**text(), "bbox": torch.ones(2, 9, 4, dtype=torch.long), **image()},
        input_size=16,
        coordinate_size=6,
        shape_size=4,
        max_2d_position_embeddings=64,
        rel_pos_bins=8,
        rel_2d_pos_bins=8,
    ),
    "vision_encoder_decoder": model(
        "VisionEncoderDecoderModel",
        lambda: transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            tiny("ViTConfig"),
            tiny("GPT2Config", add_cross_attention=True, is_decoder=True),
            decoder_start_token_id=1,
            pad_token_id=0,
        ),
        lambda: {**image(), "decoder_input_ids": tokens(T=5)["input_ids"]},
    ),
    "llava_next": model(
        "LlavaNextForConditionalGeneration",
        lambda: transformers.LlavaNextConfig(
            vision_config=tiny("CLIPVisionConfig"),
            text_config=tiny("LlamaConfig"),
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=[[16, 16]],
            vision_feature_layer=-1,
            pad_token_id=0,
        ),
        lambda: {
            **with_image(36),
            "pixel_values": noise(2, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16], [16, 16]]),
        },
    ),
    "chameleon": model(
        "ChameleonForConditionalGeneration",
        "ChameleonConfig",
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "resolution": 16,
            "num_res_blocks": 1,
            "latent_channels": 8,
        },
        vocabulary_map={"<image>": 4},
    ),
}
