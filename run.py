"""One run from the inside: its corpus and model, the training step, evaluation, and from disk back to a model."""

import csv
import hashlib
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import data
import weights
from cache import Prefix
from config import Config, extra, load_config, make_config
from freeze import cast_frozen, freeze, layer_numbers, load_trained
from lora import inject, merge
from machine import fast, hardware
from machine.hardware import parallel, pick_device
from metrics import bootstrap_ci, ccc, ccc_loss
from model import EmotionModel, Wav2Vec2, Wav2Vec2Config

REGULARISATION = {field.name for field in fields(Wav2Vec2Config)} & {field.name for field in fields(Config)}
DEMO_NOTE = "demo corpus: synthetic sounds, so this is no result about emotion"
LICENCE = "the emotion models that audeering published are licensed CC BY-NC-SA 4.0: not for commercial use"
ADVICE = "lower lr or head_lr, or set precision: fp32, under another name"  # where numbers are not finite


# ---------------------------------------------------------------- one step


def step(
    model: EmotionModel,
    x: Tensor,
    lengths: Sequence[int],
    labels: Tensor,
    *,
    depth: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
    micro_batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One training step on packed hidden state `depth`; returns the loss and the predictions `(B, K)`.

    Micro-batches only bound the memory: each is recomputed in the backward pass, and the loss is that of the whole
    batch, exactly. With several processes `x` is this one's share of the batch, `labels` and predictions are those of
    all. Where no scaler leaves out a step, a gradient that is not finite makes the returned loss NaN.
    """
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        if micro_batch_size is None:
            predictions = model(x, lengths, depth)
        else:
            parts = [lengths[i : i + micro_batch_size] for i in range(0, len(lengths), micro_batch_size)]
            inputs = zip(x.split([sum(part) for part in parts]), parts, strict=True)
            predictions = torch.cat([fast.checkpoint(model, *part, depth) for part in inputs])
    predictions = parallel.gather(predictions, len(labels))
    loss = ccc_loss(predictions, labels)
    scaler.scale(loss).backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parallel.add_gradients(parameters)
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach() + (0 if scaler.is_enabled() else 0 * norm), predictions.detach()


def make_optimizer(model: EmotionModel, lr: float, head_lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with `lr` for the backbone, `head_lr` for what is behind it, and weight decay for matrices alone."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}  # by whether it is in the head, and is no matrix
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((not name.startswith("backbone."), parameter.ndim < 2), []).append(parameter)
    settings = []
    for (in_head, is_vector), parameters in sorted(groups.items(), key=lambda group: group[0]):
        rate, decay = head_lr if in_head else lr, 0.0 if is_vector else weight_decay
        settings.append({"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(settings, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, number: int, total: int, warmup: int) -> None:
    """The rates of step `number`: a linear rise to their peaks over `warmup` steps, then a linear fall to 0."""
    factor = min((number + 1) / max(warmup, 1), (total - number) / max(total - warmup, 1), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def seed_step(seed: int, number: int, device: torch.device) -> None:
    """Derive a step's random numbers (dropout, masking) from its number, so that a resumed run needs no saved state."""
    value = int(np.random.SeedSequence([seed, number, parallel.rank()]).generate_state(1)[0])
    # on a CPU without a look at every other kind of device, which takes 0.1 ms
    (torch.default_generator if device.type == "cpu" else torch).manual_seed(value)


@torch.no_grad()
def evaluate(
    model: EmotionModel, prefix: Prefix, numbers: Sequence[int], batch_size: int, watch: hardware.Watch = iter
) -> Tensor:
    """Predictions `(len(numbers), K)` on the CPU, labels scaled to 0..1."""
    model.eval()
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    predictions = []
    given = prefix([parallel.share(batch) for batch in batches])
    for batch, (x, lengths) in watch(zip(batches, given, strict=True)):
        with torch.autocast(x.device.type, prefix.dtype, enabled=prefix.dtype != torch.float32):
            predictions.append(parallel.gather(model(x, lengths, prefix.depth).float(), len(batch)))
    return torch.cat(predictions).cpu()


def per_second(amount: float, seconds: float) -> float:
    """A rate; of a time too short for a coarse clock (they advance by up to 24 ms) that of a millisecond."""
    return amount / max(seconds, 1e-3)


# ---------------------------------------------------------------- from a configuration


def load_utterances(config: Config) -> tuple[list[data.Utterance], tuple[float, float]]:
    """The corpus and the range of its labels, checked. Raises FileNotFoundError or ValueError."""
    utterances = data.load_corpus(**corpus_keys(config))
    label_range = data.find_label_range(config.corpus, config.label_range, utterances, config.targets)
    data.check_labels(utterances, config.targets, label_range, config.allow_speaker_overlap)
    return utterances, label_range


def corpus_keys(config: Config) -> dict:
    """The arguments of `data.load_corpus`."""
    keys = ("manifest", "targets", "fold", "test_set", "dev_set", "flip_activation")
    return {"name": config.corpus, "root": config.data_root} | {key: getattr(config, key) for key in keys}


def build_model(config: Config, label_range: tuple[float, float]) -> tuple[EmotionModel, dict[str, str]]:
    """The model as configured, on the CPU and in eval mode, and the identity of its backbone: source and SHA-256."""
    backbone, identity = find_backbone(config)
    return assemble(config, backbone, label_range), identity


def find_backbone(config: Config) -> tuple[Wav2Vec2, dict[str, str]]:
    """The pretrained backbone, an adapter merged into it, and the identity of both.

    Only the demo corpus falls back to `small`, which the repository holds.
    """
    if config.backbone == "logmel":
        logmel = extra("report.logmel", "backbone: logmel").LogMel()
        content = b"".join(tensor.numpy().tobytes() for tensor in logmel.state_dict().values())
        return logmel, {"source": "logmel", "sha256": hashlib.sha256(content).hexdigest()}
    regularisation = {key: getattr(config, key) for key in REGULARISATION}
    try:
        files = weights.locate(config.backbone)
        backbone = weights.load_backbone(config.backbone, **regularisation)
    except weights.UnavailableError as error:
        if config.corpus != "demo" or config.adapter is not None:
            raise
        print(f"note: {error}\nnote: the demo goes on with the small backbone of this repository", file=sys.stderr)
        return find_backbone(replace(config, backbone="small"))
    source = config.backbone
    if len(files) > 1 and "classifier.out_proj.weight" in weights.read(files)[0]:  # a published emotion model
        data.say_once(f"note: {source}: its emotion head is left out; {LICENCE}")
    if config.adapter is not None:
        adapter = extra("formats.adapter", f"adapter: {config.adapter}")
        adapter.merge_adapter(backbone, config.adapter, source)
        files += [Path(config.adapter) / name for name in adapter.FILES]
        source = f"{source} with {config.adapter}"
    return backbone, {"source": source, "sha256": weights.sha256(files)}


def assemble(config: Config, backbone: Wav2Vec2, label_range: tuple[float, float]) -> EmotionModel:
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


def prepare(
    model: EmotionModel, device: torch.device, precision: str, tf32: bool = False, compiled: bool = False
) -> None:
    """Move what is in memory to its device, frozen matrices in the type in which they are used."""
    hardware.set_up(device, tf32)
    if precision != "fp32":
        cast_frozen(model, hardware.DTYPES[precision])
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    for layer in model.backbone.layers if compiled else ():
        layer.finish = torch.compile(layer.finish, dynamic=True)  # type: ignore


def load_run(source: str | Path, device: str = "cpu", merged: bool = True, backbone: str | None = None) -> EmotionModel:
    """The best model of a finished run, LoRA merged or still apart, in eval mode; or a published emotion model.

    `source` is a run's directory, a Hugging Face directory or a hub id; `backbone` is where a run's backbone is now, if
    it has moved. Raises FileNotFoundError or ValueError.
    """
    directory = Path(source)
    is_hub_id = weights.hub_id(str(source)) and not directory.parent.exists()  # a run that is not there yet is none
    if is_hub_id or (directory / "config.json").is_file():
        if backbone is not None:
            raise ValueError(f"--backbone: {source} is a published emotion model, which has its own; leave it out")
        return extra("formats.emotion", f"{source}").load_emotion_model(source).to(pick_device(device))
    path, (best, config) = directory / "best.pt", load_best(directory)
    config = replace(config, backbone=backbone or config.backbone)
    try:
        model, identity = build_model(config, data.find_label_range(config.corpus, config.label_range))
        require_same(path, "backbone", best, identity)
        load_trained(model, best["trained"])
        weights.require_finite(dict(model.named_parameters()), identity["source"])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}; if the backbone is elsewhere now, say so with --backbone") from None
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
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


def load_checkpoint(path: Path) -> dict:
    """A checkpoint of ours, from which nothing but tensors and plain values can come.

    Raises FileNotFoundError, or ValueError if it is damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a run's directory, as train.py writes it")
    try:
        weights.require_plain(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: is not a whole checkpoint ({hardware.first_line(error)})") from None
    checkpoint = checkpoint if isinstance(checkpoint, dict) else {}
    trained, backbone = checkpoint.get("trained"), checkpoint.get("backbone")
    told = isinstance(backbone, dict) and all(isinstance(backbone.get(key), str) for key in ("source", "sha256"))
    if not told or not isinstance(trained, dict):
        raise ValueError(f"{path}: is no checkpoint of train.py")
    checkpoint["trained"] = trained = weights.stored_tensors(trained, path)
    for key, tensor in trained.items():
        if problem := weights.unusable(tensor):
            raise ValueError(f"{path}: {key} {problem}")
    weights.require_finite(trained, path)
    return checkpoint


def require_same(path: Path, kind: str, saved: dict, now: Any) -> None:
    """Raise ValueError unless the "backbone", "corpus" or "precision" of what was saved is that of now, by content."""
    before = saved.get(kind)
    if (before.get("sha256") == now["sha256"]) if isinstance(before, dict) else before == now:
        return
    told = f"in {before}, but this device takes {now}; go on with one of that kind"
    if kind == "corpus":
        told = "on other utterances, labels or lengths than the corpus has now; put it back"
    if kind == "backbone":
        told = f"on other weights of {now['source']} than are found now"
        told += "; put those back, say with --backbone where they are"
    raise ValueError(f"{path}: was trained {told}, or train anew under another name")


def plain(config: Config) -> dict:
    """A configuration as values that JSON, YAML and a checkpoint can all hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


# ---------------------------------------------------------------- a run's directory


RESULTS = ("best.pt", "last.pt", "result.json")  # what makes a directory that of a run
PENDING = "best.next.pt"  # a better model that `last.pt` does not know of yet
PLACES_OF = {"corpus": ("manifest", "data_root"), "backbone": ("backbone", "adapter")}  # their content decides
PLACE_KEYS = {"name", "output_dir", "cache_dir", "device"}.union(*PLACES_OF.values())  # may change between two starts
COST_KEYS = {"micro_batch_size", "gradient_checkpointing", "cache_tier"}  # and so may these


def open_directory(config: Config, directory: Path) -> None:
    """Prepare a run's directory. Raises ValueError if another configuration has run there.

    PLACE_KEYS and COST_KEYS may differ: of corpus and backbone the content decides, whatever their place.
    """
    if parallel.rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".*.tmp"):  # by a process that was killed while it saved
            left.unlink()
        path, here = directory / "config.yaml", plain(config)
        if not path.is_file() or not any((directory / name).is_file() for name in RESULTS):
            hardware.write_yaml(path, here)  # also over that of a run that never started: a mistake can be mended
        there = plain(load_config(path))
        changed = [key for key in here if here[key] != there[key] and key not in PLACE_KEYS | COST_KEYS]
        if told := [f"{key} {there[key]!r}, now {here[key]!r}" for key in changed[:5]]:
            raise ValueError(f"{directory} holds another run ({'; '.join(told)}); choose another name=")
    parallel.wait()
    if not (directory / "config.yaml").is_file():
        raise FileNotFoundError(f"{directory / 'config.yaml'}: not there; output_dir must be on a disk that all share")


def require_content(config: Config, result: dict, path: Path, kinds: Sequence[str] = tuple(PLACES_OF)) -> None:
    """Raise ValueError if corpus or backbone of a finished run have other content now.

    Each is looked at where another place is given for it, or where it still is in its old place on a disk.
    """
    for kind in kinds:
        places, now = {key: getattr(config, key) for key in PLACES_OF[kind]}, None
        moved = any(place != result["config"].get(key) for key, place in places.items())
        if moved or any(place and os.path.exists(place) for place in places.values()):
            with nullcontext() if moved else suppress(OSError, ValueError):
                if kind == "backbone":
                    _, now = find_backbone(config)
                else:
                    utterances, _ = load_utterances(config)
                    now = describe_corpus(config.corpus, utterances, data.check_audio(utterances))
        if now and kind in result:  # older runs do not tell their corpus
            require_same(path, kind, result, now)


def settle_best(directory: Path, best_epoch: int) -> None:
    """Make the new best model `best.pt` once `last.pt` knows of it; a run killed before that repeats the epoch."""
    pending = directory / PENDING
    if parallel.rank() == 0 and pending.is_file():
        if load_checkpoint(pending).get("epoch") == best_epoch:
            os.replace(pending, directory / "best.pt")
        else:
            pending.unlink()
    parallel.wait()


def describe_corpus(name: str, utterances: Sequence[data.Utterance], seconds: Sequence[float]) -> dict:
    """The corpus in numbers: utterances, known speakers and hours by split; a SHA-256 of all but paths and sound."""
    both = zip(utterances, seconds, strict=True)
    rows: list[list] = [[Path(u.source).name, u.split, u.speaker, u.labels, s] for u, s in both]
    corpus: dict = {"name": name, "sha256": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    for split in data.SPLITS:
        chosen = [(speaker, s) for _, of, speaker, _, s in rows if of == split]
        speakers = len({speaker for speaker, _ in chosen if not data.is_nobody(speaker)})
        corpus[split] = {"utterances": len(chosen), "speakers": speakers, "hours": sum(s for _, s in chosen) / 3600}
    return corpus


def report_corpus(corpus: dict) -> str:
    """The corpus in numbers, one line for each split."""
    lines = [DEMO_NOTE] if corpus["name"] == "demo" else []
    line = "{:6}{utterances:8,} utterances{speakers:6} speakers{hours:9.3f} h"
    return "\n".join([*lines, *(line.format(split, **corpus[split]) for split in data.SPLITS)])


def summarise(config: Config, progress: dict, tested: Sequence[data.Utterance], predictions: np.ndarray) -> dict:
    """Scores of the test set (predictions in the corpus scale) and what they cost."""
    test, groups = {}, data.speaker_groups([utterance.speaker for utterance in tested])
    for k, target in enumerate(config.targets):
        label = np.array([utterance.labels[target] for utterance in tested])
        score = ccc(torch.from_numpy(predictions[:, k : k + 1]).double(), torch.from_numpy(label[:, None])).item()
        ci95 = bootstrap_ci(predictions[:, k], label, groups)
        test[target] = {"ccc": score, "ci95": ci95, "utterances": len(tested)}
    per_epoch = statistics.median(row["train_seconds"] for row in progress["log"])
    speed = statistics.median(row["audio_seconds_per_second"] for row in progress["log"])
    seconds = {"total": progress["seconds"], "cache_build": progress["cache_build"], "per_epoch": per_epoch}
    result: dict = {"note": DEMO_NOTE} if config.corpus == "demo" else {}
    result |= {"test": test, "seconds": seconds, "epochs": progress["epoch"], "best_epoch": progress["best_epoch"]}
    result |= {"dev_ccc": progress["best"], "peak_memory_bytes": progress["peak"]}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return result | {"audio_seconds_per_second": speed, "versions": versions, "config": plain(config)}


def write_predictions(
    path: Path, targets: Sequence[str], utterances: Sequence[data.Utterance], predictions: np.ndarray
) -> None:
    """CSV of the test set: file, speaker, prediction and label of every target, all in the corpus scale.

    Where utterances are parts of files, columns `start` and `end` in seconds follow; an empty `end` is the file's.
    """
    times = ["start", "end"] if any(utterance.source != utterance.path for utterance in utterances) else []
    rows = [["file", "speaker", *targets, *(f"{target}_label" for target in targets), *times]]
    for utterance, row in zip(utterances, predictions.tolist(), strict=True):
        labels = [utterance.labels[target] for target in targets] + [getattr(utterance, time) for time in times]
        names = map(data.text_cell, (utterance.path, utterance.speaker))
        rows.append([*names, *(f"{value:.4f}" for value in row), *labels])

    def save(file: Path) -> None:
        with open(file, "w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
            csv.writer(stream).writerows(rows)

    hardware.replace(path, save)


def report(result: dict, directory: Path) -> str:
    """A finished run in a few lines."""
    lines, seconds = [], result["seconds"]
    for target, score in result["test"].items():
        interval = "" if score["ci95"] is None else "   95% [{:.3f}, {:.3f}] over speakers".format(*score["ci95"])
        lines.append(f"test CCC  {target:12}{score['ccc']:6.3f}{interval}")
    cost = f"{seconds['total']:.0f} s in all, {seconds['per_epoch']:.1f} s an epoch"
    memory = f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB"
    lines.append(f"{result['epochs']} epochs, the best was {result['best_epoch']}; {cost}, {memory}")
    lines.append(f"{directory}: result.json, predictions_test.csv, best.pt, log.jsonl")
    return "\n".join([*lines, *filter(None, [result.get("note")])])
