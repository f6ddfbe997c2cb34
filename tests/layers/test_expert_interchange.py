"""One expert as a file that other tools read: round trips through the foreign readers, and refusals."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from medlore.errors import CheckpointError, DataError, TargetError, UnknownNameError
from medlore.layers.experts.interchange import load_kohya, load_peft, save_kohya, save_peft
from medlore.layers.experts.routing import route
from medlore.layers.experts.surgery import install_experts, merge

NAMES = ["liver", "brain"]


class Body(nn.Module):
    """A name that is the end of another: patterns must not mix `conv` and `block.conv`."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.conv = conv(3, 6, 3, padding=1, stride=2)
        self.block = nn.ModuleDict({"conv": conv(6, 8, (1, *(3,) * (dims - 1)) if dims == 2 else (3, 3, 1), bias=False)})
        self.point = conv(8, 8, 1) if dims == 2 else nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.point(self.block["conv"](self.conv(x).relu()).relu())
        return self.head(x.flatten(2).mean(2))  # type: ignore[no-any-return]


def network(dims: int, layout: str = "channel") -> Body:
    net = Body(dims)
    ranks = {(name, expert): rank for name, rank in (("conv", 2), ("block.conv", 3), ("head", 1)) for expert in NAMES}
    install_experts(net, experts=NAMES, ranks=ranks | {("head", "brain"): 0}, alpha=3, layout=layout)  # type: ignore[arg-type]
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return net


def images(dims: int) -> torch.Tensor:
    return torch.randn(2, 3, *(9,) * dims)


@pytest.mark.parametrize("layout", ["channel", "interleaved"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("expert", NAMES)
def test_peft_reads_what_we_write(dims: int, layout: str, expert: str, tmp_path: Path) -> None:
    from peft import PeftModel

    net, x = network(dims, layout), images(dims)
    error = save_peft(net, expert, tmp_path / "adapter")
    wanted = merge(net, expert)(x)
    read = PeftModel.from_pretrained(merge(net, None), str(tmp_path / "adapter"))
    assert error < 1e-5
    assert torch.allclose(read(x), wanted, atol=1e-5)
    merged = read.merge_and_unload()
    assert torch.allclose(merged(x), wanted, atol=1e-5)
    if layout == "channel":
        other = network(dims)
        other.load_state_dict({k: v for k, v in net.state_dict().items() if "lora_" not in k}, strict=False)
        load_peft(other, "liver", tmp_path / "adapter")
        with route(other, "liver"):
            assert torch.allclose(other(x), wanted, atol=1e-5)


@pytest.mark.parametrize("layout", ["channel", "interleaved"])
@pytest.mark.parametrize("dims", [2, 3])
def test_lycoris_reads_what_we_write(dims: int, layout: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a foreign package at import
        lycoris = pytest.importorskip("lycoris")
    net, x = network(dims, layout), images(dims)
    save_kohya(net, "liver", tmp_path / "liver.safetensors")
    wanted = merge(net, "liver")(x)
    plain = merge(net, None)
    wrapper, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "liver.safetensors"), plain)
    wrapper.apply_to()
    assert len(wrapper.loras) == 3
    assert torch.allclose(plain(x), wanted, atol=1e-5)
    if layout == "channel":
        load_kohya(net, "brain", tmp_path / "liver.safetensors")
        with route(net, "brain"):
            assert torch.allclose(net(x), wanted, atol=1e-5)


def test_a_bounded_rank_says_its_error(tmp_path: Path) -> None:
    net = network(2)
    error = save_peft(net, "liver", tmp_path / "small", rank=1)
    state = load_file(tmp_path / "small" / "adapter_model.safetensors")
    largest = 0.0
    for name in ("conv", "block.conv", "head"):
        key = f"base_model.model.{name}.lora_"
        small = state[key + "B.weight"].flatten(1) @ state[key + "A.weight"].flatten(1) * net.get_submodule(name).scaling["liver"]  # type: ignore[index,operator]
        whole = net.get_submodule(name).delta_weight("liver").flatten(1)  # type: ignore[operator]
        largest = max(largest, float((whole - small).detach().norm()))
    assert error == pytest.approx(largest, rel=1e-4)
    assert error > 0.01


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation=.*fails in forward"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'.*silently wrong"),
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2.*cannot merge"),
        (nn.Conv3d(4, 4, (1, 1, 3)), r"kernel \(1, 1, 3\).*takes it for a 2D one"),
    ],
)
def test_what_peft_gets_wrong_is_refused(layer: nn.Module, why: str, tmp_path: Path) -> None:
    net = nn.Sequential(layer)
    install_experts(net, experts=["a"], ranks=2)
    with pytest.raises(TargetError, match=f"(?s)1 layers do not fit.*0: {why}"):
        save_peft(net, "a", tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_unknown_names_and_files_that_do_not_fit(tmp_path: Path) -> None:
    net = network(2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UnknownNameError, match="'livr'"):
        save_kohya(net, "livr", tmp_path / "x.safetensors")
    save_peft(net, "liver", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"(?s)2 layers.*conv: shapes \(2, 3, 3, 3\) and \(6, 2, 1, 1\)"):
        load_peft(network(3), "liver", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="no such expert layer"):
        load_peft(install(nn.Sequential(nn.Linear(3, 2))), "a", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(CheckpointError, match=r"use_dora.*a plain LoRA adapter"):
        load_peft(net, "liver", tmp_path / "adapter")
    save_file({"lycoris_conv.hada_w1_a": torch.zeros(2)}, tmp_path / "hada.safetensors")
    with pytest.raises(CheckpointError, match=r"lycoris_conv.hada_w1_a"):
        load_kohya(net, "liver", tmp_path / "hada.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def install(net: nn.Module) -> nn.Module:
    install_experts(net, experts=["a"], ranks=1)
    return net


def test_damaged_files_are_refused_without_a_traceback(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2))
    install_experts(net, experts=["a"], ranks=1)
    (tmp_path / "adapter_config.json").write_text("{oops")
    with pytest.raises(DataError, match="not JSON"):
        load_peft(net, "a", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for name in ("adapter_model.safetensors", "kohya.safetensors"):
        (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_peft(net, "a", tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_kohya(net, "a", tmp_path / "kohya.safetensors")


def test_names_that_become_one_key(tmp_path: Path) -> None:
    net = install(nn.ModuleDict({"a_b": nn.Linear(2, 2), "a": nn.ModuleDict({"b": nn.Linear(2, 2)})}))
    with pytest.raises(TargetError, match="'lycoris_a_b' is taken by another layer"):
        save_kohya(net, "a", tmp_path / "x.safetensors")
