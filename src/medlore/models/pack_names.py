"""Names of the files of a pack, for those who read one without torch."""

from __future__ import annotations

MANIFEST = "manifest.json"
BASE = "base.safetensors"
