"""The model card of an exported run: what it is, how to compute its predictions, what it was trained on, its limits."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from weights import hub_id

NOT_FOR_MONEY = "It is published under CC BY-NC-SA 4.0: not for commercial use, nor what follows from it."
LICENCES = {  # by how the name of a backbone begins: the hub's word, and a sentence
    "facebook/wav2vec2-": ("apache-2.0", "It is published under the Apache License 2.0."),
    "audeering/": ("cc-by-nc-sa-4.0", NOT_FOR_MONEY),
    "small": ("cc-by-nc-sa-4.0", NOT_FOR_MONEY),
}


def card(
    result: dict, config: dict, changed: dict, source: str, form: str, targets: Sequence[str], label_range: Sequence
) -> str:
    """The README.md of an export, `card.md` filled in, with the front matter that the Hugging Face hub reads.

    `result` is what `result.json` holds, `config` all settings as plain values, `changed` those worth telling, `source`
    where the backbone came from, and `form` the format: "transformers", "peft" or "onnx".
    """
    low, high = (f"{value:g}" for value in label_range)
    name, revision = hub_id(config["backbone"]) or (config["backbone"], None)
    fields = {
        "names": " and ".join(targets),
        "note": result.get("note"),
        "base": json.dumps(name) + (f", revision={json.dumps(revision)}" if revision else ""),
        "corpus": f"manifest `{Path(config['manifest']).name}`" if config["manifest"] else config["corpus"],
        "adapter": Path(config["adapter"] or "").name,
        "trained": " and ".join([*trained(config), "the head"]),
        "changed": yaml.safe_dump(changed, sort_keys=False),
        "backbone": Path(source).name if Path(source).exists() else source,
        "licence": licence(source)[1],
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
    }
    fields |= {"result": result, "config": config, "form": form, "targets": json.dumps(list(targets))}
    fields |= {"low": low, "high": high, "torch": torch.__version__}
    template = str(Path(__file__).with_suffix(".md"))
    return f"{ModelCard.from_template(front_matter(source, form), template, **fields)}\n"


def front_matter(source: str, form: str) -> ModelCardData:
    """What the hub reads of a card."""
    base, relation = hub_id(source), "adapter" if form == "peft" else "finetune"
    named = {"base_model": base[0], "base_model_relation": relation} if base else {}
    about = {"library_name": form, "pipeline_tag": "audio-classification", "license": licence(source)[0]}
    return ModelCardData(**about, **named, tags=["speech", "speech-emotion-recognition"])


def licence(source: str) -> tuple[str, str]:
    """The hub's name of a backbone's licence, and a sentence about it."""
    known = (licence for start, licence in LICENCES.items() if source.startswith(start))
    return next(known, ("other", "For its licence see the backbone's own."))


def trained(config: dict) -> list[str]:
    """What trained of the backbone, in words."""
    layers, found = config["trainable_layers"], []
    if layers == "all":
        found.append("all of the backbone but its feature encoder")
    elif isinstance(layers, list) and layers:
        found.append(f"transformer layers {', '.join(map(str, layers))}")
    elif layers:
        found.append(f"the last {layers} transformer layers")
    if config["lora_rank"]:
        found.append(f"LoRA of rank {config['lora_rank']} on {', '.join(config['lora_targets'])}")
    return found
