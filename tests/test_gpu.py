"""A cache kept on the GPU gives what the disk gives."""

import os

import pytest
import torch
from test_cache import activation, filled, open_cache, touch

from machine.gpu import OnGPU, pick

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ORDERS = [[5, 0, 8], [1], [8, 8, 2, 8], [7, 6, 5, 4, 3, 2, 1, 0], [0, 5], [3, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_it_gives_what_the_disk_gives(tmp_path, device, dtype):
    """Bitwise, in any order, alone and repeated, the first time (from the disk) and the second (from memory)."""
    paths, _ = filled(tmp_path, 9, dtype)
    disk, held = open_cache(tmp_path, paths, dtype), OnGPU(open_cache(tmp_path, paths, dtype), device)
    for numbers in ORDERS + ORDERS[::-1]:
        (expected, expected_lengths), (found, lengths) = disk.read(numbers, device), held.read(numbers)
        assert (found.device, found.dtype, lengths) == (expected.device, expected.dtype, expected_lengths)
        assert torch.equal(found, expected)
    assert held.held.dtype == dtype  # not what it is read as


def test_each_activation_is_read_from_the_disk_once(tmp_path):
    """As it is first asked for: afterwards the files are not needed; what is handed out can be written to."""
    paths, directory = filled(tmp_path, 4)
    held = OnGPU(open_cache(tmp_path, paths), CPU)
    held.read([2, 0])[0].zero_()
    (shard,) = directory.glob("*.bin")
    os.truncate(shard, 0)
    assert torch.equal(held.read([0, 2, 0])[0], torch.cat([activation(number) for number in (0, 2, 0)]))
    for _ in range(2):  # the second time too: a failed read leaves nothing behind
        with pytest.raises(ValueError, match=f"the activation of {paths[1]} is damaged"):
            held.read([0, 1])
    assert torch.equal(held.read([2])[0], activation(2))


def test_memory_without_room_is_one_clear_error(tmp_path):
    """The key, the need and the way out."""
    cache = open_cache(tmp_path, touch(tmp_path, 300))
    cache.entries["frames"] = 2**31 - 1
    with pytest.raises(ValueError, match=r"cache_tier: gpu has no room for 20615\.8 GB; set cache_tier: disk"):
        OnGPU(cache, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_auto_is_the_gpu_if_half_of_its_free_memory_has_room(tmp_path, monkeypatch, dtype):
    """Else the disk."""
    paths, directory = filled(tmp_path, 5, dtype)
    cache, cuda = open_cache(tmp_path, paths, dtype), torch.device("cuda", 1)
    (shard,) = directory.glob("*.bin")
    monkeypatch.setattr("machine.gpu.OnGPU", lambda cache, device: ("held", device))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    free = 2 * shard.stat().st_size
    assert pick("auto", cache, cuda) == ("held", cuda)
    free -= 1
    assert pick("auto", cache, cuda) is cache
    assert pick("gpu", cache, cuda) == ("held", cuda)
