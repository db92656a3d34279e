"""Write an emotion model as an ONNX file: waveform in, predictions out."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import FIELD, EmotionModel, normalize

ONE_FILE = 2_000_000_000  # bytes of weights: what a protobuf holds


class Graph(nn.Module):
    """An emotion model for one waveform, with plain convolutions: no pieces, spectra or calls that ONNX lacks."""

    def __init__(self, model: EmotionModel):
        super().__init__()
        self.model = model

    def forward(self, waveform: Tensor) -> tuple[Tensor, ...]:
        """Waveform `(S,)` at 16 kHz -> a number `()` for each target, in the label's scale."""
        backbone, (low, high) = self.model.backbone, self.model.label_range
        config = backbone.config
        x = self.encode(normalize(waveform) if config.normalize_waveform else waveform)
        lengths = [x.shape[0]]
        x = backbone.projection(x, lengths)
        x = x + F.gelu(backbone.position.conv(x.mT[None])[0].mT[: x.shape[0]])  # (T, D) -> (1, D, T), and back
        states = [x if config.pre_norm else backbone.norm(x)]
        for layer in backbone.layers:
            states.append(layer(states[-1], lengths))
        if config.pre_norm:
            states[-1] = backbone.norm(states[-1])
        return (low + (high - low) * self.model.head(self.pool(states))).unbind()

    def encode(self, waveform: Tensor) -> Tensor:
        """`(S,)` -> `(T, C)`."""
        encoder = self.model.backbone.feature_encoder
        x = waveform[None, None]
        for i, conv in enumerate(encoder.convs):
            x = conv(x)  # (1, C, T)
            if not encoder.group_norm:
                x = encoder.norms[i](x.mT).mT
            elif i == 0:  # each channel over time
                x = F.group_norm(x, x.shape[1], encoder.norms[0].weight, encoder.norms[0].bias, encoder.norms[0].eps)
            x = F.gelu(x)
        return x[0].mT

    def pool(self, states: Sequence[Tensor]) -> Tensor:
        """All hidden states `(T, D)` -> what the head takes."""
        x, pooling = states[-1], self.model.pooling
        if pooling == "layers":
            return self.model.layer_weights.softmax(0) @ torch.stack([state.mean(0) for state in states])
        if pooling == "attentive":
            return (x * self.model.score(x).softmax(0)).sum(0)
        if pooling == "mean_std":
            return torch.cat([x.mean(0), x.var(0, correction=0).clamp_min(1e-10).sqrt()])
        return x.mean(0)


@torch.no_grad()
def save_onnx(model: EmotionModel, path: Path) -> None:
    """One file, "waveform" `(S,)` with S from 400 in, targets by name out; above 2 GB the weights lie beside it."""
    if model.backbone.config.relative_buckets:
        raise ValueError("--format onnx: cannot hold WavLM's attention bias; use --format transformers")
    graph = Graph(model).eval()
    example = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    low, high = model.label_range
    difference = (torch.stack(graph(example)) - low - (high - low) * model.infer([example])[0]).abs().max().item()
    if difference > 1e-4 * (high - low):
        raise ValueError(f"--format onnx: the graph's predictions are {difference:.2g} off; use --format transformers")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every optional package that it does not find
    names = {"input_names": ["waveform"], "output_names": list(model.targets)}
    sizes = {"dynamic_shapes": ({0: torch.export.Dim("samples", min=FIELD)},)}
    sizes["external_data"] = sum(parameter.nbytes for parameter in model.parameters()) > ONE_FILE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(graph, (example,), path, **names, **sizes, dynamo=True, verbose=False)
    except ImportError as error:
        raise ValueError(f"--format onnx: needs onnx and onnxscript ({error}); pip install onnx onnxscript") from None
