"""Changed views of the shots: the same for an image whatever stands beside it, part of the probe, and absent where nothing may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from medlore.data.images.imageset import ImageSet, from_arrays
from medlore.data.images.transforms import Preprocessing, normalise
from medlore.errors import DataError, InputError
from medlore.models.backbones.reading import load_backbone
from medlore.training.accelerator import make_accelerator
from medlore.tuning.examples import image_examples, preprocessing_of
from medlore.tuning.finetune import finetune
from medlore.tuning.frozen import FrozenFeatures
from medlore.tuning.settings import FinetuneSettings
from medlore.tuning.training import predict_logits
from medlore.tuning.views import MOST_IMAGES, View
from tiny_backbone import striped, write_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "vit")


def test_a_view_of_an_image_does_not_depend_on_what_stands_beside_it() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8))
    how = Preprocessing(16)
    together = View(1).of(images, how)
    assert torch.equal(View(1).of(images[2:3], how)[0], together[2])
    assert torch.equal(View(1).of(images.flip(0), how).flip(0), together)
    assert not torch.equal(View(2).of(images, how), together)
    assert 0.01 < float((together - normalise(images, how)).abs().mean()) < 1  # changed, and gently: white noise moves fully by a pixel


def test_a_flip_is_only_there_where_it_is_allowed() -> None:
    half = torch.zeros((8, 3, 16, 16), dtype=torch.uint8)
    half[:, :, :, 10:] = 200
    half[:, 0, 0, 0] = torch.arange(8, dtype=torch.uint8)  # eight images, eight draws

    def mirrored(view: View) -> int:
        seen = view.of(half, Preprocessing(16))
        return int((seen[..., :4].mean(dim=(1, 2, 3)) > seen[..., -4:].mean(dim=(1, 2, 3))).sum())

    assert mirrored(View(1)) == 0
    assert 0 < mirrored(View(1, "horizontal")) < 8


def test_the_probe_is_the_regression_on_images_and_views(backbone: Path) -> None:
    pool, test = striped(4), striped(6, seed=1)
    settings = FinetuneSettings(model=str(backbone), method="linear-probe", features="own", probe_strength=0.3, probe_views=3, bootstrap=0)
    found = finetune(settings, train=pool, test=test)
    network = load_backbone(backbone, classes=3)
    accelerator = make_accelerator("cpu", "fp32", None)
    network.model.set_submodule(network.head_name, torch.nn.Identity())

    def features(images: ImageSet, view: View | None = None) -> np.ndarray[Any, Any]:
        inputs = image_examples(images, preprocessing_of(network)).inputs
        if view is None:
            return predict_logits(network.model, inputs, len(images), accelerator=accelerator).numpy()
        pixels = torch.stack([torch.from_numpy(np.asarray(item.source)).expand(3, -1, -1) for item in images.items])
        with torch.inference_mode():
            return network.model.eval()(pixel_values=view.of(pixels, preprocessing_of(network))).logits.numpy()  # type: ignore[no-any-return]

    near = np.concatenate([features(pool), *(features(pool, View(number)) for number in (1, 2, 3))])
    mean, deviation = near.mean(0), near.std(0)
    theirs = LogisticRegression(C=0.3 / 4, tol=1e-9, max_iter=20_000).fit((near - mean) / deviation, np.tile(pool.targets(), 4))
    assert np.allclose(found.scores, theirs.predict_proba((features(test) - mean) / deviation), atol=2e-4)
    assert found.report["probe"]["views"] == 3


def test_features_of_views_are_kept_apart_from_those_of_images(backbone: Path) -> None:
    network, images, store = load_backbone(backbone, classes=3), striped(3), FrozenFeatures()
    how: dict[str, Any] = {"accelerator": make_accelerator("cpu", "fp32", None)}
    plain = store.read(network, images, None, **how)
    viewed = store.read(network, images, None, view=View(1), **how)
    assert np.array_equal(store.read(network, images, None, **how), plain)
    assert np.abs(viewed - plain).max() > 1e-3
    part = FrozenFeatures().read(network, images.subset([4, 2]), None, view=View(1), **how)
    assert np.allclose(part, viewed[[4, 2]], atol=1e-5)


def test_many_images_and_unchanged_ones_have_no_views(backbone: Path) -> None:
    assert FinetuneSettings().views() == 4
    assert FinetuneSettings(augment=False).views() == 0
    assert FinetuneSettings(start="random").views() == 0
    many = striped(MOST_IMAGES // 3 + 1)
    settings = FinetuneSettings(model=str(backbone), method="linear-probe", features="own", bootstrap=0, validation_fraction=0)
    assert finetune(settings, train=many, test=striped(2)).report["probe"]["views"] == 0


def test_mirroring_acts_on_a_probe_with_views_alone(backbone: Path) -> None:
    settings = FinetuneSettings(model=str(backbone), method="linear-probe", features="own", flip="horizontal", bootstrap=0)
    mirrored = finetune(settings, train=striped(4), test=striped(4, seed=1))
    plain = finetune(settings.changed(flip="none"), train=striped(4), test=striped(4, seed=1))
    assert not np.allclose(mirrored.scores, plain.scores)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"--flip: can have no effect.*without views"):
        finetune(settings.changed(probe_views=0), train=striped(4))
    with pytest.raises(InputError, match=r"--probe-views: can have no effect.*--no-augment"):
        finetune(FinetuneSettings(model=str(backbone), augment=False, probe_views=2), train=striped(4))


@pytest.mark.parametrize("method", ["linear-probe", "sr-lora"])
@pytest.mark.parametrize("features", ["own", "auto"])
def test_features_that_are_not_numbers_are_one_clear_error(method: str, features: str, backbone: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    huge = Path(shutil.copytree(backbone, tmp_path / "huge"))
    weights = load_file(huge / "model.safetensors")
    weights["vit.layernorm.weight"][:] = 3e38  # finite themselves; weights that are not are refused when they are read
    save_file(weights, huge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError) as caught:
        finetune(FinetuneSettings(model=str(huge), method=method, features=features), train=striped(4), test=striped(2))
    error = caught.value
    assert "features" in error.where
    assert "not finite in 12 images" in error.came
    assert error.accepted
    assert error.fix


@pytest.mark.parametrize("method", ["linear-probe", "sr-lora"])
def test_features_that_do_not_differ_are_one_clear_error(method: str, backbone: Path) -> None:
    same = from_arrays([np.full((16, 16), 90, np.uint8)] * 12, np.repeat([0, 1, 2], 4), classes=["a", "b", "c"], name="blank")
    with pytest.raises(DataError, match=r"blank, features.*the same for every image.*check the images"):
        finetune(FinetuneSettings(model=str(backbone), method=method), train=same, test=striped(2))
