"""Visual prompt tuning: trained tokens beside the image's own, in the first block (shallow) or anew in every block (deep).

Position in the sequence means nothing to attention, so the prompts stand at its end, and leave it before anything else reads it.
By definition the output is another one from the first moment on, and nothing can be merged.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, equations 4 to 8 and, for Swin, section 3.4: prompts take part in every
window's attention and not in the shifting; a shallow prompt is averaged over the windows and repeated in channels where
patches are merged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medlore.errors import InputError, TargetError
from medlore.layers.tuning.anatomy import BIAS_TABLE, Block, attends_in_windows, blocks_with_parts
from medlore.layers.tuning.attach import Extra, attach
from medlore.layers.tuning.options import PromptOptions


def install_prompts(model: nn.Module, options: PromptOptions, *, deep: bool) -> None:
    """Prompts in the form that the network's attention asks for: global tokens, or windows.

    Raises:
        InputError: no prompt at all.
        TargetError: a network without blocks, or with a position bias that cannot be widened.
    """
    if options.prompt_length < 1:
        raise InputError("prompt_length", f"got {options.prompt_length}", "a whole number from 1", "use 10")
    blocks = blocks_with_parts(model, "--method vpt")
    bound = math.sqrt(6 / (_patch_values(model) + blocks[0].width))
    biased = [attends_in_windows(model.get_submodule(block.attention)) for block in blocks]
    if all(biased):
        _install_in_windows(model, blocks, options.prompt_length, bound, deep=deep)
    elif not any(biased):
        _install_as_tokens(model, blocks, options.prompt_length, bound, deep=deep)
    else:
        raise TargetError("--method vpt", "blocks with and without a position bias", "blocks of one kind", "use another method")


# ---- Global attention: prompts are tokens of the sequence --------------------------------------------------------------------


class TokenPrompts(Extra):
    """Prompts on the way into a block (b n d -> b n+p d), in place of those of the block before; the last block drops them."""

    def __init__(self, prompts: Tensor | None, length: int, *, first: bool, last: bool) -> None:
        super().__init__()
        self.prompts = None if prompts is None else nn.Parameter(prompts)
        self.length, self.first, self.last = length, first, last

    def ask(self, base: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Image tokens, then prompts."""
        if self.prompts is None:
            return inputs
        tokens = inputs[0] if self.first else inputs[0][:, : -self.length]
        return (torch.cat([tokens, self.prompts.expand(len(tokens), -1, -1)], dim=1), *inputs[1:])

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Unchanged, or without prompts behind the last block."""
        return output[:, : -self.length] if self.last else output


def _install_as_tokens(model: nn.Module, blocks: list[Block], length: int, bound: float, *, deep: bool) -> None:
    for index, block in enumerate(blocks):
        first, last = index == 0, index == len(blocks) - 1
        prompts = _drawn(length, block.width, bound) if deep or first else None
        if prompts is not None or last:
            attach(model.get_submodule(block.name), TokenPrompts(prompts, length, first=first, last=last), name=block.name)


# ---- Windowed attention: prompts join every window inside the attention -----------------------------------------------------


class _Carried:
    """Prompts of one forward pass on their way through the blocks (b p d), and what attention made of them."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.attended: Tensor | None = None


class WindowBlock(Extra):
    """Gives a block its prompts; without fresh ones in the next block, hands them on through its branches."""

    def __init__(self, prompts: Tensor | None, carried: _Carried, branch: tuple[nn.Module, nn.Module], *, hands_on: bool) -> None:
        super().__init__()
        self.prompts = None if prompts is None else nn.Parameter(prompts)
        self.hands_on = hands_on
        # in a tuple, so that they are no submodules here with parameters of their own
        self._carried, self._branch = (carried,), branch

    def ask(self, base: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Place fresh prompts; the image tokens stay as they are."""
        if self.prompts is not None:
            self._carried[0].tokens = self.prompts.expand(len(inputs[0]), -1, -1)
        return inputs

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The image tokens as they are; prompts: p + attention, then + MLP(norm(.))."""
        (carried,), (norm, mlp) = self._carried, self._branch
        if not self.hands_on or carried.tokens is None or carried.attended is None:
            carried.tokens = carried.attended = None
            return output
        tokens = carried.tokens + carried.attended
        carried.tokens = tokens + mlp(norm(tokens))
        carried.attended = None
        return output


class WindowAttention(Extra):
    """Lets the carried prompts take part in each window; their own answer is averaged over the windows."""

    def __init__(self, length: int, carried: _Carried, norm: nn.Module) -> None:
        super().__init__()
        self.length = length
        self._carried, self._norm = (carried,), (norm,)

    def ask(self, base: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """(windows, s, d) and a mask (w, s, s) or None, both widened by the prompts."""
        windows, *rest = inputs
        tokens = self._norm[0](self._carried[0].tokens)  # b p d
        each = tokens.repeat_interleave(len(windows) // len(tokens), dim=0)  # windows of one image follow each other
        if rest and rest[0] is not None:
            rest[0] = F.pad(rest[0], (0, self.length, 0, self.length))
        return (torch.cat([windows, each], dim=1), *rest)

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """(windows, s, d)."""
        (carried,) = self._carried
        answer, *rest = output if isinstance(output, tuple) else (output,)
        batch = len(carried.tokens) if carried.tokens is not None else 1
        carried.attended = answer[:, -self.length :].unflatten(0, (batch, -1)).mean(dim=1)
        image = answer[:, : -self.length].contiguous()
        return (image, *rest) if isinstance(output, tuple) else image


class WiderBias(Extra):
    """A position bias (1, heads, s, s) with zeros for the prompts, which have no position."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """(1, heads, s + p, s + p)."""
        return F.pad(output, (0, self.length, 0, self.length))


class MergedPrompts(Extra):
    """Where four patches become one, a prompt stands for all four: its channels are repeated four times and reduced alike."""

    def __init__(self, carried: _Carried) -> None:
        super().__init__()
        self._carried = (carried,)

    def forward(self, base: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The image tokens as they are."""
        (carried,) = self._carried
        if carried.tokens is not None:
            tokens = carried.tokens.repeat(1, 1, 4)
            for step in _merging_steps(base):
                tokens = step(tokens)
            carried.tokens = tokens
        return output


def _install_in_windows(model: nn.Module, blocks: list[Block], length: int, bound: float, *, deep: bool) -> None:
    carried = _Carried()
    for index, block in enumerate(blocks):
        prompts = _drawn(length, block.width, bound) if deep or index == 0 else None
        attention = model.get_submodule(block.attention)
        before, behind = (model.get_submodule(name) for name in block.norms)
        hands_on = not deep and index < len(blocks) - 1
        branch = (behind, model.get_submodule(block.mlp))
        attach(model.get_submodule(block.name), WindowBlock(prompts, carried, branch, hands_on=hands_on), name=block.name)
        attach(attention, WindowAttention(length, carried, before), name=block.attention)
        attach(_bias_module(attention, block.attention), WiderBias(length), name=f"{block.attention} bias")
    if deep:
        return
    for name, module in list(model.named_modules()):
        if _merging_steps(module):
            attach(module, MergedPrompts(carried), name=name)


def _merging_steps(module: nn.Module) -> list[nn.Module]:
    """Norm over 4d and reduction of 4d to 2d, in the order of use; empty for a module that merges no patches."""
    children = list(module.children())
    norms = [m for m in children if isinstance(m, nn.LayerNorm)]
    linears = [m for m in children if isinstance(m, nn.Linear)]
    if len(norms) != 1 or len(linears) != 1:
        return []
    norm, linear = norms[0], linears[0]
    steps: list[nn.Module] = [norm, linear] if norm.normalized_shape[0] == linear.in_features else [linear, norm]
    return steps if linear.in_features == 2 * linear.out_features else []


def _bias_module(attention: nn.Module, name: str) -> nn.Module:
    """The submodule whose answer is the position bias."""
    for child in attention.children():
        if BIAS_TABLE in child._parameters:
            return child
    raise TargetError(
        "--method vpt",
        f"{name} computes its position bias itself",
        "an attention whose position bias is a module of its own",
        "use the transformers version of constraints.txt",
    )


def _drawn(length: int, width: int, bound: float) -> Tensor:
    return torch.empty(length, width).uniform_(-bound, bound)


def _patch_values(model: nn.Module) -> int:
    """Numbers in one patch, 3 p², from the convolution that embeds it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:
            return math.prod(module.weight.shape[1:])
    return 0
