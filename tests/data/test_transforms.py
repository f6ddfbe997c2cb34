"""Batches: the deterministic path, and augmentation as a function of seed and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from medlore.data.images.imageset import ImageItem
from medlore.data.images.transforms import Preprocessing, TrainAugmentation, batches, decode, eval_batch, normalise, resized
from medlore.errors import DataError, InputError

PLAIN = Preprocessing(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def items(count: int = 3, size: tuple[int, int] = (20, 14)) -> list[ImageItem]:
    generator = np.random.default_rng(0)
    return [ImageItem(str(i), generator.integers(0, 255, (*size, 3), dtype=np.uint8), ()) for i in range(count)]


def test_eval_batch_is_resize_then_normalise() -> None:
    preprocessing = Preprocessing(8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), interpolation="bilinear")
    found = eval_batch(items(), preprocessing)
    source = items()[1].source
    assert isinstance(source, np.ndarray)
    expected = np.asarray(Image.fromarray(source).resize((8, 8), Image.Resampling.BILINEAR)).astype(np.float32) / 255
    expected = (expected - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert found.shape == (3, 3, 8, 8)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[1].permute(1, 2, 0), torch.tensor(expected, dtype=torch.float32))


def test_decode_keeps_bytes_and_size() -> None:
    kept = decode(items(), PLAIN)
    assert (kept.shape, kept.dtype) == ((3, 3, 8, 8), torch.uint8)
    assert torch.equal(normalise(kept, PLAIN), eval_batch(items(), PLAIN))
    assert decode([], PLAIN).shape == (0, 3, 8, 8)
    same = np.zeros((8, 8, 3), np.uint8)
    assert resized(same, 8) is same
    with pytest.raises(DataError, match="a source of type str"):
        decode([ImageItem("x", "text", ())], PLAIN)  # type: ignore[arg-type]


def test_batches_drop_nothing() -> None:
    assert [list(range(10))[part] for part in batches(10, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(batches(0, 4)) == []


def test_augmentation_is_a_function_of_seed_and_step() -> None:
    images = decode(items(6), PLAIN)
    augment = TrainAugmentation(PLAIN, seed=3, flip="both")
    first = augment(images, step=5)
    augment(images, step=9)
    torch.manual_seed(123)
    assert torch.equal(augment(images, step=5), first), "what was drawn before does not matter"
    assert torch.equal(TrainAugmentation(PLAIN, seed=3, flip="both")(images, step=5), first)
    assert not torch.equal(augment(images, step=6), first)
    assert not torch.equal(TrainAugmentation(PLAIN, seed=4, flip="both")(images, step=5), first)


def test_augmentation_leaves_the_global_state_and_the_input_alone() -> None:
    images = decode(items(2), PLAIN)
    before = images.clone()
    state = torch.get_rng_state()
    found = TrainAugmentation(PLAIN)(images, step=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    floats = images.float() / 255
    kept = floats.clone()
    TrainAugmentation(PLAIN)(floats, step=0)
    assert torch.equal(floats, kept)
    assert (found.min() >= 0, found.max() <= 1) == (True, True)


def test_images_of_a_batch_are_drawn_apart() -> None:
    images = decode(items(1), PLAIN).repeat(4, 1, 1, 1)
    found = TrainAugmentation(PLAIN)(images, step=0)
    assert not torch.equal(found[0], found[1])


def test_nothing_is_flipped_unless_asked() -> None:
    still = {"crop": (1.0, 1.0), "aspect": (1.0, 1.0), "degrees": 0.0, "light": 0.0}
    images = decode(items(8), PLAIN)
    torch.testing.assert_close(TrainAugmentation(PLAIN, **still)(images, step=1), images.float() / 255, atol=1e-5, rtol=0)  # type: ignore[arg-type]
    flipped = TrainAugmentation(PLAIN, flip="horizontal", **still)(images, step=1)  # type: ignore[arg-type]
    plain = images.float() / 255
    turned = [bool(torch.allclose(f, p.flip(-1), atol=1e-5)) for f, p in zip(flipped, plain, strict=True)]
    kept = [bool(torch.allclose(f, p, atol=1e-5)) for f, p in zip(flipped, plain, strict=True)]
    assert all(t != k for t, k in zip(turned, kept, strict=True))
    assert any(turned)
    assert any(kept)


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match="interpolation"):
        Preprocessing(8, interpolation="cubic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positive std"):
        Preprocessing(8, std=(0.0, 1.0, 1.0))
    with pytest.raises(InputError, match="flip"):
        TrainAugmentation(PLAIN, flip="sideways")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="crop"):
        TrainAugmentation(PLAIN, crop=(0.0, 1.0))
