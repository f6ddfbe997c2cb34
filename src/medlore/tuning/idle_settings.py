"""Settings that were given although the run has no use for them: refused, because who gives one believes that it acts.

Each field of `FinetuneSettings` says itself in which runs it acts on nothing.
"""

from __future__ import annotations

from medlore.errors import InputError
from medlore.runs.settings import flag_of
from medlore.tuning.settings import FinetuneSettings


def idle_settings(settings: FinetuneSettings) -> dict[str, str]:
    """Name -> why it acts on nothing, of every setting that was given and cannot change the run.

    A setting counts as given when it was named. Where all of them are (settings that were read back from a report), those
    that have their default value count as not given.

    Examples:
        >>> idle_settings(FinetuneSettings(method="sr-lora", rank=4))
        {'rank': 'the ranks of sr-lora follow the stable ranks; --scale and --budget change them'}
    """
    given, fields = settings.stated(), FinetuneSettings.fields()
    if given.keys() == fields.keys():
        given = {name: value for name, value in given.items() if value != fields[name].default}
    found: dict[str, str] = {}
    for name, value in given.items():
        facts = FinetuneSettings.facts(name)
        if value is None or value == facts.neutral:
            continue
        reason = next((idle.reason for idle in facts.idle if idle.when(settings)), None)
        if reason is not None:
            found[name] = reason.format(**{key: getattr(settings, key) for key in ("method", "model")})
    return found


def refuse_idle(settings: FinetuneSettings) -> None:
    """Refuse settings that were given and cannot change the run.

    Raises:
        InputError: there are some; each is named with its reason.
    """
    found = {flag_of(FinetuneSettings, name): reason for name, reason in idle_settings(settings).items()}
    if len(found) == 1:
        ((name, reason),) = found.items()
        raise InputError(name, f"can have no effect: {reason}", "settings that have an effect", "leave it out")
    if found:
        faults = [f"{name}: {reason}" for name, reason in found.items()]
        came = f"{len(faults)} of them can have no effect"
        raise InputError("settings", came, "settings that have an effect on this run", "leave them out", faults=faults)


def without_idle(settings: FinetuneSettings) -> FinetuneSettings:
    """The same settings, with those that cannot change the run left at their defaults: one set for several methods."""
    idle = idle_settings(settings)
    return FinetuneSettings.model_validate({name: value for name, value in settings.stated().items() if name not in idle})
