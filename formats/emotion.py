"""The emotion models that audeering published: a backbone with a head for arousal, dominance and valence."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from data import say_once
from model import EmotionModel
from run import LICENCE
from weights import locate, make_backbone, misfits, read, refuse, require_finite, unusable

PLACES = {"classifier.dense": "0", "classifier.out_proj": "3"}  # of the head's layers in `EmotionModel.head`
TARGETS = ("activation", "dominance", "valence")  # in the order of a file that does not name them


def load_emotion_model(source: str | Path) -> EmotionModel:
    """A published emotion model, on labels from 0 to 1, in eval mode and fp32: backbone, mean over the frames and head.

    As of `audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim` (Wagner et al. 2023, arXiv 2203.07378), whose head is
    `out_proj(tanh(dense(x)))`. `source` as in `load_backbone`. Raises FileNotFoundError, or ValueError if there is no
    such head or if it predicts something else.
    """
    try:
        files = locate(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source}: no run here; as a published emotion model: {error}") from None
    path, (tensors, settings) = files[0], read(files)
    if any(f"{key}.weight" not in tensors or tensors[f"{key}.weight"].ndim != 2 for key in PLACES):
        raise ValueError(f"{path}: has no emotion head; expected {' and '.join(PLACES)} beside the backbone")
    if (pooling := settings.get("pooling_mode", "mean")) != "mean":
        raise ValueError(f"{path}: pooling_mode is {pooling!r} in its settings; only 'mean' is known here")
    backbone = make_backbone(tensors, settings, path)
    head = {key: tensor for key, tensor in tensors.items() if key.startswith("classifier.")}
    targets = name_targets(settings, len(head["classifier.out_proj.weight"]), path)
    with torch.device("meta"):  # no memory for a head before it is known to fit
        model = EmotionModel(backbone, targets, (0.0, 1.0), head_width=len(head["classifier.dense.weight"]))
    model.head[1] = nn.Tanh()
    ours = {f"{key}.{kind}": f"{place}.{kind}" for key, place in PLACES.items() for kind in ("weight", "bias")}
    refuse([f"{key} has no known place in its head" for key in head if key not in ours], path)
    refuse([f"{key} {problem}" for key, tensor in head.items() if (problem := unusable(tensor))], path)
    shapes = {key: model.head.get_parameter(name).shape for key, name in ours.items()}
    refuse(misfits(head, shapes, {key: key for key in head}), path)
    model.head.load_state_dict({ours[key]: tensor.float() for key, tensor in head.items()}, assign=True)
    require_finite(dict(model.named_parameters()), source)
    say_once(f"note: {LICENCE}")
    return model.eval()


def name_targets(settings: Mapping, count: int, path: Path) -> tuple[str, ...]:
    """The targets of an emotion head by our names, in the order of its outputs: from `id2label` if that names them."""
    labels = settings.get("id2label")
    names = [str(name).lower() for _, name in sorted(labels.items())] if isinstance(labels, dict) else []
    if not names or names == [f"label_{i}" for i in range(count)]:  # what transformers writes where nobody named them
        names, advice = list(TARGETS), "To set them, put id2label into its config.json"
        say_once(f"note: {path}: no settings name its {count} outputs; assumed {', '.join(names)}. {advice}")
    targets = tuple("activation" if name == "arousal" else name for name in names)
    if not set(targets) <= set(TARGETS) or not len(set(targets)) == len(targets) == count:
        expected = "each of arousal, dominance and valence at most once"
        raise ValueError(f"{path}: its {count} outputs are {', '.join(names)}; expected {expected}")
    return targets
