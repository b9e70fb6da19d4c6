"""Thirty architectures of Hugging Face transformers in tiny configurations, with the keyword arguments they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["TINY", "build"]

_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _INNER, _LENGTH, _LABELS = 512, 64, 2, 4, 128, 16, 11

Draw = Callable[[torch.Generator, int], dict[str, torch.Tensor]]


def _tokens(mask: bool = True, types: bool = False) -> Draw:
    def draw(generator: torch.Generator, batch: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, _VOCABULARY, (batch, _LENGTH), generator=generator)
        further = {"attention_mask": torch.ones_like(ids)} if mask else {}
        return {"input_ids": ids, **further, **({"token_type_ids": torch.zeros_like(ids)} if types else {})}

    return draw


def _floats(name: str, *sizes: int) -> Draw:
    return lambda generator, batch: {name: torch.randn(batch, *sizes, generator=generator)}


def _pixels(size: int = 32) -> Draw:
    return _floats("pixel_values", 3, size, size)


def _pixels_and_mask(generator: torch.Generator, batch: int) -> dict[str, torch.Tensor]:
    return {**_pixels(64)(generator, batch), "pixel_mask": torch.ones(batch, 64, 64, dtype=torch.long)}


_SIZES = {
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _INNER,
}
_TEXT = {
    **_SIZES,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LABELLED = {**_TEXT, "num_labels": _LABELS}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8}
_VIT = {**_IMAGE, "num_labels": _LABELS}
_STAGES = {"depths": [1, 1, 2, 1], "num_labels": _LABELS}
_RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 2, 1]}
_BOTH_SIDES = {
    "vocab_size": _VOCABULARY,
    "d_model": _WIDTH,
    "encoder_layers": _LAYERS,
    "decoder_layers": _LAYERS,
    "encoder_attention_heads": _HEADS,
    "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": _INNER,
    "decoder_ffn_dim": _INNER,
}
_DISTILBERT = {
    "vocab_size": _VOCABULARY,
    "dim": _WIDTH,
    "n_layers": _LAYERS,
    "n_heads": _HEADS,
    "hidden_dim": _INNER,
    "max_position_embeddings": 64,
    "num_labels": _LABELS,
}
_DEBERTA = {
    **_LABELLED,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
_GPT2 = {"vocab_size": _VOCABULARY, "n_embd": _WIDTH, "n_layer": _LAYERS, "n_head": _HEADS, "n_positions": 64}
_OPT = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "ffn_dim": _INNER,
    "word_embed_proj_dim": _WIDTH,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": _VOCABULARY,
    "d_model": _WIDTH,
    "d_kv": 16,
    "d_ff": _INNER,
    "num_layers": _LAYERS,
    "num_heads": _HEADS,
}
_SWIN = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": _LABELS,
}
_BEIT = {**_VIT, "use_relative_position_bias": True, "use_mask_token": False, "vocab_size": _VOCABULARY}
_REGNET = {
    "embedding_size": 16,
    "hidden_sizes": [32, 64, 96, 128],
    "depths": [1, 1, 2, 1],
    "groups_width": 16,
    "layer_type": "y",
    "num_labels": _LABELS,
}
_SEGFORMER = {
    "hidden_sizes": [16, 32, 64, 128],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 2, 4, 8],
    "sr_ratios": [8, 4, 2, 1],
    "decoder_hidden_size": 64,
    "num_labels": _LABELS,
}
_DETR = {
    **{k: v for k, v in _BOTH_SIDES.items() if k != "vocab_size"},
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "num_queries": 10,
    "num_labels": _LABELS,
    "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]}),
}
_WAV2VEC2 = {
    **_SIZES,
    "conv_dim": (32,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_WHISPER = {
    **_BOTH_SIDES,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_GROUPED_HEADS = {**_TEXT, "num_key_value_heads": 2}

TINY: dict[str, tuple[str, str, dict[str, Any], str, Draw]] = {
    "bert": ("BertModel", "BertConfig", _TEXT, "", _tokens(types=True)),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", _DISTILBERT, "", _tokens()),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _LABELLED, "", _tokens()),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_LABELLED, "embedding_size": 32}, "", _tokens()),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_LABELLED, "embedding_size": 32},
        "",
        _tokens(),
    ),
    "deberta_v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", _DEBERTA, "", _tokens()),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_GPT2, "bos_token_id": 1, "eos_token_id": 2}, "", _tokens(False)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, "", _tokens(False)),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT, "", _tokens()),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_TEXT, "num_key_value_heads": _HEADS}, "", _tokens(False)),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED_HEADS, "head_dim": 16}, "", _tokens(False)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED_HEADS, "", _tokens(False)),
    "gemma": (
        "GemmaForCausalLM",
        "GemmaConfig",
        {**_TEXT, "num_key_value_heads": 1, "head_dim": 16},
        "",
        _tokens(False),
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _TEXT, "", _tokens(False)),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5, "", _tokens()),
    "bart_encoder": ("BartModel", "BartConfig", {**_BOTH_SIDES, "max_position_embeddings": 64}, "encoder", _tokens()),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT, "", _pixels()),
    "deit": ("DeiTForImageClassification", "DeiTConfig", _VIT, "", _pixels()),
    "swin": ("SwinForImageClassification", "SwinConfig", _SWIN, "", _pixels(64)),
    "beit": ("BeitForImageClassification", "BeitConfig", _BEIT, "", _pixels()),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {**_STAGES, "hidden_sizes": [16, 32, 64, 128]},
        "",
        _pixels(64),
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {**_RESNET, "num_labels": _LABELS}, "", _pixels(64)),
    "mobilenet_v2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"num_labels": _LABELS, "image_size": 96},
        "",
        _pixels(96),
    ),
    "regnet": ("RegNetForImageClassification", "RegNetConfig", _REGNET, "", _pixels(64)),
    "segformer": ("SegformerForSemanticSegmentation", "SegformerConfig", _SEGFORMER, "", _pixels(64)),
    "detr": ("DetrForObjectDetection", "DetrConfig", _DETR, "", _pixels_and_mask),
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _WAV2VEC2, "", _floats("input_values", 4000)),
    "whisper_encoder": ("WhisperModel", "WhisperConfig", _WHISPER, "encoder", _floats("input_features", 80, 64)),
    "clip_vision": ("CLIPVisionModel", "CLIPVisionConfig", _IMAGE, "", _pixels()),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**{k: v for k, v in _VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2},
        "",
        _pixels(),
    ),
}
"""Name -> class of the model, class of the configuration, its options, which child to use ("": all), its inputs."""


def build(model_class: str, config_class: str, options: dict[str, Any], part: str) -> nn.Module:
    """A model with random weights; a pair of a class and options among the options is a configuration, too."""
    import transformers

    made = {k: getattr(transformers, v[0])(**v[1]) if k == "backbone_config" else v for k, v in options.items()}
    config = getattr(transformers, config_class)(**made)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model = getattr(transformers, model_class)(config)
    return getattr(model, part) if part else model
