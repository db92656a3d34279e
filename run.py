"""One place that turns a configuration into a model, and a run's directory into a model again."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

import data
import weights
from cache import check_space
from config import Config, load_config, make_config, split_words
from formats.adapter import FILES as ADAPTER_FILES
from formats.adapter import merge_adapter
from freeze import freeze, layer_numbers, load_trained
from frozen import Prefix, deepest, fill
from lora import inject, merge
from machine import parallel, writing
from machine.hardware import pick_device, pick_precision, prepare
from model import EmotionModel, Wav2Vec2Config
from report.logmel import LogMel

REGULARISATION = {field.name for field in fields(Wav2Vec2Config)} & {field.name for field in fields(Config)}
DEMO_NOTE = "demo corpus: synthetic sounds, so this is no result about emotion"
LICENCE = "the emotion models that audeering published are licensed CC BY-NC-SA 4.0: not for commercial use"


def load_utterances(config: Config) -> tuple[list[data.Utterance], tuple[float, float]]:
    """The corpus and the range of its labels, checked. Raises FileNotFoundError or ValueError."""
    utterances = data.load_corpus(**corpus_keys(config))
    label_range = data.find_label_range(config.corpus, config.label_range, utterances, config.targets)
    data.check_labels(utterances, config.targets, label_range, config.allow_speaker_overlap)
    return utterances, label_range


def corpus_keys(config: Config) -> dict:
    """The arguments of `data.load_corpus`."""
    return {
        "name": config.corpus,
        "root": config.data_root,
        "manifest": config.manifest,
        "targets": config.targets,
        "fold": config.fold,
        "test_set": config.test_set,
        "dev_set": config.dev_set,
        "flip_activation": config.flip_activation,
    }


def build_model(config: Config, label_range: tuple[float, float]) -> tuple[EmotionModel, dict[str, str]]:
    """The model as configured, on the CPU and in eval mode, and the identity of its backbone: source and SHA-256."""
    backbone, identity = find_backbone(config)
    return assemble(config, backbone, label_range), identity


def find_backbone(config: Config) -> tuple[nn.Module, dict[str, str]]:
    """The pretrained backbone, an adapter merged into it, and the identity of both.

    The demo corpus alone makes do with random weights.
    """
    if config.backbone == "logmel":
        backbone = LogMel()
        return backbone, {"source": "logmel", "sha256": weights.sha256_of(backbone)}
    regularisation = {key: getattr(config, key) for key in REGULARISATION}
    try:
        files = weights.locate(config.backbone)
        backbone = weights.load_backbone(config.backbone, **regularisation)
        if len(files) > 1 and weights.is_emotion_head(weights.read(files)[0]):  # one alone is no published directory
            data.say_once(f"note: {config.backbone}: its emotion head is left out; {LICENCE}")
        if config.adapter is None:
            return backbone, {"source": config.backbone, "sha256": weights.sha256(files)}
        merge_adapter(backbone, config.adapter, config.backbone)
        files += [Path(config.adapter) / name for name in ADAPTER_FILES]
        return backbone, {"source": f"{config.backbone} with {config.adapter}", "sha256": weights.sha256(files)}
    except weights.UnavailableError as error:
        if config.corpus != "demo" or config.adapter is not None:
            raise
        print(f"warning: {error}\nwarning: the demo goes on with RANDOM weights of wav2vec2-base", file=sys.stderr)
        backbone = weights.random_backbone(Wav2Vec2Config(**regularisation))
        return backbone, {"source": f"random, as {config.backbone}", "sha256": weights.sha256_of(backbone)}


def assemble(config: Config, backbone: nn.Module, label_range: tuple[float, float]) -> EmotionModel:
    """Backbone and head with what trains as configured."""
    backbone.gradient_checkpointing = config.gradient_checkpointing
    torch.manual_seed(config.seed)  # of pooling, head and LoRA
    head = config.head_width, config.head_dropout, config.pooling
    model = EmotionModel(backbone, config.targets, label_range, *head)
    freeze(model, config.trainable_layers)
    if config.lora_rank:
        count = backbone.config.layers
        trainable = set(layer_numbers(config.trainable_layers, count))
        chosen = layer_numbers("all" if config.lora_layers is None else config.lora_layers, count, "lora_layers")
        if config.lora_layers is None:
            chosen = [number for number in chosen if number not in trainable]
        if both := trainable.intersection(chosen):
            raise ValueError(f"lora_layers: layer {min(both)} is in trainable_layers too; it is one or the other")
        inject(model, config.lora_rank, config.lora_alpha, config.lora_targets, chosen, config.lora_dropout)
    return model.eval()


def build_caches(words: Sequence[str]) -> dict[str, dict]:
    """Compute what the caches of configs lack; those alike in corpus and backbone share one pass over the audio.

    `words` are paths of configs, and `key=value` for all of them. For each path the cache's "directory", its "bytes",
    and the "seconds" that building it alone would have taken, None if it was complete.
    """
    groups: dict[tuple, dict[Path, Prefix]] = {}  # by what must be alike, and there by the cache's directory
    directories: dict[str, Path] = {}
    paths, overrides = split_words(words)
    if not paths:
        raise ValueError("build: expected at least one config")
    seconds_of = lru_cache(lambda paths: sum(data.check_audio([data.Utterance(path, "", "", {}) for path in paths])))
    for path in paths:
        config = load_config(path, overrides)
        device = pick_device(config.device)
        precision = pick_precision(config.precision, device)
        with parallel.first_alone():  # it writes the demo corpus
            utterances, label_range = load_utterances(config)
        audio = tuple(utterance.source for utterance in utterances)
        seconds = seconds_of(audio)  # before the model, as it names what is wrong with the corpus
        with parallel.first_alone():  # it downloads
            model, identity = build_model(config, label_range)
        prefix = Prefix(model, audio, device, precision, config.micro_batch_size or config.batch_size)
        prefix.open_cache(config.cache_dir, config.cache_dtype, identity, seconds)
        prefix.cache.note_user(path, identity["source"])
        kind = (audio, identity["sha256"], model.backbone.config.normalize_waveform, device, precision, config.tf32)
        group = groups.setdefault(kind, {})
        group.setdefault(prefix.cache.directory, prefix)
        directories[path] = prefix.cache.directory
        for other in set(group.values()) - {deepest(group.values())}:
            other.model.to("meta")  # the deepest computes for all
    check_space({directory: prefix.space for group in groups.values() for directory, prefix in group.items()})
    built = {}
    for (*_, device, precision, tf32), group in groups.items():
        prepare(deepest(group.values()).model, device, precision, tf32)
        built |= dict(zip(group, fill(list(group.values())), strict=True))
    return {path: built[directory] for path, directory in directories.items()}


def load_run(source: str | Path, device: str = "cpu", merged: bool = True) -> EmotionModel:
    """The best model of a finished run, LoRA merged or still apart, in eval mode; or a published emotion model.

    `source` is a run's directory, or what `weights.load_emotion_model` reads: a Hugging Face directory or a hub id.
    Raises FileNotFoundError or ValueError.
    """
    directory = Path(source)
    is_hub_id = len(directory.parts) == 2 and not directory.parent.exists()  # not where a run is just not there yet
    if is_hub_id or (directory / "config.json").is_file():
        try:
            model = weights.load_emotion_model(source)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source}: no run here; as a published emotion model: {error}") from None
        require_finite(model, {"source": str(source)})
        data.say_once(f"note: {LICENCE}")
        return model.to(pick_device(device))
    path, (best, config) = directory / "best.pt", load_best(directory)
    try:
        model, identity = build_model(config, tuple(config.label_range))
        require_backbone(path, best, identity)
        load_trained(model, best["trained"])
        require_finite(model, identity)
    except (FileNotFoundError, ValueError) as error:
        kind, reason = ValueError if isinstance(error, ValueError) else FileNotFoundError, str(error)
        raise kind(f"{path}: {reason.removeprefix(f'{path}: ')}") from None
    if merged:
        merge(model)
    return model.to(pick_device(device)).eval()


def load_best(directory: Path) -> tuple[dict, Config]:
    """A run's best checkpoint and its configuration, `label_range` filled in; raises as `load_checkpoint` does."""
    path = directory / "best.pt"
    best = load_checkpoint(path)
    if not isinstance(best.get("config"), dict) or not isinstance(best.get("label_range"), list):
        raise ValueError(f"{path}: is no checkpoint of train.py: it has no configuration or label_range")
    return best, make_config(best["config"] | {"label_range": best["label_range"]}, str(path))


def load_checkpoint(path: Path, identity: dict[str, str] | None = None) -> dict:
    """A checkpoint of ours, from which nothing but tensors and plain values can come.

    Raises FileNotFoundError, or ValueError if it is damaged or was trained on another backbone than `identity`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a run's directory, as train.py writes it")
    try:
        weights.require_plain(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: is not a whole checkpoint ({writing.first_line(error)})") from None
    if not isinstance(checkpoint, dict) or not {"trained", "backbone"} <= checkpoint.keys():
        raise ValueError(f"{path}: is no checkpoint of train.py")
    trained, backbone = checkpoint["trained"], checkpoint["backbone"]
    told = isinstance(backbone, dict) and all(isinstance(backbone.get(key), str) for key in ("source", "sha256"))
    if not told or not isinstance(trained, dict):
        raise ValueError(f"{path}: is no checkpoint of train.py: it does not tell its backbone, or what was trained")
    checkpoint["trained"] = trained = weights.stored_tensors(trained, path)
    for key, tensor in trained.items():
        if problem := weights.unusable(tensor):
            raise ValueError(f"{path}: {key} {problem}")
    weights.require_finite(trained, path)
    if identity is not None:
        require_backbone(path, checkpoint, identity)
    return checkpoint


def require_finite(model: EmotionModel, identity: dict[str, str]) -> None:
    """Raise ValueError for NaN or infinite weights, those alone that are in memory and so are used."""
    weights.require_finite(dict(model.named_parameters()), identity["source"])


def require_backbone(path: Path, checkpoint: dict, identity: dict[str, str]) -> None:
    """Raise ValueError unless a checkpoint was trained on the backbone of this identity: it holds no other weights."""
    if checkpoint["backbone"]["sha256"] != identity["sha256"]:
        raise ValueError(
            f"{path}: was trained on other weights of {identity['source']} than are found now; "
            "put those back, or train anew under another name"
        )


def plain(config: Config) -> dict:
    """A configuration as values that JSON, YAML and a checkpoint can all hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
