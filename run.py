"""One place that turns a configuration into a model, and a run's directory into a model again."""

import ctypes
import gc
import os
import platform
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

import check
import data
import parallel
import weights
from adapter import FILES as ADAPTER_FILES
from adapter import merge_adapter
from cache import ActivationCache, check_space
from config import Config, load_config, make_config, split_words
from freeze import cast_frozen, drop_prefix, freeze, layer_numbers, load_trained, prefix_depth
from logmel import LogMel
from lora import inject, merge
from model import EmotionModel, Wav2Vec2Config
from tier import Tier, pick_tier

Item = TypeVar("Item")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REGULARISATION = {field.name for field in fields(Wav2Vec2Config)} & {field.name for field in fields(Config)}
DEMO_NOTE = "demo corpus: synthetic sounds, so this is no result about emotion"
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C, and what a cluster sends
STOP_SIGNALS += [signal.SIGBREAK] if sys.platform == "win32" else []  # Windows lets no other process send those two
LICENCE = "the emotion models that audeering published are licensed CC BY-NC-SA 4.0: not for commercial use"


class Stopped(KeyboardInterrupt):
    """The run is to end here, between two batches."""


@contextmanager
def stop_between_batches(stop: threading.Event, save: Callable[[], object]) -> Iterator[None]:
    """Within, a signal of STOP_SIGNALS sets `stop`, at which a `Prefix` raises `Stopped`; then `save` is called.

    A second signal does not wait, unless it comes within a second: torchrun repeats a Ctrl-C to its processes. Where
    signals cannot be caught, outside the main thread, they are left as they are.
    """
    first = 0.0

    def note_signal(*_: object) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first > 1:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        stop.set()

    caught = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []
    before = {number: signal.signal(number, note_signal) for number in caught}
    try:
        yield
    except Stopped:
        save()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def out_of_memory() -> Iterator[list[str]]:
    """End the work within where a GPU has no memory left, free what it held, and leave the reason in the list."""
    reasons: list[str] = []
    try:
        yield reasons
    except RuntimeError as error:
        if "out of memory" not in str(error):  # CUDA's error has a type of its own, that of MPS has not
            raise
        reasons.append(first_line(error))
        traceback.clear_frames(error.__traceback__)  # which hold the tensors
    if reasons:
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def pick_device(name: str) -> torch.device:
    """The device of this name; for "auto" CUDA, then MPS, then the CPU. Raises ValueError if it is not there.

    Of several processes each takes the GPU with its own number.
    """
    alone = parallel.size() == 1
    found = {"cuda": torch.cuda.is_available(), "mps": alone and torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in found.items() if there)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: {name!r} is not a device; expected auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not alone:
        device = torch.device("cuda", parallel.local_rank())
    if not found.get(device.type) or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        there = ", ".join(kind for kind, is_there in found.items() if is_there)
        raise ValueError(f"device: {device} is not there for PyTorch {torch.__version__}; this machine has {there}")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto": bf16 on a GPU that computes in it, fp16 on one that does not, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def load_utterances(config: Config) -> tuple[list[data.Utterance], tuple[float, float]]:
    """The corpus and the range of its labels, checked. Raises FileNotFoundError or ValueError."""
    utterances = data.load_corpus(*corpus_keys(config))
    label_range = find_label_range(config)
    data.check_labels(utterances, config.targets, label_range, config.allow_speaker_overlap)
    if sum(utterance.split == "train" for utterance in utterances) < 2:
        raise ValueError("split 'train' has one utterance, expected 2 or more: the CCC of one is 0/0")
    return utterances, label_range


def check_corpus(path: str, overrides: Sequence[str], out: str | None = None) -> tuple[str, int]:
    """Look at a config's corpus and write what is found into folder `out`, by default one below its output_dir.

    Returns the report, and how bad it is: 0, 1 for warnings alone, 2 for errors. Raises FileNotFoundError, OSError or
    ValueError where there is no corpus to look at.
    """
    config = load_config(path, overrides)
    utterances, notes = data.read_corpus(*corpus_keys(config))
    label_range = find_label_range(config)
    problems = data.label_problems(utterances, config.targets, label_range, config.allow_speaker_overlap)
    problems += [data.Problem(note, file, "") for note, files in notes.items() for file in files or [""]]
    chosen = {"fold": config.fold, "test_set": config.test_set, "dev_set": config.dev_set}
    words = [config.corpus, *(f"{key}={value}" for key, value in chosen.items() if value is not None)]
    folder = Path(out) if out else Path(config.output_dir) / "check" / "_".join(words)
    title = DEMO_NOTE if config.corpus == "demo" else " ".join(words)
    return check.inspect(utterances, problems, config.targets, label_range, title, folder)


def corpus_keys(config: Config) -> tuple:
    """What `data.load_corpus` takes, in its order."""
    place = config.corpus, config.data_root, config.manifest
    return (*place, config.fold, config.test_set, config.dev_set, config.flip_activation)


def find_label_range(config: Config) -> tuple[float, float]:
    """As configured, else the corpus's own. Raises ValueError."""
    label_range = config.label_range or data.LABEL_RANGE.get(config.corpus)
    if label_range is None:
        raise ValueError(f"label_range: corpus {config.corpus!r} has none of its own; set it, e.g. label_range: [1, 7]")
    return tuple(label_range)


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


class Prefix:
    """The frozen prefix's output for numbered utterances: computed, or read from a cache that it fills as it goes."""

    def __init__(
        self,
        model: EmotionModel,
        paths: Sequence[str],
        device: torch.device,
        precision: str,
        at_once: int | None = None,
    ):
        """`at_once` bounds how many utterances the prefix computes together."""
        self.model, self.paths, self.device, self.at_once = model, paths, device, at_once
        self.depth, self.dtype = prefix_depth(model), DTYPES[precision]
        self.precision = precision
        self.cache: ActivationCache | None = None
        self.tier: Tier | None = None
        self.complete = False
        self.space = 0  # bytes that the cache still needs
        self.build_seconds = 0.0
        self.stop = threading.Event()

    def open_cache(
        self, root: str, dtype: str, identity: dict, seconds: float = 0.0, tier: str = "auto"
    ) -> ActivationCache:
        """From here on keep what is computed below `root`, and read what is there; `seconds` of audio must fit."""
        if tier == "gpu" and self.device.type == "cpu":
            raise ValueError("cache_tier: found gpu, but the device is the CPU; expected auto, disk or ram")
        config = self.model.backbone.config
        width = config.conv_channels[-1] if self.depth < 0 else config.width
        kind = {"backbone": identity["sha256"], "depth": self.depth, "precision": self.precision}
        kind["normalize_waveform"] = config.normalize_waveform
        pooled = self.depth > config.layers
        kind |= {"pooling": self.model.pooling} if pooled else {}
        self.cache = ActivationCache(root, kind, self.paths, width, getattr(torch, dtype))
        rows = len(self.model.sources(self.depth)) * (2 if self.model.pooling == "mean_std" else 1)
        self.space = self.cache.space(seconds, rows if pooled else None)
        check_space({self.cache.directory: self.space})
        self.tier, self.tier_when_complete = Tier(self.cache, self.device), tier
        return self.cache

    def drop_if_cached(self) -> None:
        """If the cache holds all that the prefix could compute, give up its weights, and read from the tier wanted."""
        if self.cache is not None and parallel.size() > 1:
            parallel.wait()  # until the others have written theirs
        if self.cache is not None and not self.complete and self.cache.has(range(len(self.paths))):
            drop_prefix(self.model, self.depth)
            self.tier = Tier(self.cache, self.device, pick_tier(self.tier_when_complete, self.cache, self.device))
            self.complete = True

    def __call__(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], Tensor, list[int]]]:
        """Each batch's numbers, and of this process's share packed activations on the device in fp32 and lengths.

        Reads one batch ahead. Raises `Stopped` instead of the next batch once `stop` is set, in any process.
        """
        shares = [parallel.share(batch) for batch in batches]
        for batch, numbers, loaded in zip(batches, shares, data.prefetch(self.load, shares), strict=True):
            if parallel.any_of(self.stop.is_set()):
                raise Stopped
            x, lengths = loaded if isinstance(loaded, tuple) else self.encode(numbers, loaded)
            yield batch, x.to(self.device, non_blocking=True).float(), lengths

    def load(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]] | list[Tensor]:
        """A batch from the cache, or its waveforms: all of them even if one is missing, so that results repeat."""
        if self.cache is not None and self.cache.has(numbers):
            return self.tier.read(numbers)
        return [data.read_audio(self.paths[number]) for number in numbers]

    def encode(self, numbers: Sequence[int], waveforms: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        start, packed, lengths = time.perf_counter(), [], []
        for part in in_order(waveforms, self.at_once or len(waveforms)):
            with self.autocast():
                x, frames = self.model.encode(self.send(part), self.depth)
            packed.append(x)
            lengths += frames
        x = torch.cat(packed) if len(packed) > 1 else packed[0]
        if self.cache is not None:
            x = self.cache.write(numbers, x, lengths)
            self.build_seconds += time.perf_counter() - start
        return x, lengths

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def send(self, waveforms: Sequence[Tensor]) -> Sequence[Tensor]:
        """Waveforms on the device, in one copy."""
        return torch.cat(list(waveforms)).to(self.device).split([len(waveform) for waveform in waveforms])


def in_order(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Groups of `size` in the given order; the last has the remainder."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def prepare(
    model: EmotionModel, device: torch.device, precision: str, tf32: bool = False, compiled: bool = False
) -> None:
    """Move what is in memory to its device, frozen matrices in the type that they are used in."""
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # PyTorch's default is half and half
    if precision != "fp32":
        cast_frozen(model, DTYPES[precision])
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    for layer in model.backbone.layers if compiled else ():
        layer.finish = torch.compile(layer.finish, dynamic=True)


def keep_freed_memory() -> None:
    """Have glibc keep what PyTorch frees: a large tensor in fresh pages takes several times as long to write."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing given back


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
        audio = tuple(utterance.path for utterance in utterances)
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


def deepest(prefixes: Iterable[Prefix]) -> Prefix:
    return max(prefixes, key=lambda prefix: prefix.depth)


def fill(prefixes: Sequence[Prefix]) -> list[dict]:
    """Complete the caches of prefixes that share backbone and audio: no hidden state is computed twice for a batch.

    Several commands may do so at once, each in an order of its own and without what another has done by then. The
    processes of one command share the work.
    """
    last = deepest(prefixes)
    size = min(prefix.at_once for prefix in prefixes)
    missing = [
        batch
        for batch in parallel.share(in_order(range(len(last.paths)), size))
        if not all(prefix.cache.has(batch) for prefix in prefixes)
    ]
    random.shuffle(missing)
    seconds: dict[Prefix, float] = {}
    start = time.perf_counter()

    def load(batch: Sequence[int]) -> list[Tensor]:
        there = all(prefix.cache.has(batch) for prefix in prefixes)
        return [] if there else [data.read_audio(last.paths[number]) for number in batch]

    audio = data.prefetch(load, missing)
    bar = tqdm(missing, desc="cache", unit="batch", disable=parallel.rank() > 0 or None)
    for numbers, waveforms in zip(bar, audio, strict=True):
        sources = {p: p.model.sources(p.depth) for p in prefixes if waveforms and not p.cache.has(numbers)}
        if not sources:
            continue
        depths = sorted(set().union(*sources.values()))
        parts: dict[Prefix, list[Tensor]] = {prefix: [] for prefix in sources}
        own = dict.fromkeys(sources, 0.0)  # of each prefix, beside what all share
        with last.autocast():
            states = last.model.states(last.send(waveforms), depths)
            for depth, (x, lengths) in zip(depths, states, strict=True):
                synchronize(last.device)
                common = time.perf_counter() - start - sum(own.values())
                for prefix in (p for p in sources if depth in sources[p]):
                    begin = time.perf_counter()
                    parts[prefix].append(prefix.model.part(x, lengths, prefix.depth))
                    if depth == sources[prefix][-1]:
                        prefix.cache.write(numbers, *prefix.model.join(parts.pop(prefix), lengths))
                        seconds[prefix] = seconds.get(prefix, 0.0) + common
                    own[prefix] += time.perf_counter() - begin
        for prefix in own:
            seconds[prefix] += own[prefix]
        start = time.perf_counter()
    parallel.wait()
    for prefix in prefixes:
        prefix.cache.close()
        prefix.cache.load_index()  # with what other processes have written
    return [
        {"directory": str(p.cache.directory), "seconds": seconds.get(p), "bytes": p.cache.stored_bytes()}
        for p in prefixes
    ]


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


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
        raise ValueError(f"{path}: is not a whole checkpoint ({first_line(error)})") from None
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


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """`write` a file beside `path`, then put it in its place: whoever reads `path` finds the old or the new, whole.

    Of several processes only the first does.
    """
    if parallel.rank() > 0:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has errors of its own for a full disk
        advice = "" if isinstance(error, OSError) else "; is the disk full?"  # PyTorch's own words do not tell
        raise OSError(f"{path}: cannot be written ({first_line(error)}); what was there is unharmed{advice}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def save(path: Path, value: dict) -> None:
    replace(path, lambda file: torch.save(value, file))


def write_text(path: Path, text: str) -> None:
    replace(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_yaml(path: Path, value: dict) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False))


def plain(config: Config) -> dict:
    """A configuration as values that JSON, YAML and a checkpoint can all hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") if hasattr(torch.cpu, "get_capabilities") else None
    return f"{name or platform.machine()} ({device.type}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where one is used, else the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # ru_maxrss would count the parent process from before our program began
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
