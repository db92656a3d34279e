"""Read a pretrained checkpoint, from transformers, fairseq or another trainer, into `model.Wav2Vec2`.

Reading is strict: every parameter must be in the file, and every tensor of the backbone must have a place. Nothing in
a file is executed. Sizes, kinds of normalisation and biases come from the tensors; the rest comes from the settings
beside them, else from what is published about the family. A note says what is assumed beyond that.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import extra
from data import say_once
from model import Wav2Vec2, Wav2Vec2Config

SMALL = Path(__file__).parent / "small"  # the backbone that the repository holds; `small` names it anywhere
# Each row: our name, the key in Hugging Face's files, the key in fairseq's. {i} is a number, {p} weight or bias and
# {x} one of q, k, v; CONV and LAYER are short for what begins many keys.
TABLE = """
feature_encoder.convs.{i}.{p}     CONV.{i}.conv.{p}                            CONV.{i}.0.{p}
feature_encoder.norms.{i}.{p}     CONV.{i}.layer_norm.{p}                      CONV.{i}.2.{p}
feature_encoder.norms.{i}.{p}     -                                            CONV.{i}.2.1.{p}
projection.norm.{p}               feature_projection.layer_norm.{p}            layer_norm.{p}
projection.linear.{p}             feature_projection.projection.{p}            post_extract_proj.{p}
projection.mask_embedding         masked_spec_embed                            mask_emb
position.conv.{p}                 encoder.pos_conv_embed.conv.{p}              encoder.pos_conv.0.{p}
position.g                        encoder.pos_conv_embed.conv.weight_g         encoder.pos_conv.0.weight_g
position.v                        encoder.pos_conv_embed.conv.weight_v         encoder.pos_conv.0.weight_v
position.g                        encoder.pos_conv_embed.conv.parametrizations.weight.original0   -
position.v                        encoder.pos_conv_embed.conv.parametrizations.weight.original1   -
norm.{p}                          encoder.layer_norm.{p}                       encoder.layer_norm.{p}
layers.{i}.attention.{x}.{p}      LAYER.{i}.attention.{x}_proj.{p}             LAYER.{i}.self_attn.{x}_proj.{p}
layers.{i}.attention.o.{p}        LAYER.{i}.attention.out_proj.{p}             LAYER.{i}.self_attn.out_proj.{p}
layers.{i}.attention.gate.{p}     LAYER.{i}.attention.gru_rel_pos_linear.{p}   LAYER.{i}.self_attn.grep_linear.{p}
layers.{i}.attention.gate_scale   LAYER.{i}.attention.gru_rel_pos_const        LAYER.{i}.self_attn.grep_a
relative_bias.weight              LAYER.0.attention.rel_attn_embed.weight      LAYER.0.self_attn.relative_attention_bias.weight
layers.{i}.attention_norm.{p}     LAYER.{i}.layer_norm.{p}                     LAYER.{i}.self_attn_layer_norm.{p}
layers.{i}.feed_forward.fc1.{p}   LAYER.{i}.feed_forward.intermediate_dense.{p} LAYER.{i}.fc1.{p}
layers.{i}.feed_forward.fc2.{p}   LAYER.{i}.feed_forward.output_dense.{p}      LAYER.{i}.fc2.{p}
layers.{i}.feed_forward_norm.{p}  LAYER.{i}.final_layer_norm.{p}               LAYER.{i}.final_layer_norm.{p}
""".replace("CONV", "feature_extractor.conv_layers").replace("LAYER", "encoder.layers")  # noqa: E501
KEYS = [row.split() for row in TABLE.strip().splitlines()]
OURS, HUGGING_FACE, FAIRSEQ = range(3)
HOLES = {"i": r"(?P<i>\d+)", "p": "(?P<p>weight|bias)", "x": "(?P<x>[qkv])"}
PATTERNS = {cell: re.compile(cell.replace(".", r"\.").format(**HOLES)) for row in KEYS for cell in row}
CONVOLUTIONS = [f"feature_encoder.convs.{i}.weight" for i in range(len(Wav2Vec2Config.conv_kernels))]
POSITION, FC1 = "position.conv.weight", "layers.0.feed_forward.fc1.weight"
SIZES = dict.fromkeys([*CONVOLUTIONS, POSITION], (None,) * 3) | {FC1: (None,) * 2}  # of which all others follow
PREFIX = re.compile(r"^(wav2vec2|hubert|wavlm|w2v_encoder\.w2v_model)\.")
ROOT = re.compile(r"(|.*\.)(encoder\.(?:transformer\.)?layers|feature_extractor\.conv_layers)\.\d+\.")
OWN = re.compile(  # what a backbone's keys begin with; what begins otherwise belongs to a head
    r"(feature_extractor\.conv_layers|feature_projection|encoder|layer_norm|post_extract_proj|masked_spec_embed"
    r"|mask_emb|adapter)(\.|$)"
)
HEADS = re.compile(  # parts of published models that are known, and no part of the backbone
    r"(quantizer|project_q|project_hid|final_proj|lm_head|w2v_encoder\.proj|projector|classifier|tdnn|aux|objective)\..*"
    r"|feature_extractor\.(weight|bias)|layer_weights|label_embs_concat|mask_time_emb_vector|mask_feature_emb_vector"
)
KNOWN = ("wav2vec2", "hubert", "wavlm")
ATTENTION_HEADS = {768: 12, 1024: 16, 1280: 16, 1920: 16}  # by width, in everything published of the three families
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json"]  # an index names the files that hold the tensors
WEIGHT_FILES += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
MAX_LAYERS = 1000  # of a checkpoint; the largest published has 48
MAX_PICKLE = 1 << 24  # bytes of what stands beside the tensors, each of which can become an object
PROCESSOR = "processor_config.json"  # transformers 5 writes the preprocessor's settings into this file alone
SETTINGS_FILES = ("config.json", "preprocessor_config.json", PROCESSOR)  # a later one overrides
WAYS_OUT = "give `backbone` a directory or file with the weights, or connect to the network once"


class UnavailableError(FileNotFoundError):
    """A hub's checkpoint is neither in the local cache nor to be had from the network."""


def load_backbone(source: str | Path, **regularisation: Any) -> Wav2Vec2:
    """The backbone in a checkpoint, in eval mode and fp32.

    `source` is a Hugging Face directory, a checkpoint file (`.safetensors`, `.bin`, `.pt`) or a hub id, which may end
    in `@revision`; `regularisation` are fields of `Wav2Vec2Config`. Weights that are fp32 in the file stay mapped from
    it: what is never used takes no memory. Raises FileNotFoundError or ValueError.
    """
    files = locate(source)
    return make_backbone(*read(files), files[0], **regularisation)


def make_backbone(tensors: Mapping[str, Tensor], settings: Mapping, path: Path, **regularisation: Any) -> Wav2Vec2:
    """The backbone of these tensors and settings, which come from `path`."""
    state, sources = rename(tensors, path)
    fold_weight_norm(state, sources, path)
    refuse(misfits(state, SIZES, sources), path)
    config = replace(describe(state, settings, path), **regularisation)
    with torch.device("meta"):
        backbone = Wav2Vec2(config)
    expected = {name: parameter.shape for name, parameter in backbone.named_parameters()}
    state.setdefault("projection.mask_embedding", torch.zeros(config.width))  # left out where unused
    surplus = [f"{sources[name]} has no place" for name in state if name not in expected]
    refuse(surplus + misfits(state, expected, sources), path)
    backbone.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return backbone.eval()


def hub_id(source: object) -> tuple[str, str | None] | None:
    """Repository and revision (None: the newest) if `source` is `owner/name` or `owner/name@revision` and no path."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source) if isinstance(source, str) else None
    return (match[1], match[2]) if match and match[1][0] != "." and not Path(match[0]).exists() else None


def locate(source: str | Path) -> list[Path]:
    """The files of a checkpoint, weights first: of a path, else of the Hugging Face cache, else downloaded."""
    path = Path(source).expanduser()
    path = SMALL if source == "small" and not path.exists() else path
    if path.is_file():
        return [path, *(list_settings(path.parent) if path.suffix != ".pt" else [])]
    if not path.is_dir():
        if (found := hub_id(str(source))) is None:
            raise FileNotFoundError(f"backbone: {source} is neither a file, a directory nor a hub id; {WAYS_OUT}")
        path = extra("formats.hub", f"backbone: {source}").fetch(*found)
    for weights in (path / name for name in WEIGHT_FILES if (path / name).is_file()):
        files = [path / Path(shard).name for shard in list_shards(weights)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{weights}: names {', '.join(missing)}, which {path} does not hold")
        return files + list_settings(path)
    there = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(f"{path}: expected {', '.join(WEIGHT_FILES)}; found {there}")


def list_settings(path: Path) -> list[Path]:
    """The settings in a directory; not a processor file without any, as older versions of transformers wrote."""
    files = [path / name for name in SETTINGS_FILES if (path / name).is_file()]
    return [file for file in files if file.name != PROCESSOR or "feature_extractor" in read_json(file)]


def list_shards(weights: Path) -> list[str]:
    """The names of the files that hold the tensors: the file itself, or those that it lists if it is an index."""
    if weights.suffix != ".json":
        return [weights.name]
    names = read_json(weights).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{weights}: expected a `weight_map` of names to files")
    return sorted(set(names.values()))


def sha256(files: Iterable[Path]) -> str:
    """One SHA-256 over the contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def read(files: list[Path]) -> tuple[dict[str, Tensor], dict]:
    """All tensors by their source keys (mapped into memory, not yet read) and the settings found with them."""
    tensors: dict[str, Tensor] = {}
    settings: dict = {}
    for path in files:
        if path.name in SETTINGS_FILES:
            content = read_json(path)
            nested = content.get("feature_extractor")
            settings |= nested if isinstance(nested, dict) else content
        elif path.suffix == ".safetensors":
            try:
                tensors |= load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path}: is not a whole safetensors file ({error})") from None
        else:
            content, beside = extra("formats.pickled", f"{path}").read_pickle(path)
            tensors |= stored_tensors(content, path)
            settings |= beside
    if (kind := settings.get("model_type", "wav2vec2")) not in KNOWN:
        raise ValueError(f"{files[0]}: is a {kind} checkpoint; expected {', '.join(KNOWN)}")
    return tensors, settings


def require_plain(path: Path) -> None:
    """Raise ValueError for a zip with which a small file could fill the memory, and which PyTorch never writes."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # the format before PyTorch 1.6
            return
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("it has compressed members, or members that share their bytes")
        pickles = [member for member in members if member.filename.endswith(".pkl")]
        if any(member.file_size > MAX_PICKLE or b"bytearray" in archive.read(member) for member in pickles):
            raise ValueError("it holds more than tensors and plain values")


def stored_tensors(content: Mapping, path: Path) -> dict[str, Tensor]:
    """The tensors in what was unpickled, by name, without attributes. Raises ValueError if they are not in the file."""
    tensors = {k: Tensor.detach(v) for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    declared, size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), path.stat().st_size
    if declared > 2 * size:  # of two tensors with one memory each counts
        raise ValueError(f"{path}: declares {declared:,} bytes of tensors, but has only {size:,}")
    return tensors


def unusable(tensor: Tensor) -> str | None:
    """What keeps a tensor from being plain numbers in memory, if anything does: restricted pickles hold other kinds."""
    if type(tensor) is not Tensor or tensor.is_nested or tensor.layout != torch.strided:
        return "is no plain tensor"
    if tensor.device.type != "cpu" or not tensor.is_floating_point():
        return f"is {tensor.dtype} on {tensor.device}, expected floating point on the CPU"
    return None


def require_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise ValueError if a tensor of `source` that is in memory holds NaN or infinite values."""
    if damaged := [key for key, tensor in tensors.items() if not (tensor.is_meta or tensor.isfinite().all())]:
        raise ValueError(f"{source}: NaN or infinite values in {first(damaged, 8)}; fetch or train it anew")


def first(items: Iterable[str], most: int, between: str = ", ") -> str:
    """The first few of many, and how many more there are."""
    items = list(items)
    return between.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def translate(key: str, source: int = OURS, target: int = HUGGING_FACE) -> list[str]:
    """A key in one column of TABLE in the words of another, every way that it is written there."""
    found = [(row[target], PATTERNS[row[source]].fullmatch(key)) for row in KEYS if row[target] != "-"]
    return [cell.format(**match.groupdict()) for cell, match in found if match]


@cache
def our_name(key: str) -> str | None:
    """Our name of a key of Hugging Face, fairseq or torchaudio, None if the backbone has no such part."""
    key = PREFIX.sub("", key).replace("encoder.transformer.", "encoder.")  # torchaudio's keys are HF's, one level down
    key = key.replace("encoder.feature_projection.", "feature_projection.")
    return next(iter(translate(key, HUGGING_FACE, OURS) + translate(key, FAIRSEQ, OURS)), None)


def spell(name: str, sources: Mapping[str, str]) -> str:
    """The key that a parameter of ours has, or would have, in the file of which `sources` holds the keys."""
    keys = sources.values()
    column = FAIRSEQ if any(re.search(r"\.(self_attn|fc1)\.", key) for key in keys) else HUGGING_FACE
    spelled = [find_roots(keys)[0] + key for key in translate(name, target=column)] or [name]
    stem = partial(re.sub, "weight$|bias$|[gv01]$", "")  # what a key shares with that of the other half
    return next((key for key in spelled if stem(key) in map(stem, keys)), spelled[0])


def find_roots(keys: Iterable[str]) -> list[str]:
    """What stands before the keys of each backbone among `keys`."""
    found = map(re.compile(r"(|.*\.)feature_extractor\.conv_layers\.\d+\.(conv|0)\.weight").fullmatch, keys)
    return sorted({match[1] for match in found if match})


def rename(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The backbone's tensors by our names, and the key of each. Raises ValueError unless there is just one backbone."""
    roots = find_roots(tensors)
    if len(roots) > 1:
        found = " and ".join(root.rstrip(".") or "no prefix" for root in roots)
        raise ValueError(f"{path}: holds {len(roots)} encoders, under {found}; expected one, so save that one alone")
    sources: dict[str, str] = {}
    root, state, unknown, beside = "".join(roots), {}, [], []
    for key, tensor in tensors.items():
        inner = key.removeprefix(root)
        if key.startswith(root) and (name := our_name(inner)) is not None:
            if name in state:
                raise ValueError(f"{path}: holds {name} twice, as {sources[name]} and as {key}")
            if problem := unusable(tensor):
                raise ValueError(f"{path}: {key} {problem}")
            state[name] = tensor.flatten() if name.endswith(".gate_scale") else tensor  # (1, H, 1, 1)
            sources[name] = key
        elif key.startswith(root) and OWN.match(inner):
            unknown.append(key)
        elif not HEADS.fullmatch(PREFIX.sub("", inner)):
            beside.append(key)
    if unknown or not roots or "unispeech" in root:  # UniSpeech is the same architecture, taught otherwise
        what = f"holds no encoder of Wav2Vec 2.0, HuBERT or WavLM; found {len(tensors)} tensors: {first(tensors, 8)}"
        what = f"{len(unknown)} tensors of no known place: {first(unknown, 8)}" if roots else what
        raise extra("formats.others", f"{path}: {what}").refusal(tensors, path, what)
    if beside:
        say_once(f"note: {path}: what lies beside the backbone is left out: {first(beside, 4)}")
    return state, sources


def fold_weight_norm(state: dict[str, Tensor], sources: dict[str, str], path: Path) -> None:
    """Replace g and v of the positional convolution by its weight `g v / |v|`, one norm for each tap."""
    halves = ("position.g", "position.v")
    if not any(half in state for half in halves):
        return
    refuse([f"{spell(half, sources)} is missing" for half in halves if half not in state], path)
    g, v = (state.pop(half).float() for half in halves)
    if v.ndim != 3 or g.shape != (1, 1, v.shape[2]):
        raise ValueError(f"{path}: {sources['position.g']} {tuple(g.shape)} does not fit {tuple(v.shape)}")
    state[POSITION] = v * (g / tap_norms(v))
    sources[POSITION] = sources["position.v"]


def tap_norms(v: Tensor) -> Tensor:
    """The norm of each tap of a kernel, `(out, in, kernel)` -> `(1, 1, kernel)`; in fp32 it was off by up to 3e-5."""
    return torch.linalg.vector_norm(v, dim=(0, 1), keepdim=True, dtype=torch.float64).float()


def misfits(state: Mapping[str, Tensor], expected: Mapping[str, Sequence], sources: Mapping[str, str]) -> list[str]:
    """What is missing of the expected tensors, or of another shape. None is any size above 0."""
    problems = []
    for name, sizes in expected.items():
        found = tuple(state[name].shape) if name in state else ()
        fits = len(found) == len(sizes) and all(b and a in (b, None) for a, b in zip(sizes, found, strict=True))
        if name not in state:
            problems.append(f"{spell(name, sources)} is missing")
        elif not fits:
            problems.append(f"{sources[name]} is {found}, expected {str(tuple(sizes)).replace('None', 'any')}")
    return problems


def setting(settings: Mapping, path: Path, *names: str, default: Any, guess: bool = False) -> Any:
    """The first of these settings that is there, of the kind of `default`, else that; where it is a guess, say so."""
    name = next((name for name in names if settings.get(name) is not None), None)
    value = settings.get(name, default)
    if name is None and guess:
        file = SETTINGS_FILES[names[0] == "do_normalize"]
        advice = f"Put it into a {file} beside it" + " and rename the weights to .bin" * (path.suffix == ".pt")
        say_once(f"note: {path}: no settings give {names[0]}; assumed {json.dumps(value)}. {advice}")
    if type(value) is not type(default) or (not isinstance(value, bool | list) and not 0 < value < 2**31):
        raise ValueError(f"{path}: {name} is {value!r} in its settings; expected a value such as {default!r}")
    return value


def describe(state: Mapping[str, Tensor], settings: Mapping, path: Path) -> Wav2Vec2Config:
    """The architecture: sizes from the tensors, the rest from the settings, else from what is published."""
    get = partial(setting, settings, path)
    expected: dict[str, object] = dict.fromkeys(("hidden_act", "feat_extract_activation", "activation_fn"), "gelu")
    expected |= {"add_adapter": False, "adapter_attn_dim": None, "conv_pos_batch_norm": False, "sampling_rate": 16_000}
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {settings[name]!r} in its settings; only {value!r} is known here")
    channels, _, kernels = zip(*(state[name].shape for name in CONVOLUTIONS), strict=True)
    strides = tuple(get("conv_stride", default=list(Wav2Vec2Config.conv_strides)))
    if (kernels, strides) != (Wav2Vec2Config.conv_kernels, Wav2Vec2Config.conv_strides):
        raise ValueError(f"{path}: convolutions have kernels {kernels} and strides {strides}; only the usual are known")
    width, per_group, kernel = state[POSITION].shape
    if width % per_group:
        raise ValueError(f"{path}: a positional convolution of {width} by {per_group} cannot be cut into groups")
    usual = ATTENTION_HEADS.get(width, max(1, min(width // 64, 16)))
    heads = get("num_attention_heads", "encoder_attention_heads", default=usual, guess=width not in ATTENTION_HEADS)
    if width % heads:
        raise ValueError(f"{path}: {heads} attention heads in its settings do not divide its width {width}")
    found = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    if (layers := get("num_hidden_layers", "encoder_layers", default=found)) > MAX_LAYERS:
        raise ValueError(f"{path}: has {layers} layers, expected at most {MAX_LAYERS}")
    buckets = len(state.get("relative_bias.weight", ()))
    if settings.get("model_type") == "wavlm" and not buckets:
        raise ValueError(f"{path}: is a wavlm checkpoint by its settings, but has no relative position bias")
    large = "feature_encoder.norms.1.weight" in state  # the kind of layer-normed convolutions; all these are pre-norm
    # Published: yes for every large one, no for WavLM-base. Of the others the hub's files say yes, their authors no.
    yes = large or ("architectures" in settings and not buckets)
    # DistilHuBERT (arXiv 2110.01900) has two layers and no norm before its projection.
    distilled = layers == 2 and not any(name.startswith("projection.norm.") for name in state)
    return Wav2Vec2Config(
        conv_channels=channels,
        conv_norm="layer" if large else "group",
        conv_bias="feature_encoder.convs.0.bias" in state,
        projection_norm=get("feat_proj_layer_norm", default=not distilled),
        width=width,
        layers=layers,
        heads=heads,
        ffn=state[FC1].shape[0],
        pre_norm=get("do_stable_layer_norm", "layer_norm_first", default=large),
        position_kernel=kernel,
        position_groups=width // per_group,
        norm_eps=get("layer_norm_eps", default=1e-5),
        relative_buckets=buckets,
        relative_distance=get("max_bucket_distance", "max_distance", default=800),
        normalize_waveform=get("do_normalize", "normalize", default=yes, guess=not (large or buckets)),
    )


def refuse(problems: Sequence[str], path: Path) -> None:
    """Raise ValueError if there are problems."""
    if problems:
        raise ValueError(f"{path}: does not fit its own architecture: {first(problems, 8, '; ')}")
