"""What a training step of a ViT classifier need not compute: its head looks at the first token alone.

Behind the attention of the last block, every token but the first is computed, differentiated and never read: its queries, output
projection and MLP need one. With one query for each image, keys and values need not be made either; see `_attend_first`. Nothing is
approximated.

Source: ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

MOST_TOKENS = 400  # beyond it the attention weights, which the explicit form keeps, outgrow the other activations

Exchange = Callable[[nn.Module, type[nn.Module]], None]


def shorten(model: nn.Module, exchange: Exchange) -> None:
    """Exchange the blocks of a ViT classifier of transformers whose attention is explicit or reads the first token alone.

    Args:
        model: a network, or a PEFT model around it; left as it is unless it holds one `ViTForImageClassification` without dropout.
        exchange: gives a module another class.
    """
    import transformers

    for network in model.modules():
        if isinstance(network, transformers.ViTForImageClassification) and _as_published(network):
            layer_class, attention_class = _classes()
            *_, last = layers = list(network.vit.layers)
            for layer in layers:
                exchange(layer.attention, attention_class)
            exchange(last, layer_class)


def _as_published(network: Any) -> bool:
    from transformers.models.vit import modeling_vit

    config = network.config
    plain = all(type(m) is modeling_vit.ViTLayer and type(m.attention) is modeling_vit.ViTAttention for m in network.vit.layers)
    other_norm = type(network.vit.layernorm) is not nn.LayerNorm  # one behind which the head reads more than the class token
    reads_more = config.output_hidden_states or config.output_attentions or network.vit.pooler is not None or other_norm
    dropout = config.hidden_dropout_prob or config.attention_probs_dropout_prob
    return plain and len(network.vit.layers) > 0 and not reads_more and not dropout


@functools.cache
def _classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Made when they are first needed: transformers takes seconds to import."""
    from transformers.models.vit import modeling_vit

    class ExplicitAttention(modeling_vit.ViTAttention):  # type: ignore[misc, unused-ignore]
        """Self-attention whose weights are kept for the gradient while it trains under autocast."""

        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            """(b, n, d) -> (b, n, d) and no weights."""
            if not self.training or attention_mask is not None or not _explicit(hidden_states):
                return super().forward(hidden_states, attention_mask, **kwargs)
            return _attend(self, hidden_states, hidden_states), None

    class FirstTokenLayer(modeling_vit.ViTLayer):  # type: ignore[misc, unused-ignore]
        """A last block that computes the first token alone while it trains."""

        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            """(b, n, d) -> (b, 1, d) while training, (b, n, d) otherwise."""
            if not self.training or attention_mask is not None:
                made: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
                return made
            normed = self.layernorm_before(hidden_states)
            first = _attend_first(self.attention, normed) + hidden_states[:, :1]
            changed: Tensor = self.mlp(self.layernorm_after(first))
            return changed + first

    return FirstTokenLayer, ExplicitAttention


def _explicit(x: Tensor) -> bool:
    """Whether the explicit form is the faster one: torch's kernel has a slow gradient in half precision on a CPU."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and x.shape[1] <= MOST_TOKENS


def _attend(attention: Any, asking: Tensor, asked: Tensor) -> Tensor:
    """Attention of some tokens (b, m, d) on all (b, n, d), output projection included."""

    def by_head(x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, attention.head_dim).transpose(1, 2)  # b heads tokens width

    query, key, value = by_head(attention.q_proj(asking)), by_head(attention.k_proj(asked)), by_head(attention.v_proj(asked))
    if _explicit(asked):
        made: Tensor = _Attention.apply(query, key, value, attention.scaling)
    else:
        made = F.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    projected: Tensor = attention.o_proj(made.transpose(1, 2).flatten(2))
    return projected


def _attend_first(attention: Any, asked: Tensor) -> Tensor:
    """Attention of the first token (b, 1, d) on all (b, n, d), output projection included.

    For one query, q·(W_k·x) is (W_kᵀ·q)·x, and Σ p·(W_v·x) is W_v·(Σ p·x): no token needs a key or a value of its own. The bias of the
    keys adds the same to all scores of a query, which the softmax takes away.
    """
    of_keys, of_values = _step_weight(attention.k_proj, asked), _step_weight(attention.v_proj, asked)
    if of_keys is None or of_values is None:
        return _attend(attention, asked[:, :1], asked)
    (key, _), (value, bias) = of_keys, of_values
    query = attention.q_proj(asked[:, :1])  # b 1 d
    by_head = query.view(len(asked), -1, attention.head_dim).transpose(0, 1)  # heads b width
    width = attention.head_dim
    sought = (by_head @ key.view(-1, width, key.shape[-1])).transpose(0, 1)  # b heads d
    weights = ((sought @ asked.transpose(1, 2)) * attention.scaling).softmax(-1)  # b heads n
    mixed = (weights.to(asked.dtype) @ asked).transpose(0, 1)  # heads b d
    made = (mixed @ value.view(-1, width, value.shape[-1]).transpose(1, 2)).transpose(0, 1).flatten(1).unsqueeze(1)  # b 1 d
    projected: Tensor = attention.o_proj(made if bias is None else made + bias)
    return projected


def _step_weight(projection: Any, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """What a layer of `medlore.layers.lora.step` multiplies `x` with, where it is a plain product."""
    return projection.step_weight(x) if hasattr(projection, "step_weight") else None


class _Attention(torch.autograd.Function):
    """softmax(s·q·kᵀ)·v, keeping the weights for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """(b, heads, m, width), twice (b, heads, n, width) -> (b, heads, m, width)."""
        scaled = query * scaling
        weights = torch._softmax(scaled @ key.transpose(-2, -1), -1, False)
        ctx.save_for_backward(scaled, key, value, weights)
        ctx.scaling = scaling
        return weights @ value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        scaled, key, value, weights = ctx.saved_tensors
        back = torch._softmax_backward_data(grad @ value.transpose(-2, -1), weights, -1, weights.dtype)
        grad_key = back.transpose(-2, -1) @ scaled if ctx.needs_input_grad[1] else None
        return (back @ key).mul_(ctx.scaling), grad_key, weights.transpose(-2, -1) @ grad, None
