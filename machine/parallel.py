"""Several processes that train as one: `torchrun --nproc_per_node=2 train.py configs/full.yaml`.

Each holds the model and computes every size-th utterance of each batch. What travels: the predictions, since CCC is a
statistic of the whole batch, and the gradients of what trains. Rows travel as a sum over processes, with zeros in place
of the others' rows, so shares may differ in size. On GPUs tensors travel by NCCL; those on the CPU, and all words
between processes, by gloo. A process alone has `machine.hardware.Alone` instead.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Item = TypeVar("Item")


def start() -> None:
    """Join the others, if torchrun started this process."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        gpus = torch.cuda.is_available() and dist.is_nccl_available()  # no build for Windows has NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")


def finish() -> None:
    """Part from the others at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one; 0 is the one that prints and writes."""
    return dist.get_rank() if size() > 1 else 0


def name() -> str:
    """Before a message: which process has it to say."""
    return f"process {rank()} of {size()}: " if size() > 1 else ""


def local_rank() -> int | None:
    """Its number on this machine, which is that of its GPU; None for a process alone."""
    return int(os.environ["LOCAL_RANK"]) if size() > 1 else None


@contextmanager
def connected() -> Iterator[None]:
    """Raise ConnectionError where a collective operation fails, because another process is no more."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in str(error):  # of this process: NCCL, too, allocates on the GPU
            raise
        reason = str(error).split("] ", 1)[-1].split(". ")[0]  # without PyTorch's own file and line
        raise ConnectionError(f"another process of this run has ended, its message tells why ({reason})") from None


def share(items: Sequence[Item]) -> Sequence[Item]:
    """What of a batch this process computes: every size-th; if that is nothing the first, which `gather` leaves out."""
    return items[rank() :: size()] or items[:1]


def gather(rows: Tensor, count: int) -> Tensor:
    """The rows `(count, K)` of a whole batch, of which each process has those of its `share`, with gradient."""
    whole = rows.new_zeros(count, *rows.shape[1:])
    own = whole[rank() :: size()]
    own.copy_(rows.detach()[: len(own)])
    with connected():
        dist.all_reduce(whole)
    whole[rank() :: size()] = rows[: len(own)]
    return whole


def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum every gradient over the processes. A parameter that has none in any of them is left without."""
    there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    with connected():
        dist.all_reduce(there)
        used = [parameter for parameter, count in zip(parameters, there.tolist(), strict=True) if count]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
        dist.all_reduce(flat)
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad = part.view_as(parameter)


def even(batch: Sequence[int], cost: Sequence[float]) -> Sequence[int]:
    """The batch in an order that gives every process a share of about the same cost."""
    return sorted(batch, key=cost.__getitem__) if size() > 1 else batch


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    value = torch.tensor(float(flag))
    with connected():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item() > 0


def wait() -> None:
    """Wait until all processes are here."""
    any_of(False)


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process do what is within, then the others: it leaves files that they find."""
    if rank() > 0:
        wait()
    yield
    if rank() == 0:
        wait()


def require_same(**values: object) -> None:
    """Raise ValueError if a process has other values than the first: they would train something else together."""
    others: list[dict] = [{}] * size()
    with connected():
        dist.all_gather_object(others, values)
    for number, other in enumerate(others):
        for key in values:
            if other[key] != others[0][key]:
                found = f"{others[0][key]!r} in process 0 and {other[key]!r} in process {number}"
                raise ValueError(f"{key}: {found}; all need the same files, and output_dir on a disk that they share")
