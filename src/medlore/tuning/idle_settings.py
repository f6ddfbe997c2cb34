"""Settings that were given although the run has no use for them: refused, because who gives one believes that it acts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from medlore.assets import PREFIX
from medlore.errors import InputError
from medlore.layers.tuning.methods import METHODS
from medlore.layers.tuning.options import ADAPTER_SIZES
from medlore.tuning.settings import FinetuneSettings

_Test = Callable[[FinetuneSettings], bool]

# Values that ask for nothing, so they may stand anywhere.
_NEUTRAL = {"per": "image", "partial_update": "off", "component_masks": "off", "dropout": 0.0, "flip": "none"}
_WITHOUT_FLAG = {
    "validation_fraction",
    "test_fraction",
    "crop",
    "degrees",
    "light",
    "adapter_scale",
    "adapter_dropout",
    "glora_path",
    "mini_loras",
    "tied_layers",
    "mask_density",
}


def _without_factors(s: FinetuneSettings) -> bool:
    return METHODS[s.method].rule is None


def _one_rank(s: FinetuneSettings) -> bool:
    return METHODS[s.method].rule == "uniform" and s.rank != "equal"


_RULES: tuple[tuple[tuple[str, ...], _Test, str], ...] = (
    (
        ("plan", "ranks", "rank", "scale", "budget", "alpha", "granularity", "dropout", "partial_update"),
        _without_factors,
        "--method {method} has no low-rank factors",
    ),
    (("targets",), lambda s: _without_factors(s) and not s.track_stable_rank, "--method {method} has no low-rank factors"),
    (
        ("ranks", "rank", "scale", "budget", "alpha", "granularity", "targets"),
        lambda s: s.plan is not None,
        "targets, ranks and alphas come from --plan",
    ),
    (("rank", "scale", "budget"), lambda s: s.ranks is not None, "the ranks come from --ranks"),
    (("rank",), lambda s: s.method == "sr-lora", "the ranks of sr-lora follow the stable ranks; --scale and --budget change them"),
    (("scale", "budget", "granularity"), lambda s: s.ranks is None and _one_rank(s), "--method {method} has one rank (--rank)"),
    (("component_masks",), lambda s: s.method != "sr-lora", "only --method sr-lora takes them"),
    (
        ("bottleneck", "adapter_scale", "adapter_dropout"),
        lambda s: s.method not in ADAPTER_SIZES,
        "--method {method} has no adapter with a bottleneck",
    ),
    (("prompt_length",), lambda s: not s.method.startswith("vpt-"), "--method {method} has no prompts"),
    (("glora_path",), lambda s: s.method != "glora", "only --method glora has supports"),
    (("alpha", "dropout"), lambda s: s.method == "glora", "the supports of glora have neither scaling nor dropout"),
    (("mini_loras",), lambda s: s.method != "melora", "only --method melora has mini pairs"),
    (("tied_layers", "mask_density"), lambda s: s.method != "capaboost", "only --method capaboost has masks"),
    (("last_blocks",), lambda s: s.method != "partial", "only --method partial trains the last blocks"),
    (("draw", "validation_shots", "per"), lambda s: s.shots is None, "without --shots every image trains and nothing is drawn"),
    (("validation_fraction",), lambda s: s.shots is not None, "with --shots the validation images are counted by --validation-shots"),
    (
        ("validation_shots", "per", "data_seed", "validation_fraction", "test_fraction"),
        lambda s: s.official_draw,
        "--official-draw reads published lists",
    ),
    (("test_fraction",), lambda s: s.test_data is not None, "the test images come from --test-data"),
    (("flip", "crop", "degrees", "light"), lambda s: not s.augment, "--no-augment leaves the images as they are"),
    (
        ("flip", "crop", "degrees", "light"),
        lambda s: s.method == "linear-probe",
        "linear-probe computes its features once, without augmentation",
    ),
    (
        ("heads",),
        lambda s: s.model.startswith(PREFIX) or not Path(s.model).is_file(),
        "the configuration of {model} says how many attention heads it has",
    ),
)


def idle_settings(settings: FinetuneSettings) -> dict[str, str]:
    """Name -> why it acts on nothing, of every setting that was given and cannot change the run.

    A setting counts as given when it was named. Where all of them are (settings that were read back from a report), those
    that have their default value count as not given.

    Example:
        >>> idle_settings(FinetuneSettings(method="sr-lora", rank=4))
        {'rank': 'the ranks of sr-lora follow the stable ranks; --scale and --budget change them'}
    """
    fields = FinetuneSettings.model_fields
    given = set(settings.model_fields_set)
    if given == set(fields):
        given = {name for name in fields if getattr(settings, name) != fields[name].default}
    neutral = {name for name in given if getattr(settings, name) in (None, _NEUTRAL.get(name))}
    found: dict[str, str] = {}
    for names, idle, reason in _RULES:
        for name in names:
            if name in given - neutral and name not in found and idle(settings):
                found[name] = reason.format(method=settings.method, model=settings.model)
    return found


def refuse_idle(settings: FinetuneSettings) -> None:
    """Refuse settings that were given and cannot change the run.

    Raises:
        InputError: there are some; each is named with its reason.
    """
    found = idle_settings(settings)
    if not found:
        return
    faults = [f"{_word(name)}: {reason}" for name, reason in found.items()]
    if len(faults) == 1:
        raise InputError(_word(next(iter(found))), f"can have no effect: {next(iter(found.values()))}", "settings that act", "leave it out")
    raise InputError(
        "settings", f"{len(faults)} of them can have no effect", "settings that act on this run", "leave them out", faults=faults
    )


def without_idle(settings: FinetuneSettings) -> FinetuneSettings:
    """The same settings, with those that cannot change the run left at their defaults: one set for several methods."""
    idle = idle_settings(settings)
    return FinetuneSettings.model_validate({n: getattr(settings, n) for n in settings.model_fields_set if n not in idle})


def _word(name: str) -> str:
    return name if name in _WITHOUT_FLAG else f"--{name.replace('_', '-')}"
