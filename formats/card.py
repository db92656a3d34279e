"""The model card of an exported run: what it is, how to compute its predictions, what it was trained on, its limits."""

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
    known = (licence for start, licence in LICENCES.items() if source.startswith(start))
    licence, sentence = next(known, ("other", "For its licence see the backbone's own."))
    about = {"library_name": form, "license": licence, "pipeline_tag": "audio-classification"}
    if named := hub_id(source):
        about |= {"base_model": named[0], "base_model_relation": "adapter" if form == "peft" else "finetune"}
    base, revision = hub_id(config["backbone"]) or (config["backbone"], None)
    fields = {
        "corpus": f"manifest `{Path(config['manifest']).name}`" if config["manifest"] else config["corpus"],
        "adapter": Path(config["adapter"] or "").name,
        "changed": yaml.safe_dump(changed, sort_keys=False),
        "backbone": Path(source).name if Path(source).exists() else source,
        "licence": sentence,
    }
    fields |= {"result": result, "config": config, "form": form, "targets": list(targets), "torch": torch.__version__}
    fields |= {"base": base, "revision": revision, "low": f"{label_range[0]:g}", "high": f"{label_range[1]:g}"}
    front_matter = ModelCardData(**about, tags=["speech", "speech-emotion-recognition"])
    return f"{ModelCard.from_template(front_matter, str(Path(__file__).with_suffix('.md')), **fields)}\n"
