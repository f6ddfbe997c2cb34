"""A setting that was given and can have no effect is refused with its reason; what only asks for nothing is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medlore.errors import InputError
from medlore.layers.tuning.methods import METHODS
from medlore.tuning.finetune import FinetuneSettings, dry_run, finetune
from medlore.tuning.idle_settings import idle_settings, refuse_idle, without_idle

FACTORS = {"rank": 4, "scale": 2.0, "budget": "1%", "alpha": "rank", "granularity": "fused", "dropout": 0.1, "plan": Path("p.json")}
IDLE: list[tuple[dict[str, Any], set[str]]] = [
    ({"method": "sr-lora", "rank": 8}, {"rank"}),
    ({"method": "sr-lora", "rank": "equal"}, {"rank"}),
    ({"method": "lora", "scale": 2.0, "budget": "2%", "granularity": "fused"}, {"scale", "budget", "granularity"}),
    ({"plan": Path("p.json"), "targets": "conv", "alpha": "1", "scale": 2.0}, {"targets", "alpha", "scale"}),
    ({"ranks": "r.json", "scale": 2.0, "budget": "1%"}, {"scale", "budget"}),
    ({"method": "linear-probe", **FACTORS, "targets": "conv"}, {*FACTORS, "targets"}),
    ({"method": "full", "last_blocks": 2}, {"last_blocks"}),
    ({"draw": 1, "validation_shots": 3, "per": "group"}, {"draw", "validation_shots", "per"}),
    ({"shots": 5, "validation_fraction": 0.1}, {"validation_fraction"}),
    ({"shots": 5, "official_draw": True, "validation_shots": 3, "per": "group", "data_seed": 1}, {"validation_shots", "per", "data_seed"}),
    ({"test_data": Path("t"), "test_fraction": 0.1}, {"test_fraction"}),
    ({"augment": False, "flip": "both", "degrees": 3.0}, {"flip", "degrees"}),
    ({"method": "linear-probe", "crop": (0.2, 1.0)}, {"crop"}),
    ({"heads": 3}, {"heads"}),
    ({"method": "lora", "component_masks": "shapley"}, {"component_masks"}),
    ({"method": "ssf", "bottleneck": 8, "adapter_scale": 0.1, "prompt_length": 4}, {"bottleneck", "adapter_scale", "prompt_length"}),
    ({"method": "glora", "alpha": "1", "dropout": 0.1, "mini_loras": 2}, {"alpha", "dropout", "mini_loras"}),
    ({"method": "melora", "tied_layers": 3, "mask_density": 0.3}, {"tied_layers", "mask_density"}),
    ({"method": "adapter", "glora_path": "none,none,none,none,none"}, {"glora_path"}),
]
ACTIVE: list[dict[str, Any]] = [
    {},
    {"method": "lora", "rank": 8, "alpha": "2", "dropout": 0.1, "targets": "conv", "partial_update": "single"},
    {"method": "rslora", "rank": "equal", "scale": 2.0, "budget": "1%", "granularity": "fused"},
    {"method": "sr-lora", "scale": 2.0, "budget": "1%", "granularity": "fused", "alpha": "1"},
    {"ranks": "r.json", "granularity": "fused", "alpha": "1"},
    {"method": "partial", "last_blocks": 3, "flip": "both", "degrees": 1.0},
    {"method": "full", "partial_update": "off", "dropout": 0.0},
    {"shots": 5, "draw": 2, "validation_shots": "all", "per": "group", "test_fraction": 0.1},
    {"shots": 5, "official_draw": True, "draw": 3},
    {"method": "linear-probe", "augment": False, "flip": "none", "per": "image"},
    {"method": "full", "targets": "conv", "track_stable_rank": True},
    {"method": "sr-lora", "component_masks": "shapley", "scale": 0.5},
    {"method": "adaptformer", "bottleneck": 8, "adapter_scale": 0.1, "adapter_dropout": 0.2, "component_masks": "off"},
    {"method": "glora", "glora_path": "lora,none,none,none,vector", "targets": "all-linear", "rank": 4},
    {"method": "vpt-deep", "prompt_length": 4},
    {"method": "melora", "mini_loras": 2, "rank": 4, "dropout": 0.1},
    {"method": "capaboost", "tied_layers": 3, "mask_density": 0.3},
]


@pytest.mark.parametrize(("values", "names"), IDLE)
def test_what_cannot_act_is_refused_by_name(values: dict[str, Any], names: set[str]) -> None:
    settings = FinetuneSettings(**values)
    assert set(idle_settings(settings)) == names
    with pytest.raises(InputError, match="no effect") as caught:
        refuse_idle(settings)
    assert all(name.replace("_", "-") in str(caught.value) or name in str(caught.value) for name in names)


@pytest.mark.parametrize("values", ACTIVE)
def test_what_acts_or_asks_for_nothing_passes(values: dict[str, Any]) -> None:
    settings = FinetuneSettings(**values)
    assert not idle_settings(settings)
    refuse_idle(settings)


def test_heads_act_on_a_weights_file(tmp_path: Path) -> None:
    (tmp_path / "vit.pth").write_bytes(b"x")
    settings = FinetuneSettings(model=str(tmp_path / "vit.pth"), heads=3)
    assert not idle_settings(settings)
    refuse_idle(settings)


@pytest.mark.parametrize("method", list(METHODS))
def test_settings_that_were_read_back_pass_again(method: Any) -> None:
    settings = FinetuneSettings(method=method, shots=5)
    back = FinetuneSettings.model_validate_json(settings.model_dump_json())
    assert back == settings
    refuse_idle(back)


def test_one_set_of_settings_for_several_methods() -> None:
    base = FinetuneSettings(scale=0.5, flip="both", probe_views=0, epochs=3, method="linear-probe")
    kept = without_idle(base)
    refuse_idle(kept)
    assert (kept.method, kept.epochs, kept.scale, kept.flip) == ("linear-probe", 3, 1.0, "none")


@pytest.mark.parametrize("door", [dry_run, finetune])
def test_both_doors_refuse(door: Any) -> None:
    with pytest.raises(InputError, match=r"--rank: can have no effect"):
        door(FinetuneSettings(rank=4, data=Path("nowhere")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": ""}, "an empty text names nothing"),
        ({"model": " "}, "an empty text names nothing"),
        ({"mean": (0.5, 0.5, 0.5)}, "one without the other"),
        ({"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.0, 0.2)}, "three numbers above 0"),
        ({"mean": (0.5, 0.5), "std": (0.2, 0.2)}, "mean"),
    ],
)
def test_values_that_mean_nothing(values: dict[str, Any], message: str) -> None:
    from medlore.runs.settings_file import check_settings

    with pytest.raises(InputError, match=message):
        check_settings(FinetuneSettings, values, where="run.yaml")
