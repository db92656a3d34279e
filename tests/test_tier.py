"""Every tier gives what the disk gives, and a batch on its way to a GPU is whole."""

import os

import pytest
import torch
from test_cache import activation, filled, open_cache, touch

from machine.tier import Staging, Tier, pick_tier

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ORDERS = [[5, 0, 8], [1], [8, 8, 2, 8], [7, 6, 5, 4, 3, 2, 1, 0], [0, 5], [3, 3]]


@pytest.mark.parametrize("name", ["ram", "gpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_every_tier_gives_what_the_disk_gives(tmp_path, name, dtype):
    """Bitwise, in any order, alone and repeated, the first time (from the disk) and the second (from memory)."""
    paths, _ = filled(tmp_path, 9, dtype)
    cache = open_cache(tmp_path, paths, dtype)
    disk, tier = Tier(cache, CPU), Tier(open_cache(tmp_path, paths, dtype), CPU, name)
    for numbers in ORDERS + ORDERS[::-1]:
        expected, lengths = cache.read(numbers)
        for read in (disk.read(numbers), tier.read(numbers)):
            assert torch.equal(read[0], expected)
            assert (read[0].dtype, read[1]) == (torch.float32 if dtype == torch.int8 else dtype, lengths)
    assert tier.held.dtype == dtype  # not what it is read as


def test_a_tier_in_memory_reads_each_activation_from_the_disk_once(tmp_path):
    """As it is first asked for: afterwards the files are not needed; what is handed out can be written to."""
    paths, directory = filled(tmp_path, 4)
    cache = open_cache(tmp_path, paths)
    tier = Tier(cache, CPU, "ram")
    tier.read([2, 0])[0].zero_()
    (shard,) = directory.glob("*.bin")
    os.truncate(shard, 0)
    assert torch.equal(tier.read([0, 2, 0])[0], torch.cat([activation(number) for number in (0, 2, 0)]))
    for _ in range(2):  # the second time too: a failed read leaves nothing behind
        with pytest.raises(ValueError, match=f"the activation of {paths[1]} is damaged"):
            tier.read([0, 1])
    assert torch.equal(tier.read([2])[0], activation(2))


def test_a_tier_that_memory_has_no_room_for_is_one_clear_error(tmp_path):
    """The key, the need and the way out."""
    cache = open_cache(tmp_path, touch(tmp_path, 300))
    cache.entries["frames"] = 2**31 - 1
    with pytest.raises(ValueError, match=r"cache_tier: ram has no room for 20615\.8 GB; set cache_tier: disk"):
        Tier(cache, CPU, "ram")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_auto_is_the_gpu_if_half_of_its_free_memory_has_room(tmp_path, monkeypatch, dtype):
    """Else the disk, as always on a CPU; a tier that is named is taken."""
    paths, directory = filled(tmp_path, 5, dtype)
    cache, cuda = open_cache(tmp_path, paths, dtype), torch.device("cuda", 1)
    (shard,) = directory.glob("*.bin")
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (free, 0))
    free = 2 * shard.stat().st_size
    assert pick_tier("auto", cache, cuda) == "gpu"
    free -= 1
    assert pick_tier("auto", cache, cuda) == "disk"
    assert asked == [cuda, cuda]
    assert pick_tier("auto", cache, CPU) == "disk"
    assert [pick_tier(name, cache, cuda) for name in ("disk", "ram", "gpu")] == ["disk", "ram", "gpu"]


def test_a_staging_buffer_is_filled_again_only_when_the_gpu_has_copied_it(monkeypatch):
    """Two in turn, each with the event of its own copy: recorded after it, waited for before the next is put there."""
    log = []

    class Event:
        def __init__(self):
            self.name = "ab"[len(events)]
            events.append(self)

        def synchronize(self) -> None:
            log.append(f"wait {self.name}")

        def record(self, stream: object) -> None:
            log.append(f"copied {self.name}")

    events: list[Event] = []
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **keys: empty(*size, **keys))
    staging = Staging(CPU)
    places = []

    def fill(buffer: torch.Tensor) -> None:
        log.append(f"fill {len(buffer)}")
        places.append(buffer.data_ptr())

    for size in (8, 4, 6, 4, 8, 16):
        assert len(staging.send(size, fill)) == size
    turns = ["wait b fill 8 copied b", "wait a fill 4 copied a", "wait b fill 6 copied b"]
    turns += ["wait a fill 4 copied a", "wait b fill 8 copied b", "wait a fill 16 copied a"]
    assert " ".join(log) == " ".join(turns)
    assert places[0] == places[2] == places[4] != places[1] == places[3]
    assert sorted(map(len, staging.buffers)) == [8, 16]  # of the largest batch so far


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["disk", "ram", "gpu"])
def test_every_tier_gives_a_gpu_what_the_disk_gives(tmp_path, name):
    """Also while the GPU is behind: a buffer that were filled too early would change a batch before."""
    paths, _ = filled(tmp_path, 9)
    cache, device = open_cache(tmp_path, paths), torch.device("cuda")
    tier = Tier(cache, device, name)
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        read = []
        for numbers in ORDERS:
            busy = busy @ busy / 64
            read.append(tier.read(numbers)[0])
        for numbers, packed in zip(ORDERS, read, strict=True):
            assert packed.device.type == "cuda"
            assert torch.equal(packed.cpu(), cache.read(numbers)[0])
