"""A backbone with random weights: for tests and benchmarks."""

import torch
from torch import nn

from model import Wav2Vec2, Wav2Vec2Config


def random_backbone(config: Wav2Vec2Config, seed: int = 0) -> Wav2Vec2:
    """A backbone with random weights, distributed as before pretraining; the same for the same seed."""
    with torch.device("meta"):
        backbone = Wav2Vec2(config)
    backbone = backbone.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if hasattr(module, "gate_scale"):
            nn.init.ones_(module.gate_scale)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    nn.init.uniform_(backbone.projection.mask_embedding, generator=generator)
    return backbone
