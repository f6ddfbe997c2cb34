"""What the demo does."""

from __future__ import annotations

from medlore.assets import PREFIX
from medlore.runs.settings import Settings, setting

SHIPPED = f"{PREFIX}seg-mini"


class DemoSettings(Settings):
    """What the demo does; the defaults take less than four minutes on two cores."""

    draws: int = setting(3, "Few-shot draws for each method.", ge=1)
    shots: int = setting(5, "Labelled images per class.", ge=1, le=50)
    segmenter: str = setting(SHIPPED, "Pack that segments the brain.", path=True)
    model: str = setting("medlore:vit-mini", "Backbone that is tuned.", path=True)
    epochs: int = setting(12, "Passes over the training images.", ge=1)
    batch_size: int = setting(8, "Images per step.", ge=1)
    test_images: int = setting(400, "Number of test images.", ge=50, le=1000)
    seed: int = setting(0, "Seed of the draws and of the test images.", ge=0)
