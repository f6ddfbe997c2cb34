"""New prompts for a pack whose weights stay as they are: they learn, and what was known stays to the last bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from maintenance import seg_mini_prompts as prompts
from medlore.models.segmenter.bundle import load_segmenter
from medlore.models.segmenter.prompts import PromptTable


def write_window(file: Path, seed: int, labels: list[str]) -> None:
    """What the shipped brain expert sees of noise; each label is where one channel of the pixel embeddings is high."""
    network = load_segmenter("medlore:seg-mini").network("brain").eval()
    image = torch.rand(1, network.config.image_channels, 32, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        features = network.encode(image)
    pixels = features.pixels[0].flatten(1)[:, ::8]
    targets = torch.stack([pixels[i] > pixels[i].quantile(0.7) for i in range(len(labels))]).to(torch.uint8)
    np.savez(
        file, tokens=features.tokens[0], grid=np.asarray(features.grid), pixels=pixels.half(), targets=targets, labels=np.asarray(labels)
    )


def test_rows_are_fitted_and_known_rows_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_window(tmp_path / "window-0000.npz", 0, ["cerebral cortex", "third ventricle"])
    write_window(tmp_path / "window-0001.npz", 1, ["thalamus", "cerebral cortex"])
    write_window(tmp_path / "window-0002.npz", 2, ["a label that nobody asks for"])
    out = tmp_path / "prompts.safetensors"
    last = prompts.fit("medlore:seg-mini", tmp_path, out, passes=12, rate=0.3, again=["thalamus"], every=2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 12
    assert last == pytest.approx(float(lines[-1].split()[-1]), abs=1e-3)
    assert last < 0.9 * float(lines[0].split()[-1])
    before, after = load_segmenter("medlore:seg-mini").prompts, PromptTable.read(out)
    assert before is not None
    known = dict(zip(before.keys, before.embeddings, strict=True))
    found = dict(zip(after.keys, after.embeddings, strict=True))
    assert set(found) == set(known) | {f"mri/{label}" for label in prompts.STARTS}
    same = {key for key, row in known.items() if torch.equal(row.float(), found[key].float())}
    asked = {"mri/thalamus", *(f"mri/{label}" for label in prompts.STARTS)}
    assert set(known) - same == asked & set(known)
