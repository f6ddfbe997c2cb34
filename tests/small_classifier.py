"""A classifier's pack with random experts that do something: what the tests of packs and of export run on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from medlore.decomposing.classifiers.ranks import adapted_layers
from medlore.layers.experts.layer import ExpertLayer
from medlore.layers.experts.surgery import install_experts
from medlore.models.backbones.students import StudentKind, build_student, feature_width
from medlore.models.classifier_pack import ExpertEntry, save_classifier_pack
from medlore.models.multitask import MultiTaskNetwork

SIZE = 32


def make_pack(folder: Path, kind: StudentKind) -> Path:
    """A pack with random experts that do something."""
    torch.manual_seed(0)
    body = build_student(kind, image_size=SIZE)
    width = feature_width(body, SIZE)
    layers = adapted_layers(body)
    install_experts(body, experts=["one", "two"], ranks={"one": 2, "two": 3}, targets=lambda name, _module: name in layers, scaling=2.0)
    for layer in body.modules():
        if isinstance(layer, ExpertLayer):
            for factor in layer.lora_B.values():
                nn.init.normal_(factor, std=0.02)
    network = MultiTaskNetwork(body, {"one": 2, "two": 4}, width=width, experts=True).eval()
    entries = {}
    for name, classes in (("one", ("no", "yes")), ("two", tuple("abcd"))):
        ranks = {layer: m.ranks[name] for layer, m in body.named_modules() if isinstance(m, ExpertLayer)}
        entries[name] = ExpertEntry(name, classes, "single", ranks)
    preprocessing = {"image_size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    student = {"kind": kind, "norm": "group", "stem_stride": 2}
    return save_classifier_pack(
        folder, network, student=student, experts=entries, preprocessing=preprocessing, layout="channel", weights="fp32"
    )
