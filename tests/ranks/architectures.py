"""Tiny random networks of transformers, each with what it says itself about q, v and the output projection.

Nothing here comes from the code under test: `places` are the names in the family's own source, `split` how that source cuts a
fused matrix. Options make the networks small; where a size tells orders apart (heads of k, unequal widths) it is not one of the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

Matrix = np.ndarray[Any, Any]
Split = Callable[[Matrix, str], Matrix]


@dataclass(frozen=True)
class Case:
    """One network.

    Attributes:
        model: class of transformers.
        options: of its configuration.
        places: names of q, v and output projection below one path; `^` goes one module up.
        split: rows of a part of a fused matrix.
        config: class of the configuration; by default that of the model.
        notes: words that the report must hold where modules are left out; empty where all are taken.
        fast: whether it is tried in every run.
        also: places and split of a second kind of attention in the same network.
    """

    model: str
    options: dict[str, Any]
    places: tuple[str, str, str]
    split: Split | None = None
    config: str = ""
    notes: tuple[str, ...] = ()
    fast: bool = False
    also: tuple[tuple[tuple[str, str, str], Split], ...] = ()

    def build(self) -> nn.Module:
        """The network with spectra that differ from matrix to matrix and from row to row."""
        name = self.config or self.model.replace("Model", "Config")
        options = dict(self.options)
        model: nn.Module = getattr(transformers, self.model)(getattr(transformers, name)(**options))
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim in (2, 3):
                rows = torch.exp(1.5 * torch.randn(*parameter.shape[:-1], 1, generator=generator))
                columns = torch.exp(0.7 * torch.randn(parameter.shape[-1], generator=generator))
                parameter.data = torch.randn(parameter.shape, generator=generator) * rows * columns * 0.05
        return model.eval()


def stacked(matrix: Matrix, part: str) -> Matrix:
    """q, k and v one after the other."""
    return np.split(matrix, 3)["qkv".index(part)]


def by_heads(heads: int) -> Split:
    """q, k and v of each head one after the other."""
    return lambda matrix, part: matrix.reshape(heads, 3, -1, matrix.shape[1])[:, "qkv".index(part)].reshape(-1, matrix.shape[1])


def few_keys(queries: int, keys: int) -> Split:
    """All of q, then fewer rows of k, then of v."""
    starts = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, queries + 2 * keys)}
    return lambda matrix, part: matrix[slice(*starts[part])]


def quarters(matrix: Matrix, part: str) -> Matrix:
    """CodeGen: four quarters, in each q, v, k."""
    return matrix.reshape(4, 3, -1, matrix.shape[1])[:, "qvk".index(part)].reshape(-1, matrix.shape[1])


def groups(count: int, queries: int) -> Split:
    """Falcon's newer form: in each group several heads of q, one of k, one of v."""

    def split(matrix: Matrix, part: str) -> Matrix:
        cut = matrix.reshape(count, queries + 2, -1, matrix.shape[1])
        chosen = {"q": cut[:, :queries], "k": cut[:, queries : queries + 1], "v": cut[:, queries + 1 :]}[part]
        return chosen.reshape(-1, matrix.shape[1])

    return split


def levit(matrix: Matrix, part: str) -> Matrix:
    """LeViT: in each head 8 rows of q, 8 of k, 16 of v."""
    first, last = {"q": (0, 8), "k": (8, 16), "v": (16, 32)}[part]
    return matrix.reshape(-1, 32, matrix.shape[1])[:, first:last].reshape(-1, matrix.shape[1])


def levit_between_stages(matrix: Matrix, part: str) -> Matrix:
    """The same where q has a matrix of its own: in each head 8 rows of k, 32 of v."""
    return matrix if part == "q" else matrix.reshape(-1, 40, matrix.shape[1])[:, 8:].reshape(-1, matrix.shape[1])


def transposed(split: Split) -> Split:
    """Stored in x out."""
    return lambda matrix, part: split(np.ascontiguousarray(matrix.T), part)


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**WIDTHS, "vocab_size": 60, **IDS}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**WIDTHS, "image_size": 32, "patch_size": 8}
SEQUENCE = {
    "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1, **IDS,
}  # fmt: skip
SMALL_GPT = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **IDS}
SOUND = {**WIDTHS, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}  # fmt: skip
TWO = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}

BERT = ("self.query", "self.value", "output.dense")
PROJ = ("q_proj", "v_proj", "o_proj")
OUT = ("q_proj", "v_proj", "out_proj")
LIN = ("q_lin", "v_lin", "out_lin")
TEXT_LEFT = ("--tower text or both",)
DECODER_LEFT = ("decoder",)

CASES = [
    # words
    Case("BertModel", TEXT, BERT, fast=True),
    Case("RobertaModel", TEXT, BERT),
    Case("XLMRobertaModel", TEXT, BERT),
    Case("CamembertModel", TEXT, BERT),
    Case("ElectraModel", {**TEXT, "embedding_size": 16}, BERT),
    Case("ErnieModel", TEXT, BERT),
    Case("RemBertModel", {**TEXT, "input_embedding_size": 16, "output_embedding_size": 16}, BERT),
    Case("LayoutLMModel", TEXT, BERT),
    Case("AlbertModel", {**TEXT, "embedding_size": 16}, ("query", "value", "dense"), fast=True),
    Case("DebertaModel", TEXT, ("self.in_proj", "self.in_proj", "output.dense"), by_heads(4)),
    Case("DebertaV2Model", TEXT, ("self.query_proj", "self.value_proj", "output.dense")),
    Case("MPNetModel", TEXT, ("attn.q", "attn.v", "attn.o")),
    Case("LongformerModel", {**TEXT, "attention_window": 4}, BERT),
    Case("NystromformerModel", {**TEXT, "num_landmarks": 4, "segment_means_seq_len": 16}, BERT),
    Case("ConvBertModel", {**TEXT, "embedding_size": 16, "head_ratio": 2}, BERT),
    Case("DistilBertModel", {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0}, LIN),
    Case("XLMModel", {"vocab_size": 60, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0}, LIN),
    Case("FunnelModel", {"vocab_size": 60, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
         ("q_head", "v_head", "post_proj"), notes=DECODER_LEFT),
    Case("ModernBertModel", {**TEXT, "cls_token_id": 1, "sep_token_id": 2}, ("Wqkv", "Wqkv", "Wo"), stacked, fast=True),
    # language models
    Case("LlamaModel", GROUPED, PROJ, fast=True),
    Case("MistralModel", GROUPED, PROJ),
    Case("Qwen2Model", GROUPED, PROJ),
    Case("Qwen3Model", {**GROUPED, "head_dim": 8}, PROJ),
    Case("GemmaModel", {**GROUPED, "head_dim": 16}, PROJ),
    Case("Gemma2Model", {**GROUPED, "head_dim": 16}, PROJ),
    Case("OlmoModel", GROUPED, PROJ),
    Case("Olmo2Model", GROUPED, PROJ),
    Case("GraniteModel", GROUPED, PROJ),
    Case("CohereModel", GROUPED, PROJ),
    Case("StableLmModel", GROUPED, PROJ),
    Case("Starcoder2Model", GROUPED, PROJ),
    Case("NemotronModel", GROUPED, PROJ),
    Case("MixtralModel", {**GROUPED, "num_local_experts": 4}, PROJ),
    Case("Qwen2MoeModel", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}, PROJ),
    Case("PhiModel", TEXT, ("q_proj", "v_proj", "dense"), fast=True),
    Case("Phi3Model", GROUPED, ("qkv_proj", "qkv_proj", "o_proj"), few_keys(32, 16), fast=True),
    Case("GPT2Model", SMALL_GPT, ("c_attn", "c_attn", "c_proj"), transposed(stacked), fast=True),
    Case("OpenAIGPTModel", SMALL_GPT, ("c_attn", "c_attn", "c_proj"), transposed(stacked)),
    Case("ImageGPTModel", SMALL_GPT, ("c_attn", "c_attn", "c_proj"), transposed(stacked)),
    Case("GPTNeoModel",
         {"vocab_size": 60, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
          "max_position_embeddings": 64, **IDS}, OUT),
    Case("GPTJModel", {**SMALL_GPT, "rotary_dim": 4}, OUT),
    Case("GPTNeoXModel", TEXT, ("query_key_value", "query_key_value", "dense"), by_heads(4), fast=True),
    Case("BloomModel", {"vocab_size": 60, "hidden_size": 32, "n_layer": 2, "n_head": 4, **IDS},
         ("query_key_value", "query_key_value", "dense"), by_heads(4)),
    Case("FalconModel", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
         ("query_key_value", "query_key_value", "dense"), groups(2, 2)),
    Case("FalconModel", {**TEXT, "multi_query": True, "new_decoder_architecture": False, "ffn_hidden_size": 48},
         ("query_key_value", "query_key_value", "dense"), few_keys(32, 8)),
    Case("MptModel", {"vocab_size": 60, "d_model": 32, "n_layers": 2, "n_heads": 4}, ("Wqkv", "Wqkv", "out_proj"), stacked),
    Case("CodeGenModel", {**SMALL_GPT, "rotary_dim": 4}, ("qkv_proj", "qkv_proj", "out_proj"), quarters, fast=True),
    Case("GPTBigCodeModel", {**SMALL_GPT, "multi_query": True}, ("c_attn", "c_attn", "c_proj"), few_keys(32, 8)),
    Case("GPTBigCodeModel", {**SMALL_GPT, "multi_query": False}, ("c_attn", "c_attn", "c_proj"), by_heads(4)),
    Case("PersimmonModel", TEXT, ("query_key_value", "query_key_value", "dense"), by_heads(4)),
    Case("OPTModel", {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
                      "word_embed_proj_dim": 32, **IDS}, OUT),
    # words to words
    Case("T5Model", T5, ("q", "v", "o"), notes=DECODER_LEFT),
    Case("MT5Model", T5, ("q", "v", "o"), notes=DECODER_LEFT),
    Case("BartModel", SEQUENCE, OUT, notes=DECODER_LEFT, fast=True),
    Case("MBartModel", SEQUENCE, OUT, notes=DECODER_LEFT),
    Case("PegasusModel", SEQUENCE, OUT, notes=DECODER_LEFT),
    Case("MarianModel", SEQUENCE, OUT, notes=DECODER_LEFT),
    Case("M2M100Model", SEQUENCE, OUT, notes=DECODER_LEFT),
    Case("WhisperModel", {**SEQUENCE, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}, OUT, notes=DECODER_LEFT),
    # pictures
    Case("ViTModel", IMAGE, PROJ, fast=True),
    Case("DeiTModel", IMAGE, PROJ),
    Case("ViTMSNModel", IMAGE, PROJ),
    Case("VideoMAEModel", {**IMAGE, "num_frames": 2}, ("attention.query", "attention.value", "output.dense")),
    Case("Dinov2WithRegistersModel", {k: v for k, v in IMAGE.items() if k != "intermediate_size"}, PROJ),
    Case("DINOv3ViTModel", IMAGE, PROJ),
    Case("BlipVisionModel", IMAGE, ("qkv", "qkv", "projection"), stacked, fast=True),
    Case("Blip2VisionModel", IMAGE, ("qkv", "qkv", "projection"), stacked),
    Case("InternVLVisionModel", {**IMAGE, "image_size": [32, 32], "patch_size": [8, 8]},
         ("q_proj", "v_proj", "projection_layer"), fast=True),
    Case("SamVisionModel",
         {**WIDTHS, "image_size": 32, "patch_size": 8, "window_size": 2, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 48},
         ("qkv", "qkv", "proj"), stacked),
    Case("VitDetModel", {**IMAGE, "pretrain_image_size": 32, "window_size": 0}, ("qkv", "qkv", "proj"), stacked),
    Case("TimesformerModel", {**IMAGE, "num_frames": 2}, ("attention.qkv", "attention.qkv", "output.dense"), stacked),
    Case("LevitModel",
         {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8],
          "attention_ratio": [2, 2, 2], "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]},
         ("queries_keys_values.linear", "queries_keys_values.linear", "projection.linear"), levit,
         also=((("queries.linear", "keys_values.linear", "projection.linear"), levit_between_stages),)),
    Case("SegformerModel",
         {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "num_encoder_blocks": 2,
          "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}, PROJ),
    Case("MobileViTModel", {"image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16]},
         ("attention.query", "attention.value", "output.dense")),
    # pictures and words, sound
    Case("CLIPModel", TWO, OUT, notes=TEXT_LEFT, fast=True),
    Case("SiglipModel", TWO, OUT, notes=TEXT_LEFT),
    Case("AltCLIPModel", {**TWO, "text_config": {**TEXT, "project_dim": 16}}, OUT, notes=TEXT_LEFT),
    Case("CLIPSegModel", TWO, OUT, notes=TEXT_LEFT),
    Case("Wav2Vec2Model", SOUND, OUT),
    Case("HubertModel", SOUND, OUT),
    Case("WavLMModel", SOUND, OUT),
    Case("ViltModel", {**IMAGE, "vocab_size": 60}, ("attention.query", "attention.value", "output.dense")),
]  # fmt: skip
