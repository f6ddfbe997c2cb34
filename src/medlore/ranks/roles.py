"""What a weight does in an attention, recognised by its name: `to_q`, `query_proj`, `Wqkv`, `queries_keys_values` and what comes next.

A name is taken apart into words; words that say nothing (`proj`, `linear`, `to`, `w`) are dropped, and what is left must spell
roles alone. So `pos_query_proj` or `q_a_proj`, which are something else, are not taken for queries.
"""

from __future__ import annotations

import re

_WORDS = {
    "q": "q", "query": "q", "queries": "q", "k": "k", "key": "k", "keys": "k", "v": "v", "value": "v", "values": "v", "val": "v",
    "qkv": "qkv", "kv": "kv", "qk": "qk", "qv": "qv", "vk": "vk", "kqv": "kqv", "kvq": "kvq", "qvk": "qvk", "vqk": "vqk",
}  # fmt: skip
_SILENT = frozenset({
    "proj", "projection", "projections", "project", "projected", "linear", "lin", "layer", "layers", "to", "w", "weight",
    "weights", "fc", "dense", "net", "mat", "matrix", "in", "attn", "att", "attention", "self", "head", "heads", "transform",
})  # fmt: skip
_GENERIC = re.compile(r"^(linear|linear_projection|dense|proj|projection|fc|0|base_layer|linear_layer|ln|layer)$")
_OUTPUT_WORDS = ("o", "wo", "out", "output", "proj", "projection", "dense", "post", "merge", "combine", "fc", "c", "w", "linear")
_CLEARLY_OUTPUT = _OUTPUT_WORDS.index("fc")
_ATTENTION = re.compile(r"(attn|attention|attentions|mha)\d*$")
_NO_OUTPUT = frozenset({
    "gate", "gating", "g", "norm", "bias", "rel", "relative", "pos", "position", "positional", "beta", "lepe", "sr",
    "dw", "temperature", "router", "up", "down", "mlp", "ffn", "intermediate", "r", "b", "a", "global", "lora", "residual",
    "adapter", "feed", "forward", "expert", "experts", "gamma", "alpha", "decay", "conv", "dwconv", "kernel", "embed",
    "embedding", "embeddings", "table", "index",
})  # fmt: skip


def words_of(leaf: str) -> list[str]:
    """The words of one piece of a name, lower case.

    Examples:
        >>> words_of("toQKV_proj"), words_of("Wo")
        (['to', 'qkv', 'proj'], ['wo'])
    """
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", leaf)
    return [word for word in re.split(r"[^a-z0-9]+", apart.lower()) if word]


def roles_of(leaf: str) -> str:
    """Which of q, k and v a piece of a name spells, in its order; empty for anything else.

    Examples:
        >>> [roles_of(n) for n in ("q_proj", "to_kv", "query_key_value", "Wqkv", "c_attn", "q_a_proj", "proj")]
        ['q', 'kv', 'qkv', 'qkv', 'qkv', '', '']
    """
    if leaf == "c_attn":  # GPT-2 and its kin
        return "qkv"
    spelled = ""
    for word in words_of(leaf):
        bare = word[1:] if word.startswith("w") and word[1:] in _WORDS else word
        if bare in _WORDS:
            spelled += _WORDS[bare]
        elif word not in _SILENT:
            return ""
    return spelled if len(set(spelled)) == len(spelled) else ""


def split_name(name: str) -> tuple[str, str, str]:
    """(path of the attention, piece that spells a role, roles) of a module's name; the last two empty where it has none.

    Examples:
        >>> split_name("blocks.0.attn.qkv.linear")
        ('blocks.0.attn', 'qkv', 'qkv')
    """
    path, _, leaf = name.rpartition(".")
    while path and not roles_of(leaf) and _GENERIC.match(leaf):
        path, _, leaf = path.rpartition(".")
    roles = roles_of(leaf)
    return (path, leaf, roles) if roles else (name, "", "")


def speaks_of_attention(piece: str) -> bool:
    """Whether one piece of a path, or a path, calls a module an attention.

    Examples:
        >>> [speaks_of_attention(p) for p in ("self_attn", "EncDecAttention", "post_attention_layernorm", "attn1")]
        [True, True, False, True]
    """
    return _ATTENTION.search(piece.lower()) is not None


def output_likeness(name: str, *, strict: bool = False) -> int | None:
    """How much a name, seen from its attention, is that of an output projection: smaller is more; None for another thing.

    Args:
        name: module path below the attention, or beside it.
        strict: a name that says nothing is another thing.

    Examples:
        >>> output_likeness("output.dense"), output_likeness("gate_proj"), output_likeness("mixer", strict=True)
        (3, None, None)
    """
    words = [word for piece in name.split(".") for word in words_of(piece)]
    if any(word in _NO_OUTPUT for word in words) or any(roles_of(piece) for piece in name.split(".")):
        return None
    likeness = min((_OUTPUT_WORDS.index(word) for word in words if word in _OUTPUT_WORDS), default=len(_OUTPUT_WORDS))
    return None if strict and likeness >= _CLEARLY_OUTPUT else likeness
