"""Image classification, detection, segmentation and depth."""

from functools import partial

import torch
import transformers

from tests.zoo.models.tiny import INNER, features, image, model, tiny


def detr_config(name):
    """With a convolutional backbone."""
    backbone = tiny("ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    no_timm = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    return tiny(name, num_queries=5, backbone_config=backbone, **no_timm)


def sam_config():
    vision = tiny(
        "SamVisionConfig",
        image_size=32,
        output_channels=8,
        mlp_dim=INNER,
        window_size=4,
        num_pos_feats=4,
        global_attn_indexes=[1],
        mlp_ratio=2.0,
    )
    prompts = tiny("SamPromptEncoderConfig", hidden_size=8, image_size=32, mask_input_channels=4)
    masks = tiny(
        "SamMaskDecoderConfig",
        hidden_size=8,
        mlp_dim=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        iou_head_hidden_dim=8,
        iou_head_depth=2,
    )
    configs = {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": masks}
    return transformers.SamConfig(**{name: config.to_dict() for name, config in configs.items()})


VISION = {
    "vit": model("ViTForImageClassification", "ViTConfig", image),
    "deit": model("DeiTForImageClassification", "DeiTConfig", image),
    "dinov2": model("Dinov2ForImageClassification", "Dinov2Config", image),
    "dinov2_reg": model("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", image),
    "dinov3_vit": model("DINOv3ViTModel", "DINOv3ViTConfig", image, num_register_tokens=2),
    "dinov3_convnext": model(
        "DINOv3ConvNextModel",
        "DINOv3ConvNextConfig",
        partial(image, 32),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        image_size=32,
    ),
    "swin": model(
        "SwinForImageClassification", "SwinConfig", image, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2
    ),
    "swinv2": model(
        "Swinv2ForImageClassification",
        "Swinv2Config",
        image,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 4],
        window_size=2,
    ),
    "convnext": model(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        partial(image, 32),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        image_size=32,
    ),
    "convnextv2": model(
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        partial(image, 32),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        image_size=32,
    ),
    "beit": model("BeitForImageClassification", "BeitConfig", image, out_indices=...),
    "data2vec_vision": model("Data2VecVisionForImageClassification", "Data2VecVisionConfig", image, out_indices=...),
    "siglip_vision": model("SiglipVisionModel", "SiglipVisionConfig", image),
    "clip_vision": model("CLIPVisionModelWithProjection", "CLIPVisionConfig", image, projection_dim=16),
    "segformer": model(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        partial(image, 64),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        patch_sizes=[7, 3, 3, 3],
        decoder_hidden_size=16,
        image_size=64,
    ),
    "resnet": model(
        "ResNetForImageClassification",
        "ResNetConfig",
        partial(image, 32),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
    ),
    "regnet": model(
        "RegNetForImageClassification",
        "RegNetConfig",
        partial(image, 32),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        groups_width=8,
    ),
    "mobilenet_v2": model(
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        partial(image, 32),
        image_size=32,
        depth_multiplier=0.25,
    ),
    "mobilevit": model(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        partial(image, 64),
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
        image_size=64,
        patch_size=2,
    ),
    "pvt_v2": model(
        "PvtV2ForImageClassification",
        "PvtV2Config",
        partial(image, 32),
        image_size=32,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "hiera": model(
        "HieraForImageClassification",
        "HieraConfig",
        partial(image, 64),
        embed_dim=8,
        image_size=[64, 64],
        patch_size=[7, 7],
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        mlp_ratio=2.0,
        hidden_size=...,
        num_hidden_layers=...,
        num_attention_heads=...,
    ),
    "focalnet": model(
        "FocalNetForImageClassification",
        "FocalNetConfig",
        image,
        embed_dim=8,
        depths=[1, 1],
        focal_levels=[1, 1],
        focal_windows=[3, 3],
        hidden_sizes=...,
    ),
    "poolformer": model(
        "PoolFormerForImageClassification",
        "PoolFormerConfig",
        partial(image, 32),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        patch_size=16,
    ),
    "cvt": model(
        "CvtForImageClassification",
        "CvtConfig",
        partial(image, 32),
        embed_dim=[8, 16, 24],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        drop_path_rate=[0.0, 0.0, 0.0],
        drop_rate=[0.0] * 3,
        attention_drop_rate=[0.0] * 3,
    ),
    "vit_mae": model(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        image,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_intermediate_size=24,
        decoder_num_attention_heads=4,
    ),
    "ijepa": model("IJepaForImageClassification", "IJepaConfig", image),
    "yolos": model("YolosForObjectDetection", "YolosConfig", image, image_size=[16, 16], num_detection_tokens=3),
    "dpt": model(
        "DPTForDepthEstimation",
        "DPTConfig",
        partial(image, 32),
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
        is_hybrid=False,
        image_size=32,
        patch_size=16,
    ),
    "glpn": model(
        "GLPNForDepthEstimation",
        "GLPNConfig",
        partial(image, 64),
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        patch_sizes=[7, 3, 3, 3],
    ),
    "vitdet": model("VitDetModel", "VitDetConfig", image),
    "pixio": model("PixioModel", "PixioConfig", image),
    "swin2sr": model(
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        image,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        patch_size=1,
        upscale=2,
    ),
    "detr": model("DetrForObjectDetection", partial(detr_config, "DetrConfig"), partial(image, 64)),
    "conditional_detr": model(
        "ConditionalDetrForObjectDetection", partial(detr_config, "ConditionalDetrConfig"), partial(image, 64)
    ),
    "sam": model(
        "SamModel", sam_config, lambda: {**image(32), "input_points": torch.tensor([[[[4.0, 5.0]]], [[[6.0, 7.0]]]])}
    ),
    "siglip2_vision": model(
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        lambda: {
            **features(2, 16, 48, key="pixel_values"),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        },
        num_patches=16,
    ),
}
