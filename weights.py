"""Pretrained checkpoints as transformers and fairseq write them, into `model.Wav2Vec2`. Strict; nothing is executed.
And from there into a directory that transformers reads. And the published emotion model, with its head.

What can be read off the tensors is (sizes, kinds of normalisation, biases); the settings beside them supply the rest.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import EmotionModel, Wav2Vec2, Wav2Vec2Config

# Source key -> our key, first match wins; None: known, and no part of the backbone. Both families at once: no key of
# the one means something else in the other.
PREFIX = r"^(wav2vec2|hubert|wavlm|w2v_encoder\.w2v_model)\."
P = r"(weight|bias)"
BIAS = "relative_bias.weight"  # only WavLM has it
KEYS: dict[str, str | None] = {
    rf"feature_extractor\.conv_layers\.(\d+)\.(?:conv|0)\.{P}": r"feature_encoder.convs.\1.\2",
    rf"feature_extractor\.conv_layers\.(\d+)\.(?:layer_norm|2|2\.1)\.{P}": r"feature_encoder.norms.\1.\2",
    rf"(?:feature_projection\.)?layer_norm\.{P}": r"projection.norm.\1",
    rf"(?:feature_projection\.projection|post_extract_proj)\.{P}": r"projection.linear.\1",
    r"masked_spec_embed|mask_emb": "projection.mask_embedding",
    rf"encoder\.(?:pos_conv_embed\.conv|pos_conv\.0)\.{P}": r"position.conv.\1",
    r"encoder\.(?:pos_conv_embed\.conv|pos_conv\.0)\.(?:weight_g|parametrizations\.weight\.original0)": "position.g",
    r"encoder\.(?:pos_conv_embed\.conv|pos_conv\.0)\.(?:weight_v|parametrizations\.weight\.original1)": "position.v",
    rf"encoder\.layer_norm\.{P}": r"norm.\1",
    rf"encoder\.layers\.(\d+)\.(?:attention|self_attn)\.([qkv])_proj\.{P}": r"layers.\1.attention.\2.\3",
    rf"encoder\.layers\.(\d+)\.(?:attention|self_attn)\.out_proj\.{P}": r"layers.\1.attention.o.\2",
    rf"encoder\.layers\.(\d+)\.(?:attention\.gru_rel_pos|self_attn\.grep)_linear\.{P}": r"layers.\1.attention.gate.\2",
    r"encoder\.layers\.(\d+)\.(?:attention\.gru_rel_pos_const|self_attn\.grep_a)": r"layers.\1.attention.gate_scale",
    r"encoder\.layers\.0\.(?:attention\.rel_attn_embed|self_attn\.relative_attention_bias)\.weight": BIAS,
    rf"encoder\.layers\.(\d+)\.(?:layer_norm|self_attn_layer_norm)\.{P}": r"layers.\1.attention_norm.\2",
    rf"encoder\.layers\.(\d+)\.(?:feed_forward\.intermediate_dense|fc1)\.{P}": r"layers.\1.feed_forward.fc1.\2",
    rf"encoder\.layers\.(\d+)\.(?:feed_forward\.output_dense|fc2)\.{P}": r"layers.\1.feed_forward.fc2.\2",
    rf"encoder\.layers\.(\d+)\.final_layer_norm\.{P}": r"layers.\1.feed_forward_norm.\2",
    r"(quantizer|project_q|project_hid|final_proj|lm_head|w2v_encoder\.proj)\..*": None,
    r"(projector|classifier|tdnn|objective)\..*": None,
    rf"feature_extractor\.{P}|layer_weights|label_embs_concat|mask_time_emb_vector|mask_feature_emb_vector": None,
}
HUGGING_FACE = {  # our key -> the key that `save_backbone` writes
    rf"feature_encoder\.convs\.(\d+)\.{P}": r"feature_extractor.conv_layers.\1.conv.\2",
    rf"feature_encoder\.norms\.(\d+)\.{P}": r"feature_extractor.conv_layers.\1.layer_norm.\2",
    rf"projection\.norm\.{P}": r"feature_projection.layer_norm.\1",
    rf"projection\.linear\.{P}": r"feature_projection.projection.\1",
    r"projection\.mask_embedding": "masked_spec_embed",
    r"position\.conv\.(bias|weight_g|weight_v)": r"encoder.pos_conv_embed.conv.\1",
    rf"norm\.{P}": r"encoder.layer_norm.\1",
    rf"layers\.(\d+)\.attention\.([qkv])\.{P}": r"encoder.layers.\1.attention.\2_proj.\3",
    rf"layers\.(\d+)\.attention\.o\.{P}": r"encoder.layers.\1.attention.out_proj.\2",
    rf"layers\.(\d+)\.attention\.gate\.{P}": r"encoder.layers.\1.attention.gru_rel_pos_linear.\2",
    r"layers\.(\d+)\.attention\.gate_scale": r"encoder.layers.\1.attention.gru_rel_pos_const",
    re.escape(BIAS): "encoder.layers.0.attention.rel_attn_embed.weight",
    rf"layers\.(\d+)\.attention_norm\.{P}": r"encoder.layers.\1.layer_norm.\2",
    rf"layers\.(\d+)\.feed_forward\.fc1\.{P}": r"encoder.layers.\1.feed_forward.intermediate_dense.\2",
    rf"layers\.(\d+)\.feed_forward\.fc2\.{P}": r"encoder.layers.\1.feed_forward.output_dense.\2",
    rf"layers\.(\d+)\.feed_forward_norm\.{P}": r"encoder.layers.\1.final_layer_norm.\2",
}
FAMILIES = {"wav2vec2": "Wav2Vec2Model", "hubert": "HubertModel", "wavlm": "WavLMModel"}  # what transformers calls them
OTHERS = {  # what gives another architecture away
    "data2vec": r"^data2vec_audio\.|pos_conv_embed\.layers\.|pos_conv\.\d+\.0\.",
    "UniSpeech-SAT": r"^unispeech_sat\.",
    "UniSpeech": r"^unispeech\.",
    "SEW": r"^sew(_d)?\.|^feature_projection\.(weight|bias)$|^encoder\.upsample\.",
    "w2v-BERT": r"^wav2vec2_bert\.|distance_embedding",
    "Conformer": r"conv_module|linear_pos|pos_bias_u",
    "Whisper": r"encoder\.(conv1|embed_positions)\.",
}
KNOWN = ("wav2vec2", "hubert", "wavlm")
EMOTION_HEAD = {"classifier.dense": "0", "classifier.out_proj": "3"}  # -> its place in `EmotionModel.head`
TARGETS = {"arousal": "activation", "activation": "activation", "dominance": "dominance", "valence": "valence"}
PUBLISHED = ("activation", "dominance", "valence")  # their order where a file does not name them
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MAX_LAYERS = 1000  # of a checkpoint; the largest published has 48
MAX_PICKLE = 1 << 24  # bytes of what stands beside the tensors
SETTINGS_FILES = ("config.json", "preprocessor_config.json")
WAYS_OUT = "give `backbone` a directory or file with the weights, or connect to the network once"


class UnavailableError(FileNotFoundError):
    """A hub's checkpoint is neither in the local cache nor to be had from the network."""


def load_backbone(source: str | Path, **regularisation: float) -> Wav2Vec2:
    """The backbone in a checkpoint, in eval mode and fp32.

    `source` is a Hugging Face directory, a checkpoint file (`.safetensors`, `.bin`, fairseq `.pt`) or a hub id;
    `regularisation` are fields of `Wav2Vec2Config`. Weights that are fp32 in the file stay mapped from it: what is
    never used takes no memory. Raises FileNotFoundError or ValueError.
    """
    files = locate(source)
    return make_backbone(*read(files), files[0], **regularisation)


def make_backbone(tensors: Mapping[str, Tensor], settings: Mapping, path: Path, **regularisation: float) -> Wav2Vec2:
    """The backbone of these tensors and settings, which come from `path`."""
    state, sources = rename(tensors, path)
    config = replace(describe(state, settings, path), **regularisation)
    for name, tensor in state.items():
        if name.endswith(".gate_scale"):
            state[name] = tensor.flatten()  # (1, H, 1, 1)
    with torch.device("meta"):
        backbone = Wav2Vec2(config)
    check(state, sources, backbone, path)
    backbone.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return backbone.eval()


def load_emotion_model(source: str | Path) -> EmotionModel:
    """A published emotion model, on labels from 0 to 1, in eval mode and fp32: backbone, mean over the frames and head.

    As of `audeering/wav2vec2-large-robust-12-ft-emotion-msp-dim` (Wagner et al. 2023, arXiv 2203.07378), whose head is
    `out_proj(tanh(dense(x)))`. `source` as in `load_backbone`. Raises FileNotFoundError, or ValueError if there is no
    such head or if it predicts something else.
    """
    files = locate(source)
    path, (tensors, settings) = files[0], read(files)
    if not is_emotion_head(tensors):
        raise ValueError(f"{path}: has no emotion head; expected {' and '.join(EMOTION_HEAD)} beside the backbone")
    if (pooling := settings.get("pooling_mode", "mean")) != "mean":
        raise ValueError(f"{path}: pooling_mode is {pooling!r} in its settings; only 'mean' is known here")
    backbone = make_backbone(tensors, settings, path)
    width = len(tensors["classifier.dense.weight"])
    targets = name_targets(settings, len(tensors["classifier.out_proj.weight"]), path)
    with torch.device("meta"):  # no memory for a head before it is known to fit
        model = EmotionModel(backbone, targets, (0.0, 1.0), head_width=width)
    model.head[1] = nn.Tanh()
    places = {f"{ours}.{kind}": f"{key}.{kind}" for key, ours in EMOTION_HEAD.items() for kind in ("weight", "bias")}
    if surplus := [key for key in tensors if key.startswith("classifier.") and key not in places.values()]:
        raise ValueError(f"{path}: {len(surplus)} tensors of no known place in its head: {', '.join(surplus[:8])}")
    state = {}
    for name, parameter in model.head.named_parameters():
        found = tensors.get(places[name], torch.empty(0))
        if found.shape != parameter.shape or unusable(found):
            what = unusable(found) or f"is {tuple(found.shape)}, expected {tuple(parameter.shape)}"
            raise ValueError(f"{path}: does not fit its own architecture: {places[name]} {what}")
        state[name] = found.float()
    model.head.load_state_dict(state, assign=True)
    return model.eval()


def is_emotion_head(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the head of the published emotion models is among tensors by their source keys."""
    return all(f"{key}.weight" in tensors and tensors[f"{key}.weight"].ndim == 2 for key in EMOTION_HEAD)


def name_targets(settings: Mapping, count: int, path: Path) -> tuple[str, ...]:
    """The targets of an emotion head by our names, in the order of its outputs: from `id2label` if that names them."""
    labels = settings.get("id2label")
    names = [str(name).lower() for _, name in sorted(labels.items())] if isinstance(labels, dict) else []
    if not names or names == [f"label_{i}" for i in range(count)]:  # what transformers writes where nobody named them
        names = list(PUBLISHED)
    targets = tuple(TARGETS.get(name, "") for name in names)
    if "" in targets or len(set(targets)) != len(targets) or len(targets) != count:
        expected = "each of arousal, dominance and valence at most once"
        raise ValueError(f"{path}: its {count} outputs are {', '.join(names)}; expected {expected}")
    return targets


def random_backbone(config: Wav2Vec2Config, seed: int = 0) -> Wav2Vec2:
    """A backbone with random weights, distributed as before pretraining; the same for the same seed."""
    with torch.device("meta"):
        backbone = Wav2Vec2(config)
    backbone = backbone.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(seed)
    for module in backbone.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        if hasattr(module, "gate_scale"):
            nn.init.ones_(module.gate_scale)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    nn.init.uniform_(backbone.projection.mask_embedding, generator=generator)
    return backbone


def save_backbone(backbone: Wav2Vec2, directory: str | Path, family: str = "wav2vec2") -> None:
    """Write a backbone as a Hugging Face directory for `from_pretrained` and `load_backbone`.

    In fp32; `family` "hubert" is for `HubertModel`, the same architecture, and what has WavLM's bias for `WavLMModel`.
    The weight `w` of the positional convolution becomes `v = w` and `g = |v|`, so that `g v / |v|` is `w`.
    Raises ValueError for a backbone with LoRA in it or with a dropped prefix.
    """
    state = {name: parameter.detach() for name, parameter in backbone.named_parameters()}
    state |= {name: scale.view(1, -1, 1, 1) for name, scale in state.items() if name.endswith(".gate_scale")}
    w = state.pop("position.conv.weight").float()
    norm = tap_norms(w)
    state["position.conv.weight_g"] = norm
    state["position.conv.weight_v"] = w.where(norm > 0, 1.0)  # where w is 0, g is, and v must not be: 0/0
    tensors = {}
    for name, tensor in state.items():
        key = hugging_face_key(name)
        if key is None or tensor.is_meta:
            what = "is not in memory; save it before its prefix is dropped" if key else "has no place; merge LoRA first"
            raise ValueError(f"{directory}: cannot hold the backbone: {name} {what}")
        tensors[key] = tensor.to("cpu", torch.float32).contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f".{WEIGHT_FILES[0]}.tmp"  # the backbone may be mapped from the very file that it replaces
    save_file(tensors, beside, {"format": "pt"})
    os.replace(beside, directory / WEIGHT_FILES[0])
    for name, settings in zip(SETTINGS_FILES, settings_of(backbone.config, family), strict=True):
        (directory / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def hugging_face_key(name: str) -> str | None:
    """The key in a Hugging Face directory of a parameter of ours, None if it has no place there."""
    return next((m.expand(key) for pattern, key in HUGGING_FACE.items() if (m := re.fullmatch(pattern, name))), None)


def settings_of(config: Wav2Vec2Config, family: str = "wav2vec2") -> tuple[dict, dict]:
    """An architecture as `config.json` and `preprocessor_config.json` say it."""
    family = "wavlm" if config.relative_buckets else family
    architecture = {
        "model_type": family,
        "architectures": [FAMILIES[family]],
        "conv_dim": config.conv_channels,
        "conv_kernel": config.conv_kernels,
        "conv_stride": config.conv_strides,
        "conv_bias": config.conv_bias,
        "feat_extract_norm": config.conv_norm,
        "feat_extract_activation": "gelu",
        "num_feat_extract_layers": len(config.conv_channels),
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "hidden_act": "gelu",
        "do_stable_layer_norm": config.pre_norm,
        "num_conv_pos_embeddings": config.position_kernel,
        "num_conv_pos_embedding_groups": config.position_groups,
        "layer_norm_eps": config.norm_eps,
    }
    if config.relative_buckets:
        architecture |= {"num_buckets": config.relative_buckets, "max_bucket_distance": config.relative_distance}
    preprocessing = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": config.normalize_waveform,
        "feature_size": 1,
        "sampling_rate": 16_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": config.conv_norm == "layer",  # the group kind was trained without, says its publisher
    }
    return architecture, preprocessing


# --- finding files ---------------------------------------------------------------------------------------------------


def locate(source: str | Path) -> list[Path]:
    """The files of a checkpoint, weights first: a path, else the Hugging Face cache, else a download."""
    path = Path(source).expanduser()
    if path.is_dir():
        return list_directory(path)
    if path.is_file():
        beside = [path.parent / name for name in SETTINGS_FILES] if path.suffix != ".pt" else []
        return [path, *(file for file in beside if file.is_file())]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"backbone: {source} is neither a file, a directory nor a hub id; {WAYS_OUT}")
    return list_directory(download(str(source)))


def list_directory(path: Path) -> list[Path]:
    for name in WEIGHT_FILES:
        weights = path / name
        if not weights.is_file():
            continue
        files = [weights]
        if name.endswith(".index.json"):
            files = [path / Path(shard).name for shard in list_shards(weights)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{weights}: names {', '.join(missing)}, which {path} does not hold")
        return files + [path / name for name in SETTINGS_FILES if (path / name).is_file()]
    found = ", ".join(sorted(file.name for file in path.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(f"{path}: expected {', '.join(WEIGHT_FILES)}; found {found}")


def list_shards(index: Path) -> list[str]:
    """The names of the files that an index lists."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected a `weight_map` of names to files")
    return sorted(set(names.values()))


def download(repository: str) -> Path:
    """The directory in the Hugging Face cache that holds a repository's checkpoint, fetched if it is not there."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def get(name: str, online: bool) -> Path | None:
        try:
            file = Path(hf_hub_download(repository, name, local_files_only=not online))
        except EntryNotFoundError as error:
            if online and isinstance(error, LocalEntryNotFoundError):  # lost the network on the way
                raise
            return None
        if online:
            check_download(file)
        return file

    def get_all(online: bool) -> Path | None:
        for name in SETTINGS_FILES:  # first: where there are weights, a download was not cut off before its settings
            get(name, online)
        for name in WEIGHT_FILES:
            if weights := get(name, online):
                shards = [get(shard, online) for shard in list_shards(weights)] if weights.suffix == ".json" else []
                return weights.parent if online or all(shards) else None
        return None

    try:
        directory = get_all(online=False)
        if directory is None:
            with suppress(EntryNotFoundError):  # one look: `hf_hub_download` would try half a minute for a network
                get_hf_file_metadata(hf_hub_url(repository, SETTINGS_FILES[0]), timeout=5)  # seconds
            directory = get_all(online=True)
    except (RepositoryNotFoundError, HFValidationError):
        raise FileNotFoundError(
            f"backbone: {repository} is neither a path here nor a repository that the hub shows to you (private ones "
            f"want `hf auth login`); {WAYS_OUT}"
        ) from None
    except Exception as error:
        if isinstance(error, ValueError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UnavailableError(
            f"backbone: {repository} is neither a path here nor in the Hugging Face cache, and cannot be downloaded "
            f"({reason}); {WAYS_OUT}"
        ) from None
    if directory is None:
        raise FileNotFoundError(f"backbone: the hub's {repository} holds none of {', '.join(WEIGHT_FILES)}")
    return directory


def check_download(file: Path) -> None:
    """Compare a file in the Hugging Face cache with the SHA-256 that its blob is named after; remove it if damaged."""
    blob = file.parent / os.readlink(file) if file.is_symlink() else file  # not `resolve`: a blob may be a link itself
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != sha256([blob]):
        blob.unlink()
        file.unlink()
        raise ValueError(f"{file.name} arrived damaged (its SHA-256 is not {blob.name}); run again to fetch it anew")


def sha256(files: Iterable[Path]) -> str:
    """One SHA-256 over the contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def sha256_of(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, for weights that are in no file."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy())
    return digest.hexdigest()


# --- reading files ---------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
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
            settings |= read_json(path)
        elif path.suffix == ".safetensors":
            try:
                tensors |= load_file(path)
            except SafetensorError as error:
                raise ValueError(f"{path}: is not a whole safetensors file ({error})") from None
        else:
            content = read_pickle(path)
            settings |= fairseq_settings(content)
            content = content["model"] if isinstance(content.get("model"), Mapping) else content
            tensors |= stored_tensors(content, path)
    model_type = settings.get("model_type", "wav2vec2")
    if model_type not in KNOWN:
        raise ValueError(f"{files[0]}: is a {model_type} checkpoint; expected {', '.join(KNOWN)}")
    return tensors, settings


class StandIn(dict):
    """Takes the place of a class that a fairseq file names: holds the object's state as items, runs no code of it."""

    def __new__(cls, *_: object) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *_: object):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})


STAND_INS = (  # settings, then what stands beside them: vocabulary and validation scores
    "argparse.Namespace",
    *(f"omegaconf.{name}Config" for name in ("dictconfig.Dict", "listconfig.List")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "String", "Integer", "Float", "Boolean")),
    *(f"omegaconf.base.{name}" for name in ("Metadata", "ContainerMetadata")),
    *("typing.Any", "builtins.dict", "builtins.list", "builtins.int", "builtins.str", "collections.defaultdict"),
    "fairseq.data.dictionary.Dictionary",
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
)


def read_pickle(path: Path) -> dict:
    """A `.bin` or `.pt` file, by PyTorch's restricted unpickler: tensors, containers and stand-ins, nothing else."""
    with torch.serialization.safe_globals([(StandIn, name) for name in STAND_INS]):
        try:
            require_plain(path)
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
                content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", str(error))
            what = f"names {found[1] or found[2]}, which could run code" if found else "is not a PyTorch file"
            raise ValueError(f"{path}: {what}; expected tensors alone. Ask for a .safetensors file") from None
        except Exception as error:  # damage can surface as nearly any of them
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path}: is not a whole PyTorch file ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a dictionary of tensors")
    return content


def require_plain(path: Path) -> None:
    """Raise ValueError for a zip file with what PyTorch never writes and a small file could fill the memory with.

    These are compressed members, members that share their bytes, and a large pickle: of a byte it can make an object.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":  # the format before PyTorch 1.6
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
            if not stored or sum(member.file_size for member in members) > path.stat().st_size:
                raise ValueError("it has compressed members, or members that share their bytes")
            for member in members:
                pickled = member.filename.endswith(".pkl")
                if pickled and (member.file_size > MAX_PICKLE or b"bytearray" in archive.read(member)):
                    raise ValueError("it holds more than tensors and plain values")


def stored_tensors(content: Mapping, path: Path) -> dict[str, Tensor]:
    """The tensors in what was unpickled, by name, without attributes. Raises ValueError if they are not in the file."""
    named = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    tensors = {key: Tensor.detach(value) for key, value in named.items()}
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
        more = f" and {len(damaged) - 8} more" if len(damaged) > 8 else ""
        raise ValueError(f"{source}: NaN or infinite values in {', '.join(damaged[:8])}{more}; fetch or train it anew")


def fairseq_settings(content: Mapping) -> dict:
    """The model's settings of a fairseq file: under `args` or `cfg`, of a finetuned one under `w2v_args` in these."""

    def plain(level: object) -> dict:
        """One level of settings: a dictionary, or the stand-in of a Namespace or DictConfig."""
        level = level.get("_content", level) if isinstance(level, StandIn) else level
        items = level.items() if isinstance(level, Mapping) else ()
        values = {key: value.get("_val", value) if isinstance(value, StandIn) else value for key, value in items}
        unset = ("???", "${")  # omegaconf: missing, and a reference to another setting
        return {key: v for key, v in values.items() if not (isinstance(v, str) and v.startswith(unset))}

    settings = plain(content.get("cfg")) or plain(content.get("args"))
    found: dict = {}
    for _ in range(4):  # the innermost last: it is the backbone's. fairseq nests two, and a level may hold itself
        model = plain(settings.get("model")) or settings
        found |= {**plain(settings.get("task")), **model}
        settings = plain(model.get("w2v_args"))
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


# --- from their names and sizes to ours ------------------------------------------------------------------------------


def rename(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Backbone tensors by our names, weight norm folded, and the key of each. Raises ValueError for an unknown key."""
    state, sources, unknown = {}, {}, []
    for key, tensor in tensors.items():
        name = next((ours and match.expand(ours) for match, ours in matches(key)), "?")
        if name == "?":
            unknown.append(key)
        elif name in state:
            raise ValueError(f"{path}: holds {name} twice, as {sources[name]} and as {key}")
        elif name is not None:
            if problem := unusable(tensor):
                raise ValueError(f"{path}: {key} {problem}")
            state[name] = tensor
            sources[name] = key
    for architecture, pattern in OTHERS.items():
        if telling := [key for key in unknown if re.search(pattern, key)]:
            raise ValueError(
                f"{path}: is a {architecture} checkpoint (it has {telling[0]}); expected {', '.join(KNOWN)}"
            )
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} tensors of no known place: {', '.join(unknown[:8])}")
    if "position.v" in state and "position.g" in state:  # w = g v / |v|, one norm for each of the kernel's taps
        v, g = state.pop("position.v").float(), state.pop("position.g").float()
        if v.ndim != 3 or g.shape != (1, 1, v.shape[2]):
            raise ValueError(f"{path}: {sources['position.g']} {tuple(g.shape)} does not fit {tuple(v.shape)}")
        state["position.conv.weight"] = v * (g / tap_norms(v))
        sources["position.conv.weight"] = sources["position.v"]
    return state, sources


def tap_norms(v: Tensor) -> Tensor:
    """The norm of each tap of a kernel, `(out, in, kernel)` -> `(1, 1, kernel)`; in fp32 it was off by up to 3e-5."""
    return torch.linalg.vector_norm(v, dim=(0, 1), keepdim=True, dtype=torch.float64).float()


def matches(key: str) -> Iterable[tuple[re.Match, str | None]]:
    key = re.sub(PREFIX, "", key)
    return ((match, ours) for pattern, ours in KEYS.items() if (match := re.fullmatch(pattern, key)))


def describe(state: Mapping[str, Tensor], settings: Mapping, path: Path) -> Wav2Vec2Config:
    """The architecture: sizes from the tensors, the rest from the settings."""
    try:
        convs = []
        while f"feature_encoder.convs.{len(convs)}.weight" in state:
            convs.append(state[f"feature_encoder.convs.{len(convs)}.weight"].shape)
        channels, kernels = tuple(shape[0] for shape in convs), tuple(shape[2] for shape in convs)
        width, per_group, kernel = state["position.conv.weight"].shape
        ffn = state["layers.0.feed_forward.fc1.weight"].shape[0]
        layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
        if 0 in (*channels, width, per_group, kernel, ffn) or width % per_group:
            raise ValueError
    except (KeyError, IndexError, ValueError):
        message = f"{path}: holds no encoder of Wav2Vec 2.0, HuBERT or WavLM (found {len(state)} of its tensors)"
        raise ValueError(message) from None
    if settings.get("model_type") == "wavlm" and BIAS not in state:
        raise ValueError(f"{path}: is a wavlm checkpoint by its settings, but has no relative position bias")
    conv_norm = "layer" if "feature_encoder.norms.1.weight" in state else "group"

    def setting(*names: str, default: object) -> object:
        name = next((name for name in names if settings.get(name) is not None), None)
        value = settings.get(name, default)
        if type(value) is not type(default) or (not isinstance(value, bool | list) and not 0 < value < 2**31):
            raise ValueError(f"{path}: {name} is {value!r} in its settings; expected a value such as {default!r}")
        return value

    expected = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "activation_fn": "gelu", "add_adapter": False}
    expected |= {"adapter_attn_dim": None, "conv_pos_batch_norm": False, "feat_proj_layer_norm": True}
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {settings[name]!r} in its settings; only {value!r} is known here")
    strides = tuple(setting("conv_stride", default=list(Wav2Vec2Config.conv_strides)))
    if (kernels, strides) != (Wav2Vec2Config.conv_kernels, Wav2Vec2Config.conv_strides):
        raise ValueError(f"{path}: convolutions have kernels {kernels} and strides {strides}; only the usual are known")
    heads = setting("num_attention_heads", "encoder_attention_heads", default=max(1, min(width // 64, 16)))
    layers = setting("num_hidden_layers", "encoder_layers", default=layers)
    if layers > MAX_LAYERS:
        raise ValueError(f"{path}: has {layers} layers, expected at most {MAX_LAYERS}")
    if width % heads:
        raise ValueError(f"{path}: {heads} attention heads in its settings do not divide its width {width}")
    normalized = setting("do_normalize", "normalize", default="architectures" in settings or conv_norm == "layer")
    return Wav2Vec2Config(
        conv_channels=channels,
        conv_norm=conv_norm,
        conv_bias="feature_encoder.convs.0.bias" in state,
        width=width,
        layers=layers,
        heads=heads,
        ffn=ffn,
        pre_norm=setting("do_stable_layer_norm", "layer_norm_first", default=conv_norm == "layer"),
        position_kernel=kernel,
        position_groups=width // per_group,
        norm_eps=setting("layer_norm_eps", default=1e-5),
        relative_buckets=len(state.get(BIAS, ())),
        relative_distance=setting("max_bucket_distance", "max_distance", default=800),
        normalize_waveform=bool(normalized),
    )


def check(state: dict[str, Tensor], sources: Mapping[str, str], backbone: Wav2Vec2, path: Path) -> None:
    """Every parameter is there in its shape and every tensor has its place, else ValueError."""
    expected = {name: parameter.shape for name, parameter in backbone.named_parameters()}
    state.setdefault("projection.mask_embedding", torch.zeros(backbone.config.width))  # left out where unused
    problems = [f"{name} is missing" for name in expected if name not in state]
    for name, tensor in state.items():
        if name not in expected:
            problems.append(f"{sources[name]} has no place")
        elif tensor.shape != expected[name]:
            problems.append(f"{sources[name]} is {tuple(tensor.shape)}, expected {tuple(expected[name])}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: does not fit its own architecture: {'; '.join(problems[:8])}{more}")
