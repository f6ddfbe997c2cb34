"""What pre-training is worth: few-shot classification on frozen features, against the same network at its random start.

Run with ``python -m maintenance.transfer --model medlore:vit-mini SET...``; the card of `medlore:vit-mini` carries the
numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from maintenance.pretrain_network import build_vit
from maintenance.pretrain_settings import PretrainSettings
from medlore.data.images.fewshot import draw_shots
from medlore.data.images.imageset import ImageSet
from medlore.data.images.reading import read_images
from medlore.errors import InputError, MedloreError
from medlore.files import json_text
from medlore.layers.surgery import without_head
from medlore.metrics.draws import DrawMean, mean_difference, mean_of_draws
from medlore.models.backbones.reading import Backbone, load_backbone
from medlore.tuning.examples import image_examples, preprocessing_of


@dataclass(frozen=True)
class Transfer:
    """Balanced accuracy on frozen features, over draws.

    Attributes:
        trained: of the pre-trained network.
        untrained: of the same network at its random start.
        gain: the difference, draw by draw.
    """

    trained: DrawMean
    untrained: DrawMean
    gain: DrawMean


def measure_transfer(model: str, images: ImageSet, *, shots: int = 20, draws: int = 5, most: int = 100, seed: int = 0) -> Transfer:
    """Logistic regression on frozen features of `shots` images a class, judged on all other images.

    Args:
        model: a ViT of the shape that `maintenance.pretrain` trains.
        images: a labelled set that the model has not seen, one class an image.
        shots: labelled images a class.
        draws: how many draws.
        most: images a class that are looked at; the rest of larger sets is left out.
        seed: of the draws, and of the network that stays untrained.

    Raises:
        InputError: not such a ViT, or a multi-label set.
        DataError: a class with too few images.
    """
    if images.task != "single":
        raise InputError(images.source, "several labels an image", "one class an image", "use another set")
    backbone = load_backbone(model, classes=2)
    settings, images = _shape_of(backbone), _at_most(images, most, seed)
    trained, untrained = features(backbone.model, backbone, images), features(build_vit(settings, 2), backbone, images)
    place = {key: i for i, key in enumerate(images.keys)}
    targets = images.targets()
    scores: tuple[list[float], list[float]] = ([], [])
    for number in range(1, draws + 1):
        drawn = draw_shots(images, shots=shots, draw=number, seed=seed)
        rows, others = ([place[key] for key in part.keys] for part in (drawn.train, drawn.validation))
        for found, values in zip(scores, (trained, untrained), strict=True):
            found.append(_judge(values, targets, rows, others))
    return Transfer(mean_of_draws(scores[0]), mean_of_draws(scores[1]), mean_difference(*scores))


def _at_most(images: ImageSet, most: int, seed: int) -> ImageSet:
    """A seeded choice of `most` images a class."""
    targets, draw = images.targets(), np.random.default_rng(seed)
    chosen = [draw.permutation(np.flatnonzero(targets == k))[:most] for k in range(len(images.classes))]
    return images.subset(np.sort(np.concatenate(chosen)).tolist())


@torch.inference_mode()
def features(model: nn.Module, backbone: Backbone, images: ImageSet) -> NDArray[np.float32]:
    """What the head of `model` sees of each image, prepared as `backbone` wants it: (b, d)."""
    examples = image_examples(images, preprocessing_of(backbone))
    model.eval()
    with without_head(model, backbone.head_name) as body:
        network: Any = body
        parts = np.array_split(np.arange(len(images)), max(1, len(images) // 64))
        rows = [network(pixel_values=examples.inputs(part, step=None)).logits for part in parts]
    return torch.cat(rows).numpy()


def _judge(values: NDArray[np.float32], targets: NDArray[Any], rows: Sequence[int], others: Sequence[int]) -> float:
    """Balanced accuracy on `others` of a logistic regression whose penalty is chosen by cross-validation inside `rows`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier = GridSearchCV(pipeline, {"logisticregression__C": [0.001, 0.01, 0.1, 1.0]}, cv=5).fit(values[rows], targets[rows])
    return float(balanced_accuracy_score(targets[others], classifier.predict(values[others])))


def _shape_of(backbone: Backbone) -> PretrainSettings:
    """Settings whose random start has the shape of `backbone`, at the seed of the pre-training."""
    config: Any = backbone.model.config
    if backbone.family != "vit":
        raise InputError(backbone.source, f"a {backbone.family}", "a ViT", "compare with medlore:vit-mini")
    return PretrainSettings(
        archives=(),
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_width=config.intermediate_size,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: one JSON object with an entry for each set."""
    parser = argparse.ArgumentParser(prog="python -m maintenance.transfer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sets", nargs="+", type=Path, help="folders or zips with one subfolder for each class")
    parser.add_argument("--model", default="medlore:vit-mini")
    parser.add_argument("--shots", type=int, default=20)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--most", type=int, default=100, help="images a class that are looked at")
    given = parser.parse_args(arguments)
    found = {}
    try:
        for path in given.sets:
            transfer = measure_transfer(given.model, read_images(path), shots=given.shots, draws=given.draws, most=given.most)
            found[path.stem] = {name: str(getattr(transfer, name)) for name in ("trained", "untrained", "gain")}
    except MedloreError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    sys.stdout.write(json_text(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
