"""The model card of an exported run: what it is, how to compute its predictions, what it was trained on, its limits."""

import json
from collections.abc import Sequence
from pathlib import Path
from string import Template

import torch
import yaml

from weights import hub_id

LOAD = {
    "transformers": """\
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel

directory = "."  # where this card lies
extractor = AutoFeatureExtractor.from_pretrained(directory)
backbone = AutoModel.from_pretrained(directory).eval()
head = load_file(f"{directory}/head.safetensors")
""",
    "peft": """\
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel

directory = "."  # where this card lies
extractor = AutoFeatureExtractor.from_pretrained(directory)
backbone = PeftModel.from_pretrained(AutoModel.from_pretrained($BASE), directory).eval()
head = load_file(f"{directory}/head.safetensors")
""",
    "onnx": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
""",
}
PREDICT = '''

@torch.no_grad()
def predict(waveform):
    """Predictions in the label's scale, of a mono waveform at 16 kHz of at least 400 samples."""
    inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
    output = backbone(inputs, output_hidden_states=True)
    frames = output.last_hidden_state[0]
    $POOLING
    y = $LOW + ($HIGH - $LOW) * F.linear(x, head["output.weight"], head["output.bias"])
    return dict(zip($TARGETS, y.tolist()))
'''
PREDICT_ONNX = '''

def predict(waveform):
    """Predictions in the label's scale, of a mono waveform at 16 kHz of at least 400 samples."""
    values = session.run(None, {"waveform": np.asarray(waveform, np.float32)})
    return {output.name: float(value) for output, value in zip(session.get_outputs(), values)}
'''
POOLING = {
    "mean": "x = frames.mean(0)",
    "mean_std": "x = torch.cat([frames.mean(0), frames.var(0, correction=0).clamp_min(1e-10).sqrt()])",
    "attentive": 'x = (frames * F.linear(frames, head["score.weight"]).softmax(0)).sum(0)',
    "layers": """states = torch.cat([*output.hidden_states[:-1], output.last_hidden_state])
    x = head["layer_weights"].softmax(0) @ states.mean(1)""",
}
HIDDEN = """
    x = F.gelu(F.linear(x, head["hidden.weight"], head["hidden.bias"]))"""
CARD = """\
---
$FRONT_MATTER---

# $TITLE

${NOTE}Predicts $NAMES of speech, in the scale of the corpus's labels, from $LOW to $HIGH. The predictions are estimates
of how listeners would rate a recording.

## Use

```python
$CODE```

Convert stereo and other sampling rates before, cut what is longer than about 20 seconds, and give one recording at a
time: where a model's first normalisation runs over time, a padded batch changes its values.

## Scores

Concordance correlation coefficient (CCC) on the test set, $TESTED. The intervals are bootstrapped over speakers.

$SCORES

${NOTE}## Data

Corpus: $CORPUS. Labels from $LOW to $HIGH.

$SPLITS

## Method

$METHOD

What was set otherwise than by default:

```yaml
$CONFIG```

## Backbone and licence

$LICENCE The corpus has terms of its own, which may restrict what was derived from it as well.

## Intended use and limits

For research on how emotion in speech is perceived, on recordings like those of the corpus above, of speakers who know
and agree. The labels are means of what listeners marked, and listeners disagree; the model repeats their habits and
biases. It does not know what a person feels, thinks or intends, nor who lies, is ill or fit for work.

- Not for decisions about people: hiring, schooling, policing, credit, insurance, care. In the European Union inferring
  emotions at work and in education is prohibited, with few exceptions (Regulation 2024/1689, Article 5).
- Other languages, accents, ages, microphones, noise and ways of speaking than the corpus has: unknown, often worse.
  The scores above say nothing about them, nor about groups of speakers. Measure on recordings of your own.
- Valence depends much on the words, which such a model hears only in part. A single prediction can be far off, and
  says nothing about its own certainty; means over many recordings are more reliable.

## Versions

$VERSIONS
"""


def card(
    result: dict, config: dict, changed: dict, source: str, form: str, targets: Sequence[str], label_range: Sequence
) -> str:
    """The README.md of an export, with the front matter that the Hugging Face hub reads.

    `result` is what `result.json` holds, `config` all settings as plain values, `changed` those worth telling, `source`
    where the backbone came from, and `form` the format: "transformers", "peft" or "onnx".
    """
    names, note, tested = " and ".join(targets), result.get("note"), result["corpus"]["test"]
    low, high = (f"{value:g}" for value in label_range)
    versions = [f"{name} {version}" for name, version in result["versions"].items()]
    fields = {
        "FRONT_MATTER": yaml.safe_dump(front_matter(source, form), sort_keys=False),
        "TITLE": f"{names.capitalize()} from speech: {config['name']}",
        "NOTE": f"**{note}**\n\n" if note else "",
        "NAMES": names,
        "LOW": low,
        "HIGH": high,
        "CODE": code(config, form, targets, low, high),
        "TESTED": f"{tested['utterances']:,} utterances of {tested['speakers']:,} speakers",
        "SCORES": table(["target", "CCC", "95% interval"], [score_cells(*item) for item in result["test"].items()]),
        "CORPUS": f"manifest `{Path(config['manifest']).name}`" if config["manifest"] else config["corpus"],
        "SPLITS": table(["split", "utterances", "speakers", "hours"], split_cells(result["corpus"])),
        "METHOD": method(result, config),
        "CONFIG": yaml.safe_dump(changed, sort_keys=False),
        "LICENCE": f"The backbone is `{Path(source).name if Path(source).exists() else source}`. {licence(source)[1]}",
        "VERSIONS": f"Trained with {', '.join(versions)}; exported with torch {torch.__version__}.",
    }
    return Template(CARD).substitute(fields)


def front_matter(source: str, form: str) -> dict:
    """What the hub reads of a card."""
    about = {"library_name": form, "pipeline_tag": "audio-classification", "license": licence(source)[0]}
    if base := hub_id(source):
        about |= {"base_model": base[0], "base_model_relation": "adapter" if form == "peft" else "finetune"}
    return about | {"tags": ["speech", "speech-emotion-recognition"]}


def licence(source: str) -> tuple[str, str]:
    """The hub's name of a backbone's licence, and a sentence about it."""
    if source.startswith("facebook/wav2vec2-"):
        return "apache-2.0", "It is published under the Apache License 2.0."
    if source.startswith("audeering/"):
        return (
            "cc-by-nc-sa-4.0",
            "It is published under CC BY-NC-SA 4.0: not for commercial use, nor what follows from it.",
        )
    return "other", "For its licence see the backbone's own."


def code(config: dict, form: str, targets: Sequence[str], low: str, high: str) -> str:
    """Python that computes the predictions from the files beside the card."""
    if form == "onnx":
        return LOAD[form] + PREDICT_ONNX
    pooling = POOLING[config["pooling"]] + (HIDDEN if config["head_width"] else "")
    name, revision = hub_id(config["backbone"]) or (config["backbone"], None)
    base = json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else "")
    fields = {"POOLING": pooling, "LOW": low, "HIGH": high, "TARGETS": json.dumps(list(targets))}
    return Template(LOAD[form] + PREDICT).substitute(fields, BASE=base)


def method(result: dict, config: dict) -> str:
    """What trained, and how, in words."""
    layers, trained = config["trainable_layers"], []
    if layers == "all":
        trained.append("all of the backbone but its feature encoder")
    elif isinstance(layers, list) and layers:
        trained.append(f"transformer layers {', '.join(map(str, layers))}")
    elif layers:
        trained.append(f"the last {layers} transformer layers")
    if config["lora_rank"]:
        trained.append(f"LoRA of rank {config['lora_rank']} on {', '.join(config['lora_targets'])}")
    adapter = f" after the adapter `{Path(config['adapter']).name}` was merged" if config["adapter"] else ""
    return (
        f"Trained{adapter}: {' and '.join([*trained, 'the head'])}; {result['trainable_parameters']:,} of "
        f"{result['total_parameters']:,} parameters. The loss is 1 - CCC over a batch. Pooling: {config['pooling']}. "
        f"Precision: {result['precision']}. Epochs: {result['epochs']}; here are the weights of number "
        f"{result['best_epoch']}, the best on the development set (mean CCC {result['dev_ccc']:.3f})."
    )


def score_cells(target: str, score: dict) -> list[str]:
    interval = "none, of one speaker" if score["ci95"] is None else "{:.3f} to {:.3f}".format(*score["ci95"])
    return [target, f"{score['ccc']:.3f}", interval]


def split_cells(corpus: dict) -> list[list[str]]:
    splits = {name: numbers for name, numbers in corpus.items() if isinstance(numbers, dict)}
    return [[name, f"{n['utterances']:,}", f"{n['speakers']:,}", f"{n['hours']:.3g}"] for name, n in splits.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
