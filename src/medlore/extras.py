"""Optional packages: which extra brings each, asked in one place.

The core holds what `ranks`, `finetune` and `segment` need. Whatever else a verb uses is imported where it is used, through
`require`, so that a missing package is one sentence with the pip command that brings it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from medlore.errors import MissingExtraError

# extra -> the packages that it brings, as they are imported; pyproject.toml holds the versions (a test compares both)
EXTRAS: dict[str, tuple[str, ...]] = {
    "demo": ("nilearn", "sklearn"),
    "dicom": ("pydicom", "highdicom", "contourpy"),
    "fast": ("threadpoolctl",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "pages": ("jinja2",),
    "plots": ("matplotlib",),
    "ray": ("ray",),
    "tracking": ("tensorboard",),
}


def require(module: str, where: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: dotted name, e.g. `matplotlib.figure`.
        where: what needs it: a flag, a verb or a file.

    Raises:
        MissingExtraError: the package is not installed; the message names the pip command.
    """
    package = module.split(".", maxsplit=1)[0]
    if not is_installed(package):
        raise MissingExtraError(where, package, extra_of(package))
    return importlib.import_module(module)


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not."""
    return importlib.util.find_spec(package) is not None


def extra_of(package: str) -> str:
    """The extra that brings a package.

    Examples:
        >>> extra_of("pydicom")
        'dicom'
    """
    return next(extra for extra, packages in EXTRAS.items() if package in packages)


def import_without(module: str, package: str) -> None:
    """Import a module as if a package that it uses for a rare case were not installed; for a process that is ours alone.

    Args:
        module: stays without the package as long as the process lasts; nothing happens where it is loaded already.
        package: can be imported afterwards.
    """
    if module in sys.modules or package in sys.modules:
        return
    sys.modules[package] = None  # type: ignore[assignment]  # what makes an import of it fail
    try:
        importlib.import_module(module)
    finally:
        del sys.modules[package]
