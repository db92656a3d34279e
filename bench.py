"""Speed and memory of every method, side by side, and beside transformers + PEFT doing the same (docs/speed.md).

Every method runs in processes of its own, on the same audio files and the same checkpoint on disk (random weights:
times do not depend on them). Methods that are compared take turns, so that they see the same machine: first computing
caches and predictions, then, in new processes, training steps. Ours run the very code of a training run; a step of a
cached method reads a cache that was filled before, as from the second epoch on, without the prefix's weights.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import soundfile
import torch
from torch import nn
from tqdm import tqdm

import freeze
import run
import weights
from cache import Prefix, open_cache
from config import Config, load_config
from formats.huggingface import save_backbone
from machine import fast, hardware
from machine.programs import command
from metrics import ccc_loss
from model import Wav2Vec2, Wav2Vec2Config
from report import speed

LEFT_OUT = ("full_amp", "partial3_amp", "full_microbatches", "logmel")  # on request, but the baseline never
CONFIGS = [path for path in sorted(Path(__file__).parent.glob("configs/*.yaml")) if path.stem not in LEFT_OUT]
LABEL_RANGE = (1.0, 7.0)
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}  # as transformers names them
PROJECTIONS |= {"fc1": "intermediate_dense", "fc2": "output_dense"}
Actions = dict[str, Callable[[], object]]


def ours(config: Config, phase: str, folder: Path, paths: list[str]) -> tuple[Actions, list[nn.Parameter]]:
    """What a worker of ours answers to in a phase, and its parameters: all in the order in which train.py does it."""
    device, numbers, counter = hardware.pick_device(config.device), range(len(paths)), itertools.count()
    model, identity = run.build_model(config, LABEL_RANGE)
    dtype = hardware.DTYPES[config.precision]

    def cached(number: int) -> Prefix:
        how = {"backbone": identity["sha256"], "precision": config.precision, "dtype": config.cache_dtype}
        cache = open_cache(folder / f"cache-{config.name}" / str(number), model, paths, **how)
        return Prefix(model, paths, device, dtype, cache)

    prefix = Prefix(model, paths, device, dtype)
    if phase == "step" and config.cache:
        prefix = cached(0)
        prefix.release_if_cached(config.cache_tier)
        if not prefix.complete:
            raise ValueError(f"{prefix.cache.directory}: is not whole, expected what `build` left")
    run.prepare(model, device, config.precision, config.tf32, config.compile and phase == "step")

    def build() -> None:
        new = cached(next(counter))
        list(new([numbers]))
        new.cache.close()

    if phase != "step":
        infer = partial(run.evaluate, model, prefix, numbers, len(paths))
        return {"build": build, "infer": infer}, list(model.parameters())
    labels = torch.rand(len(paths), len(config.targets), device=device)
    optimizer = run.make_optimizer(model, config.lr, config.head_lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    how = {"depth": prefix.depth, "dtype": dtype, "clip": config.clip, "micro_batch_size": config.micro_batch_size}
    freeze.train_mode(model, prefix.depth)

    def step() -> None:
        for x, lengths in prefix([numbers]):
            run.step(model, x, lengths, labels, optimizer=optimizer, scaler=scaler, **how)

    return {"step": step, "read": lambda: list(prefix([numbers]))}, list(model.parameters())


def peer(config: Config, phase: str, naive: bool, paths: list[str]) -> tuple[Actions, list[nn.Parameter]]:
    """The same in transformers and PEFT: what a worker answers to in a phase, and its parameters."""
    sys.modules["torchaudio"] = None  # beside a CPU build of torch it breaks the import of transformers
    from transformers import Wav2Vec2FeatureExtractor

    device, dtype = hardware.pick_device(config.device), hardware.DTYPES[config.precision]
    model, base = peer_model(config, naive)
    width, targets = base.config.hidden_size, len(config.targets)
    head = nn.Sequential(nn.Linear(width, config.head_width), nn.GELU(), nn.Linear(config.head_width, targets))
    model.to(device).train(phase == "step")
    parameters = [*model.parameters(), *head.to(device).parameters()]
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(config.backbone)

    def load() -> dict[str, torch.Tensor]:
        waveforms = [soundfile.read(path, dtype="float32")[0] for path in paths]
        mask = {"padding": True, "return_attention_mask": True, "return_tensors": "pt"}
        return extractor(waveforms, sampling_rate=speed.RATE, **mask).to(device)

    def predict(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            x = model(**inputs).last_hidden_state.float()  # (B, T, D)
        valid = base._get_feature_vector_attention_mask(x.shape[1], inputs["attention_mask"])[..., None]
        return head((x * valid).sum(1) / valid.sum(1))

    if phase == "infer":
        return {"infer": torch.inference_mode()(lambda: predict(load()).cpu())}, parameters
    inputs, labels = load(), torch.rand(len(paths), targets, device=device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters) if naive else torch.optim.AdamW(trained, config.lr, fused=True)

    def step() -> None:
        scaler.scale(ccc_loss(predict(inputs), labels)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, config.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return {"step": step}, parameters


def peer_model(config: Config, naive: bool = False) -> tuple[nn.Module, nn.Module]:
    """A transformers model that trains what `config` does, set up well or `naive`, and itself without PEFT around."""
    from transformers import Wav2Vec2Model

    same = ("hidden_dropout", "attention_dropout", "activation_dropout", "mask_time_prob", "mask_feature_prob")
    settings = {key: getattr(config, key) for key in same} | {"attn_implementation": "sdpa"}
    settings |= {"feat_proj_dropout": config.projection_dropout, "layerdrop": config.layer_drop}
    base = Wav2Vec2Model.from_pretrained(config.backbone, **({} if naive else settings))
    base.requires_grad_(config.trainable_layers == "all")
    if not naive:
        base.freeze_feature_encoder()  # without it training mode switches gradients on for the CNN's input
    count = len(base.encoder.layers)
    layers, model = freeze.layer_numbers(config.trainable_layers, count), base
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        adapted = [number for number in range(count) if number not in layers]
        if config.lora_layers is not None:
            adapted = freeze.layer_numbers(config.lora_layers, count, "lora_layers")
        how = {"r": config.lora_rank, "target_modules": [PROJECTIONS[name] for name in config.lora_targets]}
        how |= {} if naive else {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        model = get_peft_model(base, LoraConfig(layers_to_transform=adapted, **how))
    for number in layers:
        base.encoder.layers[number].requires_grad_(True)
    if layers and base.config.do_stable_layer_norm and not naive:
        base.encoder.layer_norm.requires_grad_(True)
    return model, base


# --- processes -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)  # which makes it a key, whatever its config holds
class Method:
    """A config, and who trains it: "ours", "reference" (ours too, its steps alone), "peer" or "naive"."""

    side: str
    config: Config

    @property
    def name(self) -> str:
        """As it is called in tables."""
        if self.side in ("ours", "reference"):
            return self.config.name
        other = "transformers + PEFT" if self.config.lora_rank else "transformers"
        return f"{'naive ' * (self.side == 'naive')}{other}: {self.config.name.removesuffix('_cached')}"  # has no cache


BUILT: list[tuple[Actions, list[nn.Parameter]]] = []  # in a worker: the method that it was started for


def work(method: Method, action: str, arguments: argparse.Namespace) -> dict:
    """In a process of its own: build the method for its first action, then do what is asked for."""
    if not BUILT:
        BUILT.append(set_up(method, action, arguments))
    actions, parameters = BUILT[0]
    device = hardware.pick_device(arguments.device)
    start = time.perf_counter()
    actions[action]()
    speed.synchronize(device)
    seconds = max(time.perf_counter() - start, 1e-3)  # a coarse clock may say 0
    held = [p for p in parameters if not p.is_meta]
    trained = sum(p.numel() for p in held if p.requires_grad)
    floor = sum(p.numel() * p.element_size() for p in held) + 12 * trained  # gradient and two moments, fp32
    peak = hardware.peak_memory(device)
    return {"seconds": seconds, "peak_memory_bytes": peak, "trainable_parameters": trained, "floor_bytes": floor}


def set_up(method: Method, phase: str, arguments: argparse.Namespace) -> tuple[Actions, list[nn.Parameter]]:
    """As `ours` and `peer`; warnings and notes go nowhere, as they would end up between the bars."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.linear != "auto":  # else matrix products on a CPU are computed by what fits it
        fast.Kernels.onednn = fast.PRODUCTS if arguments.linear == "onednn" and fast.ONEDNN else ()
    folder = Path(arguments.folder)
    paths = [str(folder / f"{number}.wav") for number in range(arguments.turns)]
    if method.side in ("ours", "reference"):
        return ours(method.config, phase, folder, paths)
    return peer(method.config, phase, method.side == "naive", paths)


# --- measuring -------------------------------------------------------------------------------------------------------


Job = tuple[str, Method]  # "build", "infer" or "step"; and "read", a step's reading of the cache alone


def measure(jobs: Sequence[Job], arguments: argparse.Namespace) -> dict[Job, list[dict]]:
    """Answers by job: processes start one after the other, then take turns. Raises ValueError, naming the method."""
    answers: dict[Job, list[dict]] = {job: [] for job in jobs}
    spawn = multiprocessing.get_context("spawn")
    bar = tqdm(list(itertools.product(range(speed.WARM_UP + arguments.rounds), jobs)), disable=None)
    with ExitStack() as stack:
        workers = {job: stack.enter_context(ProcessPoolExecutor(1, spawn)) for job in jobs}  # start when first asked
        for _, (action, method) in bar:
            start = time.perf_counter()
            bar.set_description(f"{action} {method.name}")
            worker = workers["step" if action == "read" else action, method]
            try:
                answer = worker.submit(work, method, action, arguments).result()
            except Exception as error:  # an error in the process, or its end: BrokenProcessPool
                raise ValueError(f"{method.name} failed at {action!r}: {type(error).__name__}: {error}") from None
            answer["waited"] = time.perf_counter() - start  # the first time for its start as well
            answers[action, method].append(answer)
    return answers


def make_groups(configs: Sequence[Config], with_peer: bool, with_naive: bool = False) -> list[list[Method]]:
    """What is measured in turn: configs that train the same, peers that do, and our full finetuning as reference."""
    groups: dict[str, list[Config]] = {}
    for c in configs:
        same = (c.trainable_layers, c.lora_rank, c.lora_rank and (c.lora_targets, c.lora_layers))
        groups.setdefault(str(same), []).append(c)
    references = [config for config in configs if config.name == "full"][:1]
    listed = []
    for group in groups.values():
        listed.append([Method("reference", config) for config in references if config not in group])
        listed[-1] += [Method("ours", config) for config in group]
        listed[-1] += [Method("peer", group[0])] * with_peer + [Method("naive", group[0])] * with_naive
    return listed


def measure_group(group: Sequence[Method], arguments: argparse.Namespace, architecture: Wav2Vec2Config) -> list[dict]:
    """A record for each method of a group: what was measured, and how many operations it needs."""
    cached = [method for method in group if method.config.cache and method.side == "ours"]
    jobs = [("build", method) for method in cached]
    jobs += [("infer", method) for method in group if method.side in ("ours", "peer")]
    steps = [("step", method) for method in group] + [("read", method) for method in cached]
    answers = measure(jobs, arguments) | measure(steps, arguments)
    samples = [len(turn) for turn in speed.make_turns(arguments.turns, arguments.lengths)]
    records = []
    for method in group:
        record = {"name": method.name, "side": method.side, "config": method.config.name, "cached": method in cached}
        for phase in ("step", "read", "build", "infer"):
            found = answers.get((phase, method))
            record[phase] = found and speed.summarise(found)
        first = answers["step", method][0]
        record |= {key: first[key] for key in ("trainable_parameters", "floor_bytes")}
        record["first_step_seconds"] = first["waited"]  # since the process was started
        record["startup_seconds"] = first["waited"] - record["step"]["seconds"]  # imports, loading, preparing
        build = record["build"]["seconds"] if record["build"] else 0.0
        record["epochs_seconds"] = build + arguments.epochs * record["step"]["seconds"]
        with torch.device("meta"):
            model = run.assemble(method.config, Wav2Vec2(architecture), LABEL_RANGE)
        record["operations"] = speed.operations(model, samples, record["cached"])
        records.append(record)
    return records


def main() -> None:
    arguments = parse_arguments()
    if arguments.table:
        return print(speed.tables(speed.read_result(Path(arguments.table))))
    arguments.peer |= arguments.naive
    versions = speed.versions()
    if missing := [name for name in ("transformers", "peft") if arguments.peer and not versions[name]]:
        raise ValueError(f"--peer: {', '.join(missing)} not installed; pip install -r requirements-dev.txt has both")
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: {out.parent} is no directory")
    device, dtype = hardware.pick_device(arguments.device), hardware.DTYPES[arguments.precision]
    torch.set_num_threads(arguments.threads)
    options = {key: getattr(arguments, key) for key in ("turns", "lengths", "rounds", "epochs", "precision", "threads")}
    options |= {"device": str(device), "peer": arguments.peer, "configs": [path.stem for path in arguments.configs]}
    options["backbone"] = arguments.backbone or "random weights of wav2vec2-base"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments.folder, backbone = folder, arguments.backbone or f"{folder}/backbone"
        same = {"backbone": backbone, "device": arguments.device, "precision": arguments.precision}
        configs = [replace(load_config(path), name=path.stem, **same) for path in arguments.configs]
        if arguments.backbone is None:
            save_backbone(Wav2Vec2(Wav2Vec2Config()), backbone)
        architecture = weights.load_backbone(backbone).config
        turns = speed.make_turns(arguments.turns, arguments.lengths)
        for number, turn in enumerate(turns):
            soundfile.write(f"{folder}/{number}.wav", turn, speed.RATE)
        seconds = [len(turn) / speed.RATE for turn in turns]
        rates = [speed.matmul_rate(device, dtype)]
        groups = make_groups(configs, arguments.peer, arguments.naive)
        measured = [measure_group(group, arguments, architecture) for group in groups]
        measured.sort(key=lambda group: -group[-1]["trainable_parameters"])  # full finetuning first
        rates.append(speed.matmul_rate(device, dtype))  # again: the machine may be quieter now
    for record in itertools.chain(*measured):
        for phase in filter(record.get, ("step", "build", "infer")):
            bound = record["operations"][phase] / max(rates)
            record[phase] |= {"bound_seconds": bound, "share": bound / record[phase]["seconds"]}
    machine = f"{hardware.device_name(device)}, {fast.Kernels.describe(device)}"
    result = {"machine": machine, "versions": versions, "options": options}
    result |= {"warm_up": speed.WARM_UP, "matmul_flops": max(rates), "matmul_flops_measured": rates}
    result |= {"audio_seconds": sum(seconds), "padded_seconds": max(seconds) * len(seconds), "groups": measured}
    hardware.write_text(out, json.dumps(result, indent=2) + "\n")
    print(f"{speed.tables(result)}\n\n{out}{speed.draw(result, out.with_suffix(''))}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `backbone` is for tests."""
    parser = argparse.ArgumentParser(description="Speed and memory of every method, side by side.")
    parser.add_argument("--peer", action="store_true", help="transformers + PEFT as well (both must be installed)")
    parser.add_argument("--naive", action="store_true", help="and as it is often copied: much slower, and 10 GB")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, type=Path, help="default: all but those for AMP")
    parser.add_argument("--turns", type=int, default=8, help="utterances in the batch")
    parser.add_argument("--lengths", choices=("mixed", "equal"), default="mixed", help="2.75 to 11 s, or 5.7 s each")
    parser.add_argument("--rounds", type=int, default=5, help=f"that count, after {speed.WARM_UP} of warm-up")
    parser.add_argument("--epochs", type=int, default=10, help="in the time of a training run, cache included")
    parser.add_argument("--precision", default="fp32", choices=hardware.DTYPES, help="of every method")
    parser.add_argument("--linear", choices=("auto", "pytorch", "onednn"), default="auto", help="products on a CPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--out", default="bench.json", help="JSON; the picture has the same name and ends in .png")
    parser.add_argument("--table", metavar="FILE.json", help="print the tables of an earlier run, measure nothing")
    parser.add_argument("--backbone", help=argparse.SUPPRESS)  # a Hugging Face directory; None: random wav2vec2-base
    arguments = parser.parse_args()
    for key, low in {"turns": 2, "rounds": 1, "epochs": 1, "threads": 1}.items():
        if (found := getattr(arguments, key)) < low:
            parser.error(f"argument --{key}: expected at least {low}, found {found}")
    return arguments


if __name__ == "__main__":
    command(main, "stopped; nothing is written")
