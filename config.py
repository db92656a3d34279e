"""The configuration: one flat frozen dataclass. A YAML key is a field's name, so a search finds every use of it."""

import difflib
import importlib
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class Config:
    """An experiment. `python train.py configs/lora_r8.yaml key=value ...` reads a YAML file and then the overrides."""

    name: str = ""  # of the run's directory; empty: the name of the YAML file
    output_dir: str = "runs"
    seed: int = 0  # of initialisation, batches and dropout; the data splits do not depend on it

    corpus: str = "demo"  # synthesised, no emotion; manifest is yours; or msp-podcast, iemocap, msp-improv, muse
    data_root: str | None = None  # the folder of a published corpus; of the demo null is its default place
    manifest: str | None = None  # CSV with path,split,speaker,activation,valence[,dominance]
    fold: int | None = None  # the session held out: 1 to 5 of iemocap, 1 to 6 of msp-improv
    test_set: Literal["Test1", "Test2", "Test3"] | None = None  # of msp-podcast; null: Test1, the largest
    dev_set: Literal["session", "speaker"] | None = None  # of iemocap; null: session, as two speakers test then
    flip_activation: bool | None = None  # of msp-improv; null: true, as its scale falls; a warning checks it by anger
    label_range: list[float] | None = None  # of the labels, e.g. [1, 7]; null: the corpus's own
    targets: list[str] = ("activation", "valence")  # type: ignore[assignment]  # a tuple, as defaults are shared
    allow_speaker_overlap: bool = False  # a speaker in two splits makes scores too good

    backbone: str = "facebook/wav2vec2-base"  # a directory, a file, a name on the Hugging Face hub, or "logmel"
    adapter: str | None = None  # a directory that PEFT saved: its LoRA becomes part of the backbone before all else
    trainable_layers: int | list[int] | Literal["all"] = 0  # the last k, a list, or all with the projection below them
    lora_rank: int = 0  # 0: no LoRA. 8 is where the published comparisons level off
    lora_alpha: float = 16.0  # the update counts alpha / rank times
    lora_targets: list[str] = ("q", "v")  # type: ignore[assignment]  # as above; among q k v o fc1 fc2
    lora_layers: int | list[int] | Literal["all"] | None = None  # null: every layer that is not trainable
    lora_dropout: float = 0.0
    pooling: Literal["mean", "mean_std", "attentive", "layers"] = "mean"  # layers: learnt weights of all hidden states
    head_width: int = 256  # of the head's hidden layer; 0: a linear head
    head_dropout: float = 0.0
    hidden_dropout: float = 0.1  # dropout, layer drop and masking act on what trains, never on the frozen prefix
    attention_dropout: float = 0.0  # above 0 a GPU cannot use its kernel for packed sequences
    activation_dropout: float = 0.0
    projection_dropout: float = 0.0
    layer_drop: float = 0.0
    mask_time_prob: float = 0.0
    mask_time_length: int = 10
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 64

    cache: bool = False  # keep the frozen prefix's output on disk: computed once, whatever the epochs, heads and rates
    cache_dir: str = "cache"
    cache_dtype: Literal["float16", "float32", "int8"] = "float16"  # float32: exactly as without; int8: half the size
    cache_tier: Literal["auto", "disk", "ram", "gpu"] = "auto"  # auto: gpu if half of it holds all; ram is disk

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the GPU has it, else fp16; CPU fp32
    tf32: bool = False  # fp32 products on an NVIDIA GPU with 10 bits of mantissa: faster, and no longer exact
    compile: bool = False  # fuse what follows attention in a layer: for GPUs; the first steps take longer
    gradient_checkpointing: bool = False  # saves memory, a quarter slower: one layer's activations at a time
    batch_size: int = 16  # utterances; CCC is a statistic of the batch, so a smaller one makes a noisier loss
    micro_batch_size: int | None = None  # utterances in memory at once; the loss stays that of the whole batch
    epochs: int = 10
    patience: int = 5  # epochs without a better development CCC before the run stops
    lr: float = 1e-4  # of backbone layers and LoRA
    head_lr: float = 1e-3
    weight_decay: float = 0.01  # of matrices; norms and biases have none
    warmup: int = 10  # steps in which the rates rise to their values; from there they fall linearly, to 0 at the end
    clip: float = 1.0  # norm of the whole gradient
    device: str = "auto"  # auto: CUDA, then MPS, then the CPU

    def __post_init__(self) -> None:
        self.require("batch_size", self.batch_size >= 2, "at least 2: the CCC of one utterance is 0/0")
        for key in ("epochs", "patience", "mask_time_length", "mask_feature_length"):
            self.require(key, getattr(self, key) >= 1, "at least 1")
        for key in ("head_width", "lora_rank", "warmup", "seed", "weight_decay"):
            self.require(key, getattr(self, key) >= 0, "at least 0")
        for key, most in (("head_width", 2**14), ("lora_rank", 2**10), ("epochs", 10**6)):  # of no use beyond
            self.require(key, getattr(self, key) <= most, f"at most {most}")
        for key in ("lr", "head_lr", "clip", "lora_alpha"):
            self.require(key, getattr(self, key) > 0, "a number above 0")
        for key in (key for key in DEFAULTS if key.endswith(("dropout", "_drop", "_prob"))):
            self.require(key, 0 <= getattr(self, key) < 1, "a number from 0 to below 1")
        self.require("seed", self.seed < 2**63, "below 2^63")
        micro, names = self.micro_batch_size, self.targets
        self.require("micro_batch_size", micro is None or micro >= 1, "at least 1 or null")
        distinct = 0 < len(set(names)) == len(names) <= 100
        self.require("targets", distinct, "different names, at least one, at most 100")
        low_high = (0, 1) if self.label_range is None else self.label_range
        self.require("label_range", len(low_high) == 2 and low_high[0] < low_high[1], "[low, high]")
        self.require("backbone", bool(self.backbone), "a directory, a file or a name on the hub")
        self.require_effect()

    def require_effect(self) -> None:
        """Refuse a key that is set but would do nothing: whoever set it believes that it acts."""
        everything, nothing = self.trainable_layers == "all", self.trainable_layers in (0, []) and not self.lora_rank
        self.require("pooling", self.pooling != "layers" or nothing, "mean, mean_std or attentive, since layers train")
        pooled = nothing and self.pooling != "attentive" and self.cache_dtype == "int8"
        self.require("cache_dtype", not pooled, "float16, as no layer trains: of a few rows each, int8 would be larger")
        self.require("backbone", self.backbone != "logmel" or nothing, "one with layers, since some shall train")
        self.require("adapter", self.backbone != "logmel" or self.adapter is None, "null, as backbone is logmel")
        self.require("lora_rank", not (everything and self.lora_rank), "0, since trainable_layers: all leaves no layer")
        below = "as it acts below layer 0, which is frozen unless trainable_layers is all"
        layers = "attention_dropout activation_dropout layer_drop gradient_checkpointing"
        idle = {  # keys: why they do nothing, if so
            "head_dropout": self.head_width == 0 and "as head_width is 0",
            "projection_dropout mask_time_prob mask_feature_prob": not everything and below,
            layers: nothing and "as it acts in layers that train, and none does",
            "lora_alpha lora_targets lora_layers lora_dropout": self.lora_rank == 0 and "as lora_rank is 0",
            "mask_time_length": self.mask_time_prob == 0 and "as mask_time_prob is 0",
            "mask_feature_length": self.mask_feature_prob == 0 and "as mask_feature_prob is 0",
        }
        for key, reason in ((key, reason) for keys, reason in idle.items() for key in keys.split() if reason):
            value, default = getattr(self, key), DEFAULTS[key]
            same = value == (list(default) if isinstance(value, list) and isinstance(default, tuple) else default)
            self.require(key, same, f"{default!r}, {reason}")

    def require(self, key: str, fulfilled: bool, expected: str) -> None:
        if not fulfilled:
            raise ValueError(f"{key}: expected {expected}, found {getattr(self, key)!r}")


MAX_SIZE, MAX_DEPTH = 1 << 16, 10  # bytes and levels of a YAML file; a configuration has a few hundred and two
TYPES = typing.get_type_hints(Config)
PATHS = {"output_dir", "data_root", "manifest", "backbone", "adapter", "cache_dir"}  # ~ and $VAR are expanded in these
DEFAULTS = {field.name: field.default for field in fields(Config)}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, then `key=value` overrides. Raises FileNotFoundError, or ValueError by key."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml")))
        raise FileNotFoundError(f"{path}: no such config" + (f"; {path.parent} holds {known}" if known else ""))
    if (size := path.stat().st_size) > MAX_SIZE:
        raise ValueError(f"{path}: has {size:,} bytes, expected at most {MAX_SIZE:,} of a configuration")
    try:
        values = parse(path.read_text(encoding="utf-8-sig"), str(path))  # -sig: Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8") from None
    values = {} if values is None else values  # an empty file: every default
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, found a {type(values).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override}: expected key=value, as in seed=1")
        values[key] = read_override(key, value, override)
    config = make_config(values, str(path))
    return config if config.name else replace(config, name=path.stem)


def read_override(key: str, value: str, where: str) -> object:
    """The value of `key=value`: YAML, but for a key that takes text the words as they stand (`name=no`, `name=12`)."""
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    if TYPES.get(key) in (str, str | None) and not quoted and (TYPES[key] is str or value != "null"):
        return value
    if re.fullmatch(r"[-+]?0[0-9]+", value):
        raise ValueError(f"{where}: YAML reads a number with a leading zero as octal; write {int(value)}")
    return parse(value, where)


class Loader(yaml.SafeLoader):
    """Refuses aliases, of which a few lines unfold to fill the memory, deep nesting, and a key that is given twice."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH or self.check_event(yaml.AliasEvent):
            raise ValueError(f"expected no alias such as *name, and at most {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} is given more than once")
        return node


def parse(text: str, where: str) -> object:
    """A YAML value. Raises ValueError for what is no YAML, or more than a configuration needs."""
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # a tag on a value that does not fit it can raise nearly any of them
        raise ValueError(f"{where}: is not YAML ({' '.join(str(error).split())})") from None


def make_config(values: dict, where: str) -> Config:
    """A `Config` of plain values, each checked against the type of its field."""
    if values.get("fold") == "all":
        raise ValueError(f"{where}: fold: expected one number, found 'all'; for all: python compare.py CONFIG --folds")
    for key in values:
        if key not in TYPES:
            near = difflib.get_close_matches(str(key), TYPES, 1)
            raise ValueError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
    try:
        typed = {key: coerce(value, TYPES[key], key) for key, value in values.items()}
        for key in PATHS & typed.keys():
            typed[key] = typed[key] and expand(typed[key])
        return Config(**typed)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def expand(path: str) -> str:
    """A path with `~` and `$VAR` replaced, unless there is a file of just this name."""
    return path if os.path.lexists(path) else os.path.expandvars(os.path.expanduser(path))


def coerce(value: Any, kind: Any, key: str) -> Any:
    """`value` as the type `kind` where nothing is lost: `1` is a float, and so is `1e-4`, which YAML takes for text."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    with suppress(ValueError, OverflowError):
        if origin is Literal and isinstance(value, str) and value in arguments:
            return value
        if kind is float and type(value) in (int, float, str) and math.isfinite(number := float(value)):
            return number
        if kind in (int, str, bool, type(None)) and type(value) is kind:
            return value
    if origin is list and isinstance(value, list | tuple):
        return [coerce(item, arguments[0], key) for item in value]
    for argument in arguments if origin in (typing.Union, types.UnionType) else ():
        with suppress(ValueError):
            return coerce(value, argument, key)
    advice = "; put it in quotes" if kind is str and value is not None and not isinstance(value, list | dict) else ""
    found = reprlib.repr(value)  # of any size: from a checkpoint
    raise ValueError(f"{key}: expected {describe(kind)}, found {found}{advice}")


def describe(kind: Any) -> str:
    """A type in a reader's words: `int | list[int] | None` is "int or list of int or null"."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if arguments:
        named = [argument if origin is Literal else describe(argument) for argument in arguments]
        return " or ".join(named) if origin is not list else f"list of {named[0]}"
    return {float: "a finite float", type(None): "null"}.get(kind, kind.__name__)


def extra(module: str, why: str) -> types.ModuleType:
    """A module that the core does without, such as `corpora.published`, imported now that a configuration needs it.

    `why` is what needs it, such as `corpus: iemocap`. Raises ValueError if its folder or a library is not there.
    """
    folder = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (folder, module):  # a library that the module imports
            raise ValueError(f"{why}: needs the package {error.name}; pip install {error.name}") from error
        raise ValueError(f"{why}: needs {module}, but the folder {folder}/ is not beside config.py; copy it") from None
