"""Image classifiers over networks for which transformers has none of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, DINOv3ViTConfig, DINOv3ViTModel, DINOv3ViTPreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput


class DINOv3Classifier(DINOv3ViTPreTrainedModel):  # type: ignore[misc,unused-ignore]
    """A linear head on the class token and the mean of the patch tokens, as transformers has it for DINOv2.

    Saved and loaded like a network of transformers; a folder of the bare network loads too.

    Source: Oquab et al., "DINOv2", 2023, section 7.1 (class token and mean of the patches).
    """

    base_model_prefix = "dinov3"

    def __init__(self, config: DINOv3ViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3 = DINOv3ViTModel(config)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    def forward(self, pixel_values: Tensor, **options: Any) -> ImageClassifierOutput:
        """Images (b, 3, h, w) -> logits (b, classes)."""
        seen = self.dinov3(pixel_values, **options)
        tokens = seen.last_hidden_state  # b n d: class token, registers, patches
        patches = tokens[:, 1 + self.config.num_register_tokens :]
        features = torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)
        return ImageClassifierOutput(logits=self.classifier(features), hidden_states=seen.hidden_states, attentions=seen.attentions)


AutoModelForImageClassification.register(DINOv3ViTConfig, DINOv3Classifier)
