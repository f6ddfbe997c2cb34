"""What a frozen teacher says about every image of a pool, computed when first asked for and kept on disk in float16."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 takes pixels


@dataclass(frozen=True, eq=False)
class TeacherStore:
    """Tokens of a DINOv2 for the images of a pool.

    Attributes:
        model: the frozen network.
        images: n s s 3, uint8.
        size: side at which the teacher sees them.
        tokens: n 1+p d, float16 on disk: the class token, then the patches row by row, after the last norm.
        ready: n, 1 where `tokens` is filled.
    """

    model: Any
    images: NDArray[np.uint8]
    size: int
    tokens: NDArray[np.float16]
    ready: NDArray[np.uint8]

    @classmethod
    def open(cls, model: Any, images: NDArray[np.uint8], size: int, folder: Path) -> TeacherStore:
        """The store in `folder`, made when it is not there; one folder belongs to one pool and one teacher."""
        folder.mkdir(parents=True, exist_ok=True)
        patches = (size // model.config.patch_size) ** 2
        tokens = _array(folder / "tokens.npy", np.float16, (len(images), 1 + patches, model.config.hidden_size))
        return cls(
            model.eval().requires_grad_(requires_grad=False), images, size, tokens, _array(folder / "ready.npy", np.uint8, (len(images),))
        )

    def rows(self, chosen: NDArray[np.int64]) -> Tensor:
        """Tokens of the images `chosen`: b 1+p d, float32. What is not stored yet is computed and stored first."""
        missing = np.unique(chosen[self.ready[chosen] == 0])
        for part in np.array_split(missing, -(-len(missing) // 32)) if len(missing) else ():
            self.tokens[part] = self._compute(part)
        if len(missing):
            self.tokens.flush()  # type: ignore[attr-defined]  # a memory map
            self.ready[missing] = 1
        return torch.from_numpy(self.tokens[chosen].astype(np.float32))

    @torch.inference_mode()
    def _compute(self, part: NDArray[np.int64]) -> NDArray[np.float16]:
        pixels = torch.from_numpy(self.images[part]).permute(0, 3, 1, 2).float() / 255
        pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bicubic", align_corners=False).clamp(0, 1)
        pixels = (pixels - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)
        found: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return found.half().numpy()


def _array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    if path.is_file():
        held = np.lib.format.open_memmap(path, mode="r+")
        if held.shape != shape or held.dtype != dtype:
            raise SystemExit(f"{path}: holds {held.shape} {held.dtype}, this pool needs {shape}: name another folder")
        return held
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
