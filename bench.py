"""Speed and memory of every method, side by side, and beside transformers + PEFT doing the same.

    python bench.py [--peer] [--naive] [--turns 8] [--rounds 5] [--out bench.json]   measure: tables, JSON, a picture
    python bench.py --table bench.json                                               the tables again, from the JSON

Every method runs in processes of its own, on the same audio files and the same checkpoint on disk (random weights:
times do not depend on them). Methods that are compared take turns, so that they see the same machine: first computing
caches and predictions, then, in new processes, training steps. A step of a cached method reads a cache that was filled
before, as from the second epoch on; its process never holds the prefix's weights. Ours run the very code of a training
run: `run.build_model`, `frozen.Prefix`, `train.step`, `train.evaluate`.

Each method has a peer, in turn with it: transformers (and PEFT) set up as well as they can be, with nothing trained,
drawn or back-propagated that ours does not, sdpa, fused AdamW. The *naive* peer (`--naive`) is what is often copied:
`requires_grad = False` alone, every default.

Where the two sides differ: a peer's training steps take the waveforms from memory, ours read files or the cache, and
with one batch alone nothing is read ahead as it is in training; a peer's start imports modules of ours that it could do
without, some tenths of a second.
"""

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import frozen
import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import freeze
import lora
import run
import weights
from config import Config, load_config
from machine import hardware
from machine.fast import linear
from model import FIELD, HOP, EmotionModel, Wav2Vec2, Wav2Vec2Config

WARM_UP = 2  # of everything that is measured; reported, and not in the medians
LEFT_OUT = ("full_amp", "partial3_amp", "full_microbatches", "logmel")  # on request, but the baseline never
CONFIGS = [path for path in sorted(Path(__file__).parent.glob("configs/*.yaml")) if path.stem not in LEFT_OUT]
LABEL_RANGE = (1.0, 7.0)
RATE = 16_000  # Hz
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}  # as transformers names them
PROJECTIONS |= {"fc1": "intermediate_dense", "fc2": "output_dense"}
Actions = dict[str, Callable[[], object]]


def make_turns(count: int, lengths: str = "mixed", seed: int = 0) -> list[np.ndarray]:
    """Waveforms `(S,)` at 16 kHz filled with noise, 5.7 s each; "mixed": of 2.75 to 11 s as in MSP-Podcast."""
    random = np.random.default_rng(seed)
    seconds = 2.75 + 8.25 * random.beta(1.1, 1.97, size=count) if lengths == "mixed" else np.full(count, 5.7)
    return [0.1 * random.standard_normal(int(s * RATE)).astype("f4") for s in seconds]


# --- how many operations a method needs ------------------------------------------------------------------------------


def operations(model: EmotionModel, samples: Sequence[int], cached: bool = False) -> dict[str, int]:
    """Floating-point operations for waveforms of these lengths: of a training "step", of "build", of "infer".

    Matrix products and convolutions, a multiply-add is two; without the head. Backward, a product costs its forward
    once for its weight if that trains and once for its input if something before it trains; attention twice. What
    gradient checkpointing computes again is no part of the method.
    """
    backbone, depth = model.backbone, freeze.prefix_depth(model)
    frames = [(count - FIELD) // HOP + 1 for count in samples]
    parts = [(features(backbone, samples), 0), embedding(backbone, sum(frames))]
    parts += [layer(backbone.layers[i], frames, first=i == depth) for i in range(len(backbone.layers))]
    forward = [part[0] for part in parts]
    split = min(depth, len(backbone.layers)) + 2  # parts of the prefix: hidden state -1 comes after the first
    training = sum(sum(part) for part in parts[split:])
    before = sum(forward[:split])
    return {"step": training + (0 if cached else before), "build": before, "infer": sum(forward)}


def features(backbone: Wav2Vec2, samples: Sequence[int]) -> int:
    c, total = backbone.config, 0
    for conv, kernel, stride in zip(backbone.feature_encoder.convs, c.conv_kernels, c.conv_strides, strict=True):
        samples = [(count - kernel) // stride + 1 for count in samples]
        total += 2 * sum(samples) * conv.weight.numel()
    return total


def embedding(backbone: Wav2Vec2, rows: int) -> tuple[int, int]:
    """Forward and backward of projection and positional convolution, over which a norm trains if they do."""
    forward = 2 * rows * (backbone.projection.linear.weight.numel() + backbone.position.conv.weight.numel())
    return forward, 2 * forward


def layer(module: nn.Module, frames: Sequence[int], first: bool) -> tuple[int, int]:
    """Forward and backward of a transformer layer; the `first` that trains owes its input no gradient."""
    rows, forward, backward = sum(frames), 0, 0
    first = first and not (module.pre_norm and module.attention_norm.weight.requires_grad)
    for name, child in module.named_modules():
        to_input = not (first and name.startswith(("attention.q", "attention.k", "attention.v")))
        if isinstance(child, nn.Linear):
            product = 2 * rows * child.weight.numel()
            forward += product
            backward += product * (child.weight.requires_grad + to_input)
        elif isinstance(child, lora.LoRALinear):
            down, up = 2 * rows * child.A.numel(), 2 * rows * child.B.numel()
            forward += down + up
            backward += down * (1 + to_input) + 2 * up
    attention = 4 * sum(count**2 for count in frames) * module.attention_norm.weight.numel()
    return forward + attention, backward + 2 * attention


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of this machine's matrix products: the fastest of a few shapes and libraries."""
    best = 0.0
    rows = 2048 if device.type == "cpu" else 65536
    for inputs, outputs in ((768, 3072), (3072, 768)):
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        for product in (F.linear, linear):
            seconds = []
            for _ in range(WARM_UP + 5):
                start = time.perf_counter()
                product(x, weight)
                hardware.synchronize(device)
                seconds.append(time.perf_counter() - start)
            best = max(best, 2 * rows * inputs * outputs / statistics.median(seconds[WARM_UP:]))
    return best


def ours(config: Config, phase: str, folder: Path, paths: list[str]) -> tuple[Actions, list[nn.Parameter]]:
    """What a worker of ours answers to in a phase, and its parameters: all in the order in which train.py does it."""
    import train

    device, numbers, counter = hardware.pick_device(config.device), range(len(paths)), itertools.count()
    model, identity = run.build_model(config, LABEL_RANGE)
    prefix = frozen.Prefix(model, paths, device, config.precision)

    def open_cache(number: int) -> None:
        prefix.open_cache(str(folder / f"cache-{config.name}" / str(number)), config.cache_dtype, identity)

    if phase == "step" and config.cache:
        open_cache(0)
        if not prefix.cache.has(numbers):
            raise ValueError(f"{prefix.cache.directory}: is not whole, expected what `build` left")
        prefix.drop_if_cached()
    hardware.prepare(model, device, config.precision, config.tf32, config.compile and phase == "step")

    def build() -> None:
        open_cache(next(counter))  # a new one each time
        for _ in prefix([numbers]):
            pass
        prefix.cache.close()

    def infer() -> None:
        train.evaluate(model, prefix, numbers, len(paths))

    if phase != "step":
        return {"build": build, "infer": infer}, list(model.parameters())
    optimizer = train.make_optimizer(model, config.lr, config.head_lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    labels = torch.rand(len(paths), len(config.targets), device=device)
    freeze.train_mode(model, prefix.depth)

    def step() -> None:
        for _, x, lengths in prefix([numbers]):
            options = (scaler, prefix.dtype, config.clip, config.micro_batch_size)
            train.step(model, x, lengths, labels, prefix.depth, optimizer, *options)

    def read() -> None:
        packed, _ = prefix.load(numbers)
        packed.to(device).float()

    return {"step": step, "read": read}, list(model.parameters())


def peer(config: Config, phase: str, naive: bool, paths: list[str]) -> tuple[Actions, list[nn.Parameter]]:
    """The same in transformers and PEFT: what a worker answers to in a phase, and its parameters."""
    sys.modules["torchaudio"] = None  # beside a CPU build of torch it breaks the import of transformers
    from transformers import Wav2Vec2FeatureExtractor

    from metrics import ccc_loss

    device, dtype = hardware.pick_device(config.device), hardware.DTYPES[config.precision]
    model, base = (naive_model if naive else peer_model)(config)
    width, targets = base.config.hidden_size, len(config.targets)
    head = nn.Sequential(nn.Linear(width, config.head_width), nn.GELU(), nn.Linear(config.head_width, targets))
    model.to(device).train(phase == "step")
    parameters = [*model.parameters(), *head.to(device).parameters()]
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(config.backbone)

    def load() -> dict[str, torch.Tensor]:
        waveforms = [soundfile.read(path, dtype="float32")[0] for path in paths]
        mask = {"padding": True, "return_attention_mask": True, "return_tensors": "pt"}
        return extractor(waveforms, sampling_rate=RATE, **mask).to(device)

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


def peer_model(config: Config) -> tuple[nn.Module, nn.Module]:
    """A transformers model set up as well as it can be for what `config` trains, and itself without PEFT around it."""
    from transformers import Wav2Vec2Model

    same = {"feat_proj_dropout": config.projection_dropout, "layerdrop": config.layer_drop}
    for key in ("hidden_dropout", "attention_dropout", "activation_dropout", "mask_time_prob", "mask_feature_prob"):
        same[key] = getattr(config, key)
    base = Wav2Vec2Model.from_pretrained(config.backbone, attn_implementation="sdpa", **same)
    layers, adapted = chosen_layers(config, len(base.encoder.layers))
    base.requires_grad_(config.trainable_layers == "all")
    base.freeze_feature_encoder()  # without it training mode switches gradients on for the CNN's input
    model = base
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = {"target_modules": [PROJECTIONS[name] for name in config.lora_targets]}
        targets |= {"layers_to_transform": adapted, "lora_dropout": config.lora_dropout}
        model = get_peft_model(base, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, **targets))
    for number in layers:
        base.encoder.layers[number].requires_grad_(True)
    if layers and base.config.do_stable_layer_norm:
        base.encoder.layer_norm.requires_grad_(True)
    return model, base


def naive_model(config: Config) -> tuple[nn.Module, nn.Module]:
    """The same as it is often copied: nothing but `requires_grad` set, and the defaults of transformers and PEFT."""
    from transformers import Wav2Vec2Model

    base = Wav2Vec2Model.from_pretrained(config.backbone)
    layers, adapted = chosen_layers(config, len(base.encoder.layers))
    if config.lora_rank:
        from peft import LoraConfig, get_peft_model

        where = {} if config.lora_layers is None else {"layers_to_transform": adapted}
        targets = [PROJECTIONS[name] for name in config.lora_targets]
        return get_peft_model(base, LoraConfig(r=config.lora_rank, target_modules=targets, **where)), base
    if config.trainable_layers != "all":
        for parameter in base.parameters():
            parameter.requires_grad = False
        for number in layers:
            for parameter in base.encoder.layers[number].parameters():
                parameter.requires_grad = True
    return base, base


def chosen_layers(config: Config, count: int) -> tuple[list[int], list[int]]:
    """The numbers of the layers that train whole, and of those with LoRA, as `run.assemble` chooses them."""
    trained = freeze.layer_numbers(config.trainable_layers, count)
    if config.lora_layers is None:
        return trained, [number for number in range(count) if number not in trained]
    return trained, freeze.layer_numbers(config.lora_layers, count, "lora_layers")


def work(arguments: argparse.Namespace) -> None:
    """A worker: builds one method for one phase, then does what each line that it reads asks for, and answers."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may be said where the answers go
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    phase, side, path = arguments.worker.split(":", 2)
    config, folder = configure(path, arguments), Path(arguments.folder)
    paths = [str(folder / f"{number}.wav") for number in range(arguments.turns)]
    if side in ("ours", "reference"):
        actions, parameters = ours(config, phase, folder, paths)
    else:
        actions, parameters = peer(config, phase, side == "naive", paths)
    held = [p for p in parameters if not p.is_meta]
    trained = sum(p.numel() for p in held if p.requires_grad)
    floor = sum(p.numel() * p.element_size() for p in held) + 12 * trained  # gradient and two moments, fp32
    device = hardware.pick_device(config.device)
    for line in sys.stdin:
        start = time.perf_counter()
        actions[line.strip()]()
        hardware.synchronize(device)
        figures = {"seconds": time.perf_counter() - start, "peak_memory_bytes": hardware.peak_memory(device)}
        figures |= {"trainable_parameters": trained, "floor_bytes": floor}
        print(json.dumps(figures), file=answers, flush=True)


def configure(path: str | Path, arguments: argparse.Namespace) -> Config:
    """A config as the options want it."""
    same = {"backbone": arguments.backbone, "device": arguments.device, "precision": arguments.precision}
    return replace(load_config(path), **same)


class Worker:
    """The process that runs `phase:side:config`. `ask` raises ValueError with its last lines if it has failed."""

    def __init__(self, job: str, arguments: argparse.Namespace):
        keys = ("turns", "threads", "precision", "device", "backbone", "folder")
        command = [sys.executable, __file__, f"--worker={job}", *(f"--{key}={getattr(arguments, key)}" for key in keys)]
        self.job, self.log = job, Path(arguments.folder) / f"{time.time_ns()}.log"
        self.began = time.perf_counter()
        with open(self.log, "wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": None if arguments.verbose else log}
            self.process = subprocess.Popen(command, text=True, **pipes)

    def ask(self, command: str) -> dict:
        """Have something done; seconds of it, seconds since the process was started, and the peak of its memory."""
        answer = ""
        try:
            print(command, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except OSError:  # it is gone
            pass
        if not answer:
            code, said = self.process.wait(), self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            last_lines = "".join(f"\n    {line}" for line in said[-8:])
            raise ValueError(f"{name_of(self.job)} failed at {command!r} (exit code {code}){last_lines}")
        return {**json.loads(answer), "since_start": time.perf_counter() - self.began}

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(jobs: Sequence[str], arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """Answers by job, `phase:side:config`: all are started, one after the other, and then take turns."""
    workers: dict[str, Worker] = {}
    answers: dict[str, list[dict]] = {}
    bar = tqdm(total=len(jobs) * (WARM_UP + arguments.rounds), disable=None)
    try:
        for number in range(WARM_UP + arguments.rounds):
            for job in jobs:
                bar.set_description(f"{job.split(':')[0]} {name_of(job)}")
                if number == 0:
                    workers[job] = Worker(job, arguments)
                answers.setdefault(job, []).append(workers[job].ask(job.split(":")[0]))
                bar.update()
        for job in jobs:
            if job.startswith("step:ours:") and load_config(job.split(":", 2)[2]).cache:
                reading = [workers[job].ask("read") for _ in range(WARM_UP + arguments.rounds)]
                answers[job.replace("step:", "read:", 1)] = reading
        return answers
    finally:
        bar.close()
        for worker in workers.values():
            worker.stop()


def summarise(answers: Sequence[dict]) -> dict:
    """Median and spread after the warm-up, and the peak of the process's memory."""
    seconds = [answer["seconds"] for answer in answers]
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "seconds_min": min(seconds[WARM_UP:]),
        "seconds_max": max(seconds[WARM_UP:]),
        "warm_up_seconds": seconds[:WARM_UP],
        "peak_memory_bytes": answers[-1]["peak_memory_bytes"],
    }


def name_of(job: str) -> str:
    """How a job's method is called in tables: a config by its file's name."""
    _, side, path = job.split(":", 2)
    other = "transformers + PEFT" if load_config(path).lora_rank else "transformers"
    if side in ("ours", "reference"):
        return Path(path).stem
    return f"{'naive ' * (side == 'naive')}{other}: {Path(path).stem.removesuffix('_cached')}"  # theirs has no cache


def make_groups(configs: Sequence[Path], with_peer: bool, with_naive: bool = False) -> list[list[str]]:
    """What is measured in turn, as `side:config`: configs that train the same, the peers that do so as well, and our
    full finetuning as the reference (`reference:config`: its steps alone).
    """
    groups: dict[str, list[str]] = {}
    for path in configs:
        c = load_config(path)
        same = (c.trainable_layers, c.lora_rank, c.lora_rank and (c.lora_targets, c.lora_layers))
        groups.setdefault(str(same), []).append(f"ours:{path}")
    references = [f"ours:{path}" for path in configs if path.stem == "full"][:1]
    listed = []
    for group in groups.values():
        config = group[0].partition(":")[2]
        peers = [f"peer:{config}"] * with_peer + [f"naive:{config}"] * with_naive
        reference = [method.replace("ours", "reference", 1) for method in references if method not in group]
        listed.append(reference + group + peers)
    return listed


def measure_group(group: Sequence[str], arguments: argparse.Namespace, architecture: Wav2Vec2Config) -> list[dict]:
    """A record for each method of a group: what was measured, and how many operations it needs."""
    configs = {method: configure(method.partition(":")[2], arguments) for method in group}
    jobs = [f"build:{method}" for method, config in configs.items() if config.cache and method.startswith("ours:")]
    jobs += [f"infer:{method}" for method in group if method.startswith(("ours:", "peer:"))]
    answers = measure(jobs, arguments) | measure([f"step:{method}" for method in group], arguments)
    samples = [len(turn) for turn in make_turns(arguments.turns, arguments.lengths)]
    records = []
    for method, config in configs.items():
        side, path = method.split(":", 1)
        record = {"name": name_of(f"step:{method}"), "side": side, "config": Path(path).stem}
        record["cached"] = side in ("ours", "reference") and config.cache
        for phase in ("step", "read", "build", "infer"):
            found = answers.get(f"{phase}:{method}")
            record[phase] = found and summarise(found)
        first = answers[f"step:{method}"][0]
        record |= {key: first[key] for key in ("trainable_parameters", "floor_bytes")}
        record["first_step_seconds"] = first["since_start"]  # since the process was started
        record["startup_seconds"] = first["since_start"] - record["step"]["seconds"]  # imports, loading, preparing
        build = record["build"]["seconds"] if record["cached"] else 0.0
        record["epochs_seconds"] = build + arguments.epochs * record["step"]["seconds"]
        with torch.device("meta"):
            model = run.assemble(config, Wav2Vec2(architecture), LABEL_RANGE)
        record["operations"] = operations(model, samples, record["cached"])
        records.append(record)
    return records


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        return work(arguments)
    if arguments.table:
        return print(tables(read_result(Path(arguments.table))))
    arguments.peer |= arguments.naive
    wanted = ("transformers", "peft") if arguments.peer else ()
    if missing := [name for name in wanted if not importlib.util.find_spec(name)]:
        raise ValueError(f"--peer: {', '.join(missing)} not installed; pip install -r requirements-dev.txt has both")
    out = Path(arguments.out)
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: {out.parent} is no directory")
    device = hardware.pick_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    options = {key: getattr(arguments, key) for key in ("turns", "lengths", "rounds", "epochs", "precision", "threads")}
    options |= {"device": str(device), "peer": arguments.peer, "configs": [path.stem for path in arguments.configs]}
    options["backbone"] = arguments.backbone or "random weights of wav2vec2-base"
    groups = make_groups(
        arguments.configs, arguments.peer, arguments.naive
    )  # reads the configs: an error in one comes before the hours
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        arguments.folder = folder
        if arguments.backbone is None:
            arguments.backbone = f"{folder}/backbone"
            weights.save_backbone(weights.random_backbone(Wav2Vec2Config()), arguments.backbone)
        architecture = weights.load_backbone(arguments.backbone).config
        turns = make_turns(arguments.turns, arguments.lengths)
        for number, turn in enumerate(turns):
            soundfile.write(f"{folder}/{number}.wav", turn, RATE)
        seconds = [len(turn) / RATE for turn in turns]
        rates = [matmul_rate(device, hardware.DTYPES[arguments.precision])]
        measured = [measure_group(group, arguments, architecture) for group in groups]
        measured.sort(key=lambda group: -group[-1]["trainable_parameters"])  # full finetuning first
        rates.append(matmul_rate(device, hardware.DTYPES[arguments.precision]))  # again: the machine may be quieter now
    for record in itertools.chain(*measured):
        for phase in filter(record.get, ("step", "build", "infer")):
            bound = record["operations"][phase] / max(rates)
            record[phase] |= {"bound_seconds": bound, "share": bound / record[phase]["seconds"]}
    result = {"machine": hardware.device_name(device), "versions": versions(), "options": options}
    result |= {"warm_up": WARM_UP, "matmul_flops": max(rates), "matmul_flops_measured": rates}
    result |= {"audio_seconds": sum(seconds), "padded_seconds": max(seconds) * len(seconds), "groups": measured}
    hardware.write_text(out, json.dumps(result, indent=2) + "\n")
    print(f"{tables(result)}\n\n{out}{draw(result, out.with_suffix('.png'))}")


def at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, found {text}")
        return int(text)

    return number


def parse_arguments() -> argparse.Namespace:
    """The command line; `backbone`, `worker` and `folder` are for workers and tests."""
    parser = argparse.ArgumentParser(description="Speed and memory of every method, side by side.")
    parser.add_argument("--peer", action="store_true", help="transformers + PEFT as well (both must be installed)")
    parser.add_argument("--naive", action="store_true", help="and as it is often copied: much slower, and 10 GB")
    parser.add_argument("--configs", nargs="+", default=CONFIGS, type=Path, help="default: all but those for AMP")
    parser.add_argument("--turns", type=at_least(2), default=8, help="utterances in the batch")
    parser.add_argument("--lengths", choices=("mixed", "equal"), default="mixed", help="2.75 to 11 s, or 5.7 s each")
    parser.add_argument("--rounds", type=at_least(1), default=5, help=f"that count, after {WARM_UP} of warm-up")
    parser.add_argument("--epochs", type=at_least(1), default=10, help="in the time of a training run, cache included")
    parser.add_argument("--precision", default="fp32", choices=hardware.DTYPES, help="of every method")
    parser.add_argument("--threads", type=at_least(1), default=torch.get_num_threads())
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.add_argument("--out", default="bench.json", help="JSON; the picture has the same name and ends in .png")
    parser.add_argument("--table", metavar="FILE.json", help="print the tables of an earlier run, measure nothing")
    parser.add_argument("--verbose", action="store_true", help="show what the processes say")
    parser.add_argument("--backbone", help=argparse.SUPPRESS)  # a Hugging Face directory; None: random wav2vec2-base
    for hidden in ("--worker", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser.parse_args()


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


# --- showing ---------------------------------------------------------------------------------------------------------


def read_result(path: Path) -> dict:
    """What a run wrote. Raises OSError, or ValueError for another file."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: is not JSON; expected what bench.py wrote with --out") from None
    if not isinstance(result, dict) or "groups" not in result:
        raise ValueError(f"{path}: has no `groups`; expected what bench.py wrote with --out")
    return result


def tables(result: dict) -> str:
    """Markdown: what was measured in a paragraph, a table of training steps, and one of all else."""
    options, found = result["options"], result["versions"]
    lines = [
        f"{result['machine']}, {options['precision']}, PyTorch {found['torch']}; {options['turns']} turns of "
        f"{options['lengths']} length, {result['audio_seconds']:.1f} s of audio ({result['padded_seconds']:.1f} s if "
        f"padded). Medians of {options['rounds']} rounds, methods in turn, after {result['warm_up']} of warm-up. The "
        f"machine multiplies matrices at {result['matmul_flops'] / 1e9:,.0f} GFLOP/s, of which a method's share counts "
        "what it needs: nothing for padding, nor for gradients that nothing trains on."
    ]
    if options["peer"]:
        lines[0] += f" Peers: transformers {found['transformers']}, PEFT {found['peft']}."
    columns = ["method", "s a step (min to max)", "audio s/s", "vs our full", "vs peer"]
    columns += ["of the matmul rate", "peak memory", "vs peer", "trainable"]
    lines += ["", *rows(columns, [step_cells(*row, result["audio_seconds"]) for row in compared(result)])]
    columns = ["method", "to the first step (start-up)", "cache build", "reading the cache"]
    columns += [f"{options['epochs']} epochs on 1 h", "vs peer", "inference, audio s/s", "vs peer", "its peak memory"]
    text = (
        f"{options['epochs']} epochs on an hour of audio: that many steps and, where there is a cache, one build, from "
        "their medians; builds were measured before the steps, not in turn with them."
    )
    return "\n".join([*lines, "", text, "", *rows(columns, [other_cells(*row, result) for row in compared(result)])])


def compared(result: dict) -> list[tuple[dict, dict | None, dict | None]]:
    """Each method's record with those it was measured in turn with: our full finetuning, and its peer."""
    found = []
    for group in result["groups"]:
        full = next((r for r in group if r["side"] in ("ours", "reference") and r["config"] == "full"), None)
        other = next((r for r in group if r["side"] == "peer"), None)
        shown = [record for record in group if record["side"] != "reference"]
        found += [(record, full, other if record is not other else None) for record in shown]
    return found


def rows(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]


def step_cells(record: dict, full: dict | None, other: dict | None, audio_seconds: float) -> list[str]:
    step = record["step"]
    return [
        record["name"],
        f"{step['seconds']:.3g} ({step['seconds_min']:.3g} to {step['seconds_max']:.3g})",
        f"{audio_seconds / step['seconds']:.1f}",
        factor(full, record, "step"),
        factor(other, record, "step"),
        f"{step['share']:.0%}" if step["share"] else "",  # of the head alone nothing is counted
        f"{step['peak_memory_bytes'] / 1e9:.2f} GB",
        f"{step['peak_memory_bytes'] / other['step']['peak_memory_bytes']:.2f}" if other else "",
        f"{record['trainable_parameters'] / 1e6:.2f} M",
    ]


def other_cells(record: dict, full: dict | None, other: dict | None, result: dict) -> list[str]:
    build, read, infer = (record[phase] for phase in ("build", "read", "infer"))
    seconds = record["epochs_seconds"]
    return [
        record["name"],
        f"{record['first_step_seconds']:.1f} s ({record['startup_seconds']:.1f})",
        f"{build['seconds']:.3g} s" if build else "",
        f"{1000 * read['seconds']:.1f} ms" if read else "",
        f"{seconds / result['audio_seconds'] * 3600:.0f} s",
        f"{other['epochs_seconds'] / seconds:.2f}x" if other else "",
        f"{result['audio_seconds'] / infer['seconds']:.1f}" if infer else "",
        factor(other, record, "infer"),
        f"{infer['peak_memory_bytes'] / 1e9:.2f} GB" if infer else "",
    ]


def factor(base: dict | None, record: dict, phase: str) -> str:
    """How many times faster than `base`."""
    return f"{base[phase]['seconds'] / record[phase]['seconds']:.2f}x" if base and record[phase] else ""


def draw(result: dict, path: Path) -> str:
    """Bars of time and memory, a mark on each for what the method needs at least; returns what to say of the file."""
    try:
        import matplotlib
    except ImportError:
        return " (no picture: matplotlib is not installed)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record, *_ in compared(result)]
    starts = [r["side"] == "ours" != before["side"] for r, before in zip(records, records[-1:] + records, strict=False)]
    heights = [-y - 0.5 * gaps for y, gaps in enumerate(itertools.accumulate(starts))]  # a gap after each peer
    per_hour = 3600 / result["audio_seconds"]
    seconds = [(r["step"]["seconds"] * per_hour, r["step"]["bound_seconds"] * per_hour) for r in records]
    gigabytes = [(r["step"]["peak_memory_bytes"] / 1e9, r["floor_bytes"] / 1e9) for r in records]
    shades = {"ours": "#1b4965", "peer": "#6fa8c9", "naive": "#d3d9de"}  # a dark, a middle and a light grey as well
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 1 - 0.32 * heights[-1]), sharey=True, layout="constrained")
    for axis, values in zip(axes, (seconds, gigabytes), strict=True):
        for record, y, (value, least) in zip(records, heights, values, strict=True):
            axis.barh(y, value, height=0.8, color=shades[record["side"]])
            for color, width in (("white", 5), ("black", 2)):
                axis.plot([least, least], [y - 0.4, y + 0.4], color=color, linewidth=width, solid_capstyle="butt")
            label = f"{float(format(value, '.3g')):,g}"
            axis.annotate(label, (value, y), (5, 0), textcoords="offset points", va="center")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params("y", length=0)
        axis.margins(x=0.12, y=0.02)
    axes[0].set_xscale("log")
    positive = [value for pair in seconds for value in pair if value > 0]
    axes[0].set_xlim(0.5 * min(positive), 2.5 * max(positive))
    axes[0].xaxis.set_major_formatter("{x:,g}")
    axes[0].set_yticks(heights, [record["name"] for record in records])
    axes[0].set_title(
        "Seconds of training steps per hour of audio (logarithmic)\nmark: what is needed, at the matmul rate"
    )
    axes[1].set_title("Peak memory, GB\nmark: weights, gradients and Adam's moments alone")
    figure.savefig(path, dpi=120)
    return f", {path}"


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; nothing is written")
