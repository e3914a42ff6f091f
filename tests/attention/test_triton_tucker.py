"""What surrounds the Triton kernels: refusals, tiles, compilation without a GPU. ``triton_tucker_cases`` runs in a process."""

import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

import vit_tucker
from tests.conftest import process_environment
from vit_tucker.attention.triton_tucker import available, tiles, tucker_attention, unsupported
from vit_tucker.attention.triton_tucker.tiles import KERNELS, Ranks, Tile

ROOT = Path(vit_tucker.__file__).parents[1]
CASES = Path(__file__).with_name("triton_tucker_cases.py")
CPU = torch.device("cpu")
SHARED_MEMORY = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448}
WIDTHS = [Ranks(*widths) for widths in itertools.product((16, 32, 64, 128), repeat=4)]
interpreting = os.environ.get("TRITON_INTERPRET", "0") != "0"


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(map(int, version.split(".")[:2]))


def run_cases(tmp_path: Path, cases: Path = CASES, **variables: str) -> tuple[dict[str, int], str]:
    """Numbers of tests, failures, errors and skipped ones of the cases in a process of their own, and what it wrote."""
    report = tmp_path / "report.xml"
    environment = process_environment(ROOT, OMP_NUM_THREADS="1", **variables)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--junitxml={report}",
        str(cases),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}, done.stdout[-4000:]


def test_kernels_in_the_interpreter(tmp_path):
    triton = pytest.importorskip("triton")
    if numbers(triton.__version__) < (3, 7) and numbers(np.__version__) >= (2, 4):
        pytest.skip("the interpreter before Triton 3.7 makes integers of arrays in a way that numpy 2.4 refuses")
    counts, output = run_cases(tmp_path, TRITON_INTERPRET="1")
    assert counts["tests"] > 35, output
    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}, output


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_a_gpu(tmp_path):
    if reason := available(torch.device("cuda")):
        pytest.skip(reason)
    counts, output = run_cases(tmp_path, TRITON_INTERPRET="0")
    assert counts["tests"] > 50, output
    assert counts == {"tests": counts["tests"], "failures": 0, "errors": 0, "skipped": 0}, output


RANKS = Ranks(8, 16, 33, 128)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, None),
        ({"mask": "boolean", "rope": True, "shared_memory": SHARED_MEMORY["sm_86"]}, None),
        ({"dtype": torch.float64}, "float64"),
        ({"ranks": Ranks(8, 16, 33, 129)}, "129"),
        ({"ranks": Ranks(8, 15, 33, 128)}, None),
        ({"ranks": Ranks(8, 15, 33, 128), "rope": True}, "even"),
        ({"mask": "additive", "mask_requires_grad": True}, "gradient"),
        ({"rope": True, "angles_require_grad": True}, "gradient"),
        ({"dropout": 0.1}, "dropout"),
        ({"shared_memory": 10_000}, "shared memory"),
    ],
)
def test_what_is_not_supported_has_a_reason(arguments, reason):
    found = unsupported(**{"dtype": torch.bfloat16, "ranks": RANKS} | arguments)
    assert found is None if reason is None else reason in found


def shaped(**changes):
    """Arguments of a small call on the CPU, some of them changed."""
    shapes = {"p": (2, 5, 8), "k": (2, 5, 16), "v": (2, 5, 9), "pre": (3, 8, 16), "post": (3, 7, 9)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | {"scale": 1.0} | changes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"k": torch.zeros(2, 5, 15)}, "k must be"),
        ({"v": torch.zeros(1, 5, 9)}, "v must be"),
        ({"post": torch.zeros(2, 7, 9)}, "post must be"),
        ({"post": torch.zeros(3, 9)}, "three dimensions"),
        ({"k": torch.zeros(2, 5, 16).half()}, "float16"),
        ({"attn_mask": torch.zeros(3, 5, 4)}, "broadcast"),
        ({"attn_mask": torch.zeros(1, 2, 3, 5, 5)}, "broadcast"),
        ({"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}, "int64"),
        ({"attn_mask": torch.zeros(5, 5, requires_grad=True)}, "gradient"),
        ({"angles": (torch.zeros(5, 8), torch.zeros(2, 5, 8))}, "sines"),
        ({"angles": (torch.zeros(4, 8), torch.zeros(4, 8))}, "sines"),
        ({"angles": (torch.zeros(5, 8, requires_grad=True), torch.zeros(5, 8))}, "gradient"),
    ],
)
def test_wrong_calls_say_what_is_wrong(changes, reason):
    with pytest.raises(ValueError, match=reason):
        tucker_attention(**shaped(**changes))


@pytest.mark.skipif(interpreting, reason="the interpreter runs on the CPU")
def test_the_cpu_is_refused_without_the_interpreter():
    pytest.importorskip("triton")
    assert "CUDA" in available(CPU)
    with pytest.raises(RuntimeError, match="CUDA"):
        tucker_attention(**shaped())


def test_without_triton_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in available(CPU)


@pytest.mark.skipif(interpreting, reason="the interpreter runs anywhere")
@pytest.mark.parametrize(
    ("capability", "version", "reason"),
    [
        ((7, 5), "3.8.0", "7.5"),
        ((8, 0), "3.2.0", None),
        ((8, 6), "3.8.0", None),
        ((9, 0), "3.2.0", "Triton 3.3"),
        ((9, 0), "3.3.1+git1", None),
        ((12, 0), "4.0", None),
    ],
)
def test_gpus_by_their_capability(capability, version, reason, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", None)
    found = available(torch.device("cuda"))
    assert found is None if reason is None else reason in found


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import vit_tucker.attention.triton_tucker.op as op; print(op.__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=process_environment(ROOT), capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("op"), done.stderr


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", SHARED_MEMORY)
def test_every_rank_has_a_tile_that_fits(device, kernel, itemsize):
    limit = SHARED_MEMORY[device]
    for widths, rope, mask in itertools.product(WIDTHS, (False, True), (False, True)):
        tile = tiles.choose(kernel, widths, itemsize, rope, mask, limit)
        assert tile is not None, widths
        assert tiles.shared_bytes(kernel, tile, widths, itemsize, mask) <= limit
    assert tiles.choose(kernel, Ranks(16, 16, 16, 16), itemsize, False, False, 1000) is None


def test_widths_and_parts_by_hand():
    assert [tiles.width(rank) for rank in (1, 8, 16, 17, 33, 64, 65, 128)] == [16, 16, 16, 32, 64, 64, 128, 128]
    assert tiles.parts_of_heads(programs=1000, heads=12, multiprocessors=80) == 1
    assert tiles.parts_of_heads(programs=100, heads=12, multiprocessors=80) == 2
    assert tiles.parts_of_heads(programs=4, heads=12, multiprocessors=80) == 12


@pytest.mark.skipif(interpreting, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("kernel", "dtype", "ranks", "mask", "rope"),
    [
        ("forward", "bf16", Ranks(128, 128, 128, 128), "none", True),
        ("rows", "bf16", Ranks(64, 33, 24, 16), "boolean", False),
        ("keys", "bf16", Ranks(64, 64, 64, 64), "additive", False),
        ("keys", "fp32", Ranks(16, 16, 16, 16), "causal", False),
    ],
)
def test_kernels_compile_for_a_gpu_within_the_bound(kernel, dtype, ranks, mask, rope, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    if numbers(triton.__version__) < (3, 3):
        pytest.skip("Triton's compiler has another interface before 3.3")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from kernel_usage import ITEMSIZE, compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    widths, in_memory = Ranks(*map(tiles.width, ranks)), mask in ("boolean", "additive")
    tile = tiles.choose(kernel, widths, ITEMSIZE[dtype], rope, in_memory, SHARED_MEMORY["sm_86"])
    usage = compile_kernel(kernel, ranks, tile, 86, dtype, mask, rope)
    assert 0 < usage.shared <= tiles.shared_bytes(kernel, tile, widths, ITEMSIZE[dtype], in_memory)
    assert 0 < usage.registers <= 255
    assert (usage.tensor_core > 0) == (dtype == "bf16")
    small = compile_kernel(kernel, ranks, Tile(16, 16, 4, 1), 86, dtype, mask, rope)
    assert small.shared > 0
    assert small.shared != usage.shared
