"""The golden ranks come out of every container and every naming; broken and unsafe files are refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import medlore
from medlore.errors import CheckpointError, InputError, TargetError, UnknownNameError
from medlore.ranks.sources import open_source

GOLDEN_PAIRS = [[13, 10], [5, 4], [2, 3], [2, 2]]
GOLDEN_VALUES = [13.160229, 9.597282, 4.971125, 3.985264, 2.350675, 2.548885, 1.675035, 1.746146]


def check_golden(source: object, *, values: bool = True) -> medlore.RankPlan:
    plan = medlore.plan_ranks(source, granularity="fused")  # type: ignore[arg-type]
    assert plan.nested_ranks() == GOLDEN_PAIRS
    if values:
        measured = [x.stable_rank for x in plan.layers if x.part in ("q", "o")]
        assert measured == pytest.approx(GOLDEN_VALUES, abs=2e-3)
        assert all(x.lower <= x.stable_rank <= x.upper for x in plan.layers)  # type: ignore[operator]
    return plan


def test_every_naming_gives_the_same_ranks_and_hash(named: dict[str, Tensor], timm_file: Path, tmp_path: Path, naming: str) -> None:
    path = tmp_path / "named.safetensors"
    save_file(named, path)
    plan = check_golden(path)
    assert plan.sha256 == check_golden(timm_file).sha256
    assert len(plan.layers) == 12
    assert {x.block for x in plan.layers} == {0, 1, 2, 3}
    assert plan.layout == {"timm-swin": "timm", "mmpretrain-swin": "mmpretrain"}.get(
        naming, naming if naming in ("timm", "mmpretrain", "open_clip") else "transformers"
    )
    assert not any("backbone" in x.name for x in plan.layers)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "encoder.", "module.backbone.", "module.encoder."])
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_torch_files(timm_state: dict[str, Tensor], tmp_path: Path, wrapper: str | None, prefix: str, suffix: str) -> None:
    state = {prefix + k: v for k, v in timm_state.items()}
    content = state if wrapper is None else {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    path = tmp_path / f"weights{suffix}"
    torch.save(content, path)
    plan = check_golden(path)
    assert plan.layers[0].name == "blocks.0.attn.qkv"


def test_old_torch_format(timm_state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(timm_state, path, _use_new_zipfile_serialization=False)
    check_golden(path)


def test_jax_file_has_the_hash_of_the_timm_file(jax_file: Path, timm_file: Path) -> None:
    plan = check_golden(jax_file)
    assert plan.sha256 == medlore.plan_ranks(timm_file).sha256
    assert plan.layout == "jax"
    wide = medlore.plan_ranks(jax_file, targets="conv", rule="uniform:2")
    assert wide.layers[0].shape == (64, 48)


def test_sharded_and_whole_folders(timm_state: dict[str, Tensor], tmp_path: Path, timm_file: Path) -> None:
    names = list(timm_state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: timm_state[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert check_golden(tmp_path).sha256 == check_golden(timm_file).sha256
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)1 shards are missing.*- b\.safetensors"):
        medlore.plan_ranks(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_number_formats(timm_state: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "typed.safetensors"
    save_file({k: v.to(dtype) for k, v in timm_state.items()}, path)
    check_golden(path, values=dtype != torch.bfloat16)
    upcast = tmp_path / "upcast.safetensors"
    save_file({k: v.to(dtype).float() for k, v in timm_state.items()}, upcast)
    assert medlore.plan_ranks(path).sha256 == medlore.plan_ranks(upcast).sha256


def test_module_and_file_agree(timm_file: Path) -> None:
    model = nn.ModuleDict()
    state = {k: v for k, v in __import__("safetensors.torch").torch.load_file(timm_file).items() if "attn.qkv" in k or "attn.proj" in k}
    model["blocks"] = nn.ModuleList(
        nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(64, 192), "proj": nn.Linear(64, 64, bias=False)})}) for _ in range(4)
    )
    model.load_state_dict(state)
    assert check_golden(model).sha256 == check_golden(timm_file).sha256


def test_a_safetensors_file_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    save_file({f"blocks.{i}.attn.{n}.weight": torch.randn(s, 256) for i in range(40) for n, s in (("qkv", 768), ("proj", 256))}, path)
    source = open_source(path)
    assert not [v for v in vars(source).values() if isinstance(v, Tensor)]
    assert source.parameters == 40 * 1024 * 256


class Bomb:
    def __reduce__(self) -> object:
        return (os.system, ("touch bombed",))


def broken_files(folder: Path) -> dict[str, tuple[Path, type[Exception], str]]:
    state = {"blocks.0.attn.qkv.weight": torch.randn(12, 4), "blocks.0.attn.proj.weight": torch.randn(4, 4)}
    save_file(state, folder / "whole.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-7])
    (folder / "bomb.pth").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    torch.save({"state_dict": Bomb()}, folder / "bomb_zip.pth")
    torch.save(state, folder / "whole.pth")
    (folder / "cut.pth").write_bytes((folder / "whole.pth").read_bytes()[:400])
    (folder / "text.bin").write_text("not weights at all")
    torch.save([1, 2], folder / "list.pt")
    torch.save({"epoch": 3}, folder / "empty.pt")
    (folder / "image.jpg").write_bytes(b"\xff\xd8")
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    np.savez(folder / "object.npz", a=np.array([{}, {}], dtype=object))
    save_file({"blocks.0.norm1.weight": torch.ones(4), "head.weight": torch.ones(2, 4)}, folder / "bare.safetensors")
    save_file({k: torch.full_like(v, float("nan")) if "qkv" in k else v for k, v in state.items()}, folder / "nan.safetensors")
    save_file({k: torch.zeros_like(v) for k, v in state.items()}, folder / "zero.safetensors")
    save_file({k: v.to(torch.int8) for k, v in state.items()}, folder / "int.safetensors")
    (folder / "nothing").mkdir()
    return {
        "missing": (folder / "no.safetensors", InputError, "no such file"),
        "truncated safetensors": (folder / "cut.safetensors", CheckpointError, "not a whole safetensors file"),
        "pickle with code": (folder / "bomb.pth", CheckpointError, "would run code"),
        "zipped pickle with code": (folder / "bomb_zip.pth", CheckpointError, "would run code"),
        "truncated torch file": (folder / "cut.pth", CheckpointError, "not a whole torch file"),
        "text": (folder / "text.bin", CheckpointError, "not a whole torch file"),
        "list": (folder / "list.pt", CheckpointError, "no state dict: a list"),
        "no tensors": (folder / "empty.pt", CheckpointError, "no state dict: keys 'epoch'"),
        "wrong type": (folder / "image.jpg", InputError, "a file of type '.jpg'"),
        "truncated npz": (folder / "cut.npz", CheckpointError, r"not a whole \.npz"),
        "object npz": (folder / "object.npz", TargetError, "no weight answers"),
        "no target": (folder / "bare.safetensors", TargetError, "no weight answers"),
        "NaN": (folder / "nan.safetensors", TargetError, r"(?s)2 weights cannot.*attn\.qkv\.weight \(q\): NaN"),
        "zero": (folder / "zero.safetensors", TargetError, r"(?s)3 weights cannot.*proj\.weight \(o\): all zero"),
        "integers": (folder / "int.safetensors", CheckpointError, r"numbers of type torch\.int8"),
        "empty folder": (folder / "nothing", InputError, "a folder without weights"),
        "asset": (Path("medlore:vit-maxi"), UnknownNameError, "unknown name 'vit-maxi'"),
        "hub": (Path("nobody/nothing-here"), InputError, "the hub does not give it"),
    }


CASES = (
    "missing", "truncated safetensors", "pickle with code", "zipped pickle with code", "truncated torch file", "text", "list", "no tensors",
    "wrong type", "truncated npz", "object npz", "no target", "NaN", "zero", "integers", "empty folder", "asset", "hub",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, kind, text = broken_files(tmp_path)[case]
    with pytest.raises(kind, match=text) as caught:
        medlore.plan_ranks(str(path))
    assert caught.value.exit_status == 2  # type: ignore[attr-defined]
    assert not (tmp_path / "bombed").exists()


def test_nan_is_found_also_where_nothing_is_measured(tmp_path: Path) -> None:
    path, _, text = broken_files(tmp_path)["NaN"]
    with pytest.raises(TargetError, match=text):
        medlore.plan_ranks(path, rule="uniform:2")


@pytest.mark.parametrize("name", ["allconvunet_tcia_fold1.pth", "resnet20_cifar10.th"])
def test_real_trained_weights_against_a_full_svd(shared_data: Path, name: str) -> None:
    path = shared_data / "weights" / name
    plan = medlore.plan_ranks(path, targets="conv", proof=True)
    source = open_source(path)
    assert len(plan.layers) > 10
    for layer in plan.layers:
        s = np.linalg.svd(source.read(layer.key).flatten(1).double().numpy(), compute_uv=False)
        exact = (s**2).sum() / s[0] ** 2
        assert layer.rank == round(exact)
        assert layer.lower * (1 - 1e-9) <= exact <= layer.upper * (1 + 1e-9)  # type: ignore[operator]
