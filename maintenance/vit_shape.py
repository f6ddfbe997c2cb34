"""The shape of a small ViT, and the folder in which it is shipped: what pre-training and distillation have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import ViTConfig

from medlore.files import atomic_folder, write_json
from medlore.runs.settings import Settings

CHANNEL_MEAN = CHANNEL_STD = (0.5, 0.5, 0.5)
_OF_A_CLASSIFIER = {"id2label", "label2id", "_attn_implementation"}


class VitShape(Settings):
    """Sizes of the network; images are square, in pixels."""

    image_size: int = 64
    patch_size: int = 8
    width: int = 256
    depth: int = 8
    heads: int = 4
    mlp_width: int = 512

    def config(self, **more: Any) -> ViTConfig:
        """The configuration of transformers."""
        return ViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp_width,
            **more,
        )


def export_vit(config: ViTConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors under `vit.` as an ordinary transformers folder in float16."""
    described = {k: v for k, v in config.to_dict().items() if k not in _OF_A_CLASSIFIER} | {
        "architectures": ["ViTModel"],
        "dtype": "float16",
    }
    tensors = {name.removeprefix("vit."): value.half().contiguous() for name, value in weights.items() if name.startswith("vit.")}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
        write_json(temporary / "config.json", described)
        write_json(temporary / "preprocessor_config.json", _preprocessing(config.image_size))


def _preprocessing(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CHANNEL_MEAN),
        "image_std": list(CHANNEL_STD),
    }
