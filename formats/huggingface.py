"""Write a backbone as a Hugging Face directory."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from machine.hardware import replace
from model import Wav2Vec2, Wav2Vec2Config
from weights import SETTINGS_FILES, WEIGHT_FILES, tap_norms, translate

FIELDS = """
conv_dim=conv_channels conv_kernel=conv_kernels conv_stride=conv_strides conv_bias=conv_bias feat_extract_norm=conv_norm
hidden_size=width num_hidden_layers=layers num_attention_heads=heads intermediate_size=ffn do_stable_layer_norm=pre_norm
num_conv_pos_embeddings=position_kernel num_conv_pos_embedding_groups=position_groups layer_norm_eps=norm_eps
"""  # of a `config.json`, and ours
FAMILIES = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "wavlm": "WavLMModel"}  # what transformers calls them


def save_backbone(backbone: Wav2Vec2, directory: str | Path, family: str = "wav2vec2") -> None:
    """Write a backbone as a Hugging Face directory for `from_pretrained` and `load_backbone`.

    In fp32; `family` "hubert" is for `HubertModel`, the same architecture, and what has WavLM's bias for `WavLMModel`.
    The weight `w` of the positional convolution becomes `v = w` and `g = |v|`, so that `g v / |v|` is `w`.
    Raises ValueError for a backbone with LoRA in it or with a dropped prefix.
    """
    state = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    state |= {name: scale.view(1, -1, 1, 1) for name, scale in state.items() if name.endswith(".gate_scale")}
    w = state.pop("position.conv.weight").float()
    norm = tap_norms(w)
    state["position.g"] = norm
    state["position.v"] = w.where(norm > 0, 1.0)  # where w is 0, g is, and v must not be: 0/0
    tensors = {}
    for name, tensor in state.items():
        keys = translate(name)
        if not keys or tensor.is_meta:
            what = "is not in memory; save it before its prefix goes" if keys else "has no place; merge LoRA first"
            raise ValueError(f"{directory}: cannot hold the backbone: {name} {what}")
        tensors[keys[0]] = tensor.to("cpu", torch.float32).contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # The backbone may be mapped from the very file that is replaced.
    replace(directory / WEIGHT_FILES[0], lambda path: save_file(tensors, path, {"format": "pt"}))
    for name, settings in zip(SETTINGS_FILES, settings_of(backbone.config, family), strict=False):
        (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def settings_of(config: Wav2Vec2Config, family: str = "wav2vec2") -> tuple[dict, dict]:
    """An architecture as `config.json` and `preprocessor_config.json` say it."""
    family = "wavlm" if config.relative_buckets else family if config.projection_norm else "hubert"
    settings: dict[str, object] = {"model_type": family, "architectures": [FAMILIES[family]]}
    settings |= {"hidden_act": "gelu", "feat_extract_activation": "gelu"}
    settings |= {theirs: getattr(config, ours) for theirs, ours in (pair.split("=") for pair in FIELDS.split())}
    if config.relative_buckets:
        settings |= {"num_buckets": config.relative_buckets, "max_bucket_distance": config.relative_distance}
    if not config.projection_norm:  # only HuBERT's classes can leave it out
        settings["feat_proj_layer_norm"] = False
    preprocessing = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize_waveform,
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config.conv_norm == "layer",  # the group kind was trained without, says its publisher
    }
    return settings, preprocessing
