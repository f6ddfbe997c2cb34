"""Weights and inputs that are a formula of their names, so that numbers of the official modules can be repeated without their files."""

from __future__ import annotations

import ast
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def formula_weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The weight that the golden numbers were computed with; `key` without `module.` or `model.module.`."""
    size = math.prod(shape)
    wave = 43758.5453123 * np.sin(12.9898 * np.arange(size) + 0.11 * (zlib.crc32(key.encode()) % 1000) + 1)
    base = (2 * (wave - np.floor(wave)) - 1).reshape(shape)
    if "lora_" in key:
        value = 0.02 * base
    elif key.endswith("bias"):
        value = 0.05 * base
    elif len(shape) == 1:
        value = 1 + 0.1 * base
    else:
        value = base * math.sqrt(2 * shape[0] / size)
    return torch.from_numpy(value.astype(np.float32))


def golden_window() -> Tensor:
    """Two windows of 64 x 64 x 32, grey repeated to three channels."""
    h = torch.arange(64, dtype=torch.float64)[:, None, None]
    w = torch.arange(64, dtype=torch.float64)[None, :, None]
    d = torch.arange(32, dtype=torch.float64)[None, None, :]
    grey = torch.stack([torch.sin(0.1 * h + 0.2 * w * (b + 1) + 0.3 * d + b) + 0.2 * torch.cos(0.05 * h * d) for b in range(2)])
    return grey.float()[:, None].expand(-1, 3, -1, -1, -1)


def golden_queries() -> Tensor:
    """Five prompts of width 768."""
    k = torch.arange(768, dtype=torch.float64)
    return torch.stack([torch.sin(0.01 * k * (n + 1) + n) for n in range(5)]).float()


def read_key_list(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a published file."""
    lines = (line.split("\t") for line in path.read_text().splitlines() if line)
    return {name: tuple(ast.literal_eval(shape)) for name, shape in lines}


def assert_golden(value: Tensor, expected: dict[str, Any], *, tolerance: float = 1e-4) -> None:
    """Shape, mean, spread, extremes and single points agree."""
    assert list(value.shape) == expected["shape"]
    flat = value.reshape(-1).double()
    seen = {"mean": flat.mean(), "std": flat.std(), "min": flat.min(), "max": flat.max()}
    for name, number in seen.items():
        assert abs(float(number) - expected[name]) <= tolerance, name
    assert float(flat.abs().sum()) == pytest.approx(expected["abs_sum"], rel=1e-6)
    for index, number in expected["pts"].items():
        assert abs(float(flat[int(index)]) - number) <= tolerance, f"point {index}"


def read_golden(path: Path) -> dict[str, Any]:
    """Summary numbers of one forward."""
    return dict(json.loads(path.read_text()))
