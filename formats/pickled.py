"""Read `.bin` and `.pt` files of fairseq and other trainers, without running anything that they name."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch

from machine.hardware import first_line
from weights import require_plain


class StandIn(dict):
    """Takes the place of a class that a file names: holds the object's state as items and runs no code of it."""

    def __init__(self, *_: object):
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})


# Settings, then what stands beside them: vocabulary, scores, random states, hyper-parameters, paths.
STAND_INS = """
argparse.Namespace omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig omegaconf.nodes.AnyNode
omegaconf.nodes.StringNode omegaconf.nodes.IntegerNode omegaconf.nodes.FloatNode omegaconf.nodes.BooleanNode
omegaconf.base.Metadata omegaconf.base.ContainerMetadata typing.Any builtins.dict builtins.list builtins.int
builtins.str collections.defaultdict fairseq.data.dictionary.Dictionary numpy.dtype numpy.ndarray
numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar
numpy._core.multiarray._reconstruct pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath pathlib.PureWindowsPath
"""
# Lightning's, of hyper-parameters; the unpickler fills nothing but real dictionaries.
DICTIONARIES = """
pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
lightning_fabric.utilities.data.AttributeDict lightning.fabric.utilities.data.AttributeDict
"""


def read_pickle(path: Path) -> tuple[dict[str, object], dict]:
    """All values by their names, joined with dots where they are nested, and the settings that fairseq keeps beside.

    By PyTorch's restricted unpickler: tensors, containers and stand-ins, nothing else. Raises ValueError.
    """
    harmless = [(StandIn, name) for name in STAND_INS.split()] + [(OrderedDict, name) for name in DICTIONARIES.split()]
    with torch.serialization.safe_globals(harmless):
        try:
            require_plain(path)
            with open(path, "rb") as file:
                zipped = file.read(2) == b"PK"  # as since PyTorch 1.6; what is older cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class) (\S+)", str(error))
            what = f"names {found[1] or found[2]}, which could run code" if found else "is not a PyTorch file"
            raise ValueError(f"{path}: {what}; expected tensors alone. Ask for a .safetensors file") from None
        except Exception as error:  # damage can surface as nearly any of them
            raise ValueError(f"{path}: is not a whole PyTorch file ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}; expected a dictionary of tensors")
    settings = fairseq_settings(content)
    if settings and isinstance(content.get("model"), Mapping):  # beside it fairseq keeps averages and an optimizer
        content = content["model"]
    return flatten(content), settings


def flatten(content: Mapping, depth: int = 4) -> dict[str, object]:
    """The values of nested mappings, as deep as trainers nest them, by their names joined with dots."""
    flat: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and not isinstance(value, StandIn) and depth:
            flat |= {f"{key}.{name}": inner for name, inner in flatten(value, depth - 1).items()}
        elif isinstance(key, str):
            flat[key] = value
    return flat


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
