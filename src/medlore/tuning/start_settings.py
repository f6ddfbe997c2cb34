"""Where a tuning starts, which features its head reads, and what is chosen on the shots."""

from __future__ import annotations

from typing import ClassVar, Literal

from medlore.runs.settings import Idle, Subject, setting

TUNED_BY_CV = Idle(lambda s: not s.chosen_on_shots(), "nothing is chosen by cross-validation (--tune cv, --method auto)")
NO_PROBE = Idle(lambda s: s.probing.start == "random", "--start random solves no probe to start from")
UNCHANGED = Idle(lambda s: not s.augmentation.augment, "--no-augment leaves the images as they are")
WHOLE = Idle(lambda s: s.probing.features in ("auto", "own"), "--features auto and own say the block, too")


class StartSettings(Subject):
    """The features that the head reads, and the probe it starts from."""

    title: ClassVar[str] = "Features and start"

    start: Literal["probe", "random"] = setting(
        "probe", "Start the head at the logistic regression on the frozen features, or at random; linear-probe is that regression."
    )
    features: Literal["auto", "own", "cls", "mean", "both"] = setting(
        "auto", "What the head reads: the network's own choice, the class token, the mean of the patches, both; auto asks the shots."
    )
    feature_block: int | None = setting(None, "Block behind which the head reads, from 1; the network ends there.", ge=1, idle=(WHOLE,))
    probe_strength: float | None = setting(
        None, "Inverse penalty of the regression (scikit-learn's C); default by cross-validation and a prior.", gt=0, idle=(NO_PROBE,)
    )
    probe_views: int = setting(
        4, "Gently changed views of each image from which the regression learns too, up to 500 images.", ge=0, idle=(NO_PROBE, UNCHANGED)
    )


class ChoosingSettings(Subject):
    """What is chosen by cross-validation on the shots alone."""

    title: ClassVar[str] = "Choosing on the shots"

    tune: Literal["off", "cv"] = setting("off", "Choose rate and length by repeated cross-validation on the shots; cv or off.")
    budget_minutes: float = setting(5.0, "Time that choosing may take, training afterwards not counted.", gt=0, idle=(TUNED_BY_CV,))
