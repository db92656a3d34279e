"""The paths of a GPU, which need none: PyTorch is made to believe in two, and tensors have type and device alone.

What is checked: devices, types, shapes, hidden waits for the GPU, FlashAttention only where it can run. No numbers.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def found(tmp_path_factory) -> dict[str, str | None]:
    """What is wrong with each case of `fake_cuda.py`, None if nothing is."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or sys.platform == "win32" or torch.cuda.is_available():
        pytest.skip("needs a C++ compiler and a PyTorch that sees no GPU")
    from torch.utils.cpp_extension import include_paths

    folder, lib = tmp_path_factory.mktemp("fake_cuda"), Path(torch.__file__).parent / "lib"
    library = folder / "fakecuda.so"
    command = [compiler, "-O0", "-w", "-shared", "-fPIC", "-std=c++17", str(HERE / "fakecuda.cpp"), "-o", str(library)]
    command += [f"-I{path}" for path in include_paths()]
    command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, timeout=240)
    command = [sys.executable, str(HERE / "fake_cuda.py"), str(library), str(folder), "2"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=variables)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    return {line["case"]: line["error"] for line in lines}


def test_every_path_of_a_gpu_keeps_devices_types_and_does_not_wait(found):
    """Methods, precisions, capabilities, FlashAttention, two devices; a cache on the GPU; the workers of bench.py."""
    assert len(found) == 66
    assert {case: error for case, error in found.items() if error} == {}
