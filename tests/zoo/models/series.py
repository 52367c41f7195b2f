"""Series of measurements."""

import torch

from tests.zoo.models.tiny import WIDTH, features, model, noise

SERIES = {
    "patchtst": model(
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        lambda: features(2, 32, 2, key="past_values"),
        num_input_channels=2,
        context_length=32,
        prediction_length=4,
        patch_length=4,
        patch_stride=4,
        random_mask_ratio=0.0,
        head_dropout=0.0,
    ),
    "decision_transformer": model(
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        lambda: {
            "states": noise(2, 6, 5),
            "actions": noise(2, 6, 3, seed=1),
            "rewards": torch.ones(2, 6, 1),
            "returns_to_go": torch.ones(2, 6, 1),
            "timesteps": torch.arange(6).repeat(2, 1),
            "attention_mask": torch.ones(2, 6),
        },
        state_dim=5,
        act_dim=3,
        max_ep_len=20,
        hidden_size=WIDTH,
    ),
}
