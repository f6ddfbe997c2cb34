"""Families of image networks: one record each, in one table; a new family is one new entry of `FAMILIES`.

A record says all that reading a network of transformers needs to know of its architecture: which configurations name it, which class
holds it, with which statistics its published checkpoints were trained, and what another input size changes. Where its blocks, matrices
and norms are, nobody needs to say: they are found by structure (`ranks.targets`, `layers.surgery`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Triple = tuple[float, float, float]

_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: in reports and settings.
        caption: for people.
        model_types: transformers' words for its configurations.
        statistics: mean and standard deviation of the images in [0, 1] of the published checkpoints; used only where a checkpoint
            itself says nothing, and the report says so.
        network: configuration -> class whose `from_pretrained` reads it; `model(pixel_values=x).logits`, unless `classifier` makes that.
        classifier: network without a head -> image classifier around it; None where `network` gives one.
        prepare: configuration -> the configuration that is built; to leave out parts that have no bearing on the logits.
        width: configuration of the image network -> width of the features that the head reads.
        prefix_tokens: rows of the table of positions that stand before those of the patches (class token and its like).
        any_size: a convolutional network, which takes every size as it is.
        whole_patches: whether the input must be a multiple of the patch.
        smallest: configuration of the image network -> smallest input that works, and the smallest whole one to advise, in pixels;
            None for one patch.
        reads: of a network of tokens that can be cut and read otherwise (`cutting`): what its head reads, the class token or that and
            the mean of the patches; None for one that cannot.
    """

    name: str
    caption: str
    model_types: tuple[str, ...]
    statistics: tuple[Triple, Triple]
    network: Callable[[Any], Any]
    classifier: Callable[[Any], Any] | None = None
    prepare: Callable[[Any], Any] = lambda config: config
    width: Callable[[Any], int] = lambda config: int(config.hidden_size)
    prefix_tokens: int = 1
    any_size: bool = False
    whole_patches: bool = True
    smallest: Callable[[Any], tuple[int, int]] | None = None
    reads: Literal["cls", "both"] | None = None


def family_of(model_type: str) -> Family | None:
    """The family that a configuration of transformers names."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)


def _of_transformers(name: str) -> Callable[[Any], Any]:
    """The class of transformers with that name, imported when it is asked for."""

    def network(_config: Any) -> Any:
        import transformers

        return getattr(transformers, name)

    return network


def _last_stage(config: Any) -> int:
    return int(config.hidden_sizes[-1])


def _swin_width(config: Any) -> int:
    return int(config.embed_dim * 2 ** (len(config.depths) - 1))


def _swin_smallest(config: Any) -> tuple[int, int]:
    """A Swin's last feature map must hold one attention window, else its table of biases does not fit; halves are rounded up."""
    last = 2 ** (len(config.depths) - 1) * int(config.patch_size)  # pixels of one place of that map
    return (int(config.window_size) - 1) * last + 1, int(config.window_size) * last


def _convnext_smallest(config: Any) -> tuple[int, int]:
    whole = int(config.patch_size) * 2 ** (len(config.depths) - 1)
    return whole, whole


def _clip_network(config: Any) -> Any:
    import transformers

    whole = "CLIPForImageClassification" in (config.architectures or ())
    return transformers.CLIPForImageClassification if whole else transformers.CLIPVisionModel


def _clip_classifier(vision: Any) -> Any:
    """The vision half of CLIP below transformers' own classifier, which averages the patch tokens."""
    import transformers

    model = transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=vision.config.to_dict(), num_labels=2))
    model.vision_model = vision
    return model


def _siglip_network(config: Any) -> Any:
    import transformers

    return transformers.SiglipForImageClassification if config.model_type == "siglip" else transformers.SiglipVisionModel


def _siglip_classifier(vision: Any) -> Any:
    """The vision half of SigLIP below transformers' own classifier, which averages the tokens."""
    import transformers

    model = transformers.SiglipForImageClassification(transformers.SiglipConfig(vision_config=vision.config.to_dict(), num_labels=2))
    model.vision_model = vision
    return model


def _without_pooling_head(config: Any) -> Any:
    """The classifier averages the tokens; SigLIP's own pooling, an attention besides, would only look like something to tune."""
    getattr(config, "vision_config", config).vision_use_head = False
    return config


def _as_vit(config: Any) -> Any:
    """The encoder of a masked auto-encoder is a ViT; its decoder and the masking stay behind."""
    import transformers

    own = transformers.ViTConfig().to_dict()
    return transformers.ViTConfig(**{name: value for name, value in config.to_dict().items() if name in own and name != "model_type"})


def _dinov3(_config: Any) -> Any:
    from medlore.models.backbones.pooled import DINOv3Classifier

    return DINOv3Classifier


def _shufflenet(_config: Any) -> Any:
    from medlore.models.backbones.shufflenet import ShuffleNetV2

    return ShuffleNetV2


def _resnet(config: Any) -> Any:
    import transformers

    from medlore.models.backbones.students import GroupNormResNet, GroupNormResNetConfig

    return GroupNormResNet if config.model_type == GroupNormResNetConfig.model_type else transformers.ResNetForImageClassification


def _two_tokens(config: Any) -> int:
    return 2 * int(config.hidden_size)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("vit", "ViT", ("vit",), _HALF, _of_transformers("ViTForImageClassification"), reads="cls"),
        Family(
            "swin", "Swin", ("swin",), _IMAGENET, _of_transformers("SwinForImageClassification"),
            width=_swin_width, prefix_tokens=0, whole_patches=False, smallest=_swin_smallest,
        ),
        Family(
            "dinov2", "DINOv2", ("dinov2",), _IMAGENET, _of_transformers("Dinov2ForImageClassification"), width=_two_tokens, reads="both",
        ),
        Family(
            "clip", "CLIP", ("clip", "clip_vision_model"), _CLIP, _clip_network,
            classifier=lambda model: model if hasattr(model, "classifier") else _clip_classifier(model),
        ),
        Family("resnet", "ResNet", ("resnet", "medlore-resnet"), _IMAGENET, _resnet, width=_last_stage, any_size=True),
        Family("shufflenet", "ShuffleNetV2", ("medlore-shufflenet",), _HALF, _shufflenet, any_size=True),
        Family(
            "dinov2-registers", "DINOv2 with registers", ("dinov2_with_registers",), _IMAGENET,
            _of_transformers("Dinov2WithRegistersForImageClassification"), width=_two_tokens, reads="both",
        ),
        Family("dinov3", "DINOv3", ("dinov3_vit",), _IMAGENET, _dinov3, width=_two_tokens, prefix_tokens=0),
        Family(
            "siglip", "SigLIP", ("siglip", "siglip_vision_model"), _HALF, _siglip_network,
            classifier=lambda model: model if hasattr(model, "classifier") else _siglip_classifier(model),
            prepare=_without_pooling_head, prefix_tokens=0,
        ),
        Family(
            "swinv2", "Swin V2", ("swinv2",), _IMAGENET, _of_transformers("Swinv2ForImageClassification"),
            width=_swin_width, prefix_tokens=0, whole_patches=False,
        ),
        Family("beit", "BEiT", ("beit",), _HALF, _of_transformers("BeitForImageClassification")),
        Family("deit", "DeiT", ("deit",), _IMAGENET, _of_transformers("DeiTForImageClassification"), prefix_tokens=2),
        Family("mae", "MAE", ("vit_mae",), _IMAGENET, _of_transformers("ViTForImageClassification"), prepare=_as_vit, reads="cls"),
        Family(
            "convnext", "ConvNeXt", ("convnext",), _IMAGENET, _of_transformers("ConvNextForImageClassification"),
            width=_last_stage, any_size=True, smallest=_convnext_smallest,
        ),
        Family(
            "convnextv2", "ConvNeXt V2", ("convnextv2",), _IMAGENET, _of_transformers("ConvNextV2ForImageClassification"),
            width=_last_stage, any_size=True, smallest=_convnext_smallest,
        ),
    )
}  # fmt: skip
