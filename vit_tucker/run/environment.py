"""Describes this machine for bug reports: versions, extras, devices, and which attention backends run here.

Versions come from the packages' metadata, so nothing but torch is imported. Each part is guarded: a package that is broken or
missing costs its own entry only, with the reason under ``problems``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vit_tucker.errors import one_line, reason_of
from vit_tucker.version import __version__

if TYPE_CHECKING:
    import torch

    from vit_tucker.attention.backends import Facts

DISTRIBUTION = "vit_tucker"
PACKAGES = (
    *("torch", "torchvision", "timm", "accelerate", "numpy", "triton", "pydantic", "safetensors", "huggingface_hub"),
    *("pillow", "peft", "transformers"),
)
"""Packages whose versions are reported, installed or not, in this order."""
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "CUDA_VISIBLE_DEVICES"),
    *("HF_HUB_OFFLINE", "TRITON_INTERPRET", "PYTORCH_CUDA_ALLOC_CONF"),
)
"""Environment variables that change what runs. None holds a path or a secret."""
UNION_OF_EXTRAS = "dev"
"""This extra only joins others."""
HEADS, WIDTH, RANK = 12, 64, 16
"""The call that backends are asked for: attention of a ViT-B/16, and Tucker Attention with its ranks (8, 16, 16)."""
CPU_FEATURES = {
    "AVX512": "_is_avx512_supported",
    "AVX512-BF16": "_is_avx512_bf16_supported",
    "AVX512-VNNI": "_is_vnni_supported",
    "AMX": "_is_amx_tile_supported",
}
"""What torch can say of a CPU, by the names of its checks, which not every version has."""


def machine_info(parts: Mapping[str, Callable[[], Any]] | None = None) -> dict[str, Any]:
    """Returns versions, extras, platform, devices and attention backends, as plain values; never raises.

    Args:
        parts: functions by the names of their entries; None for all of ``all_parts``.

    Returns:
        The values of the parts, and ``problems``. A part that can't be found out is None, and ``problems`` has the reason by its
        name.
    """
    problems: dict[str, str] = {}
    info: dict[str, Any] = {}
    for name, part in (all_parts() if parts is None else parts).items():
        try:
            info[name] = part()
        except Exception as error:  # a report on a broken installation is what this is for
            info[name] = None
            problems[name] = reason_of(error)
    return {**info, "problems": problems | unmet_requirements()}


def all_parts() -> dict[str, Callable[[], Any]]:
    """Returns the function of each entry of ``machine_info``."""
    return {
        "versions": versions,
        "extras": extras,
        "platform": platform_info,
        "devices": devices,
        "backends": backends,
        "auto": automatic_choices,
    }


def version_of(package: str) -> str | None:
    """Returns the version of an installed package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Returns versions by package; None where one is not installed."""
    own = {DISTRIBUTION: __version__, "python": platform.python_version()}
    return own | {package: version_of(package) for package in PACKAGES}


def extras() -> dict[str, dict[str, str | None]]:
    """Returns the packages of each extra of ``pip install 'vit_tucker[...]'`` with their versions; None: not installed."""
    from packaging.requirements import Requirement

    found: dict[str, dict[str, str | None]] = defaultdict(dict)
    metadata = importlib.metadata.distribution(DISTRIBUTION)
    requirements = [Requirement(text) for text in metadata.requires or ()]
    for extra in metadata.metadata.get_all("Provides-Extra") or ():
        for requirement in requirements:
            marker = requirement.marker
            applies = marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})
            if applies and extra != UNION_OF_EXTRAS:
                found[extra][requirement.name] = version_of(requirement.name)
    return dict(found)


def unmet_requirements() -> dict[str, str]:
    """Returns what is wrong with installed packages, by package: absent, or another version than the package needs."""
    try:
        from packaging.requirements import Requirement

        texts = importlib.metadata.requires(DISTRIBUTION) or ()
        required = [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]
        found = {requirement.name: version_of(requirement.name) for requirement in required}
        wanted = {requirement.name: requirement.specifier for requirement in required}
    except Exception:  # extras() reports the same fault
        return {}
    absent = {name: f"not installed, {wanted[name]} is needed" for name, version in found.items() if version is None}
    return absent | {
        name: f"{version} is installed, {wanted[name]} is needed"
        for name, version in found.items()
        if version is not None and not wanted[name].contains(version, prereleases=True)
    }


def platform_info() -> dict[str, Any]:
    """Returns the operating system, the processor's architecture, and environment variables that change what runs."""
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "implementation": platform.python_implementation(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def devices() -> list[dict[str, Any]]:
    """Returns the CPU and each accelerator that torch sees; one without devices has the reason under ``missing``."""
    return [cpu(), *gpus(), *other_accelerators()]


def cpu() -> dict[str, Any]:
    """Returns the CPU's model, cores, threads of torch, memory in bytes and the instructions that speed it up."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = getattr(os, "sysconf_names", {})
    sizes = [os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE") if name in names]
    checks = {feature: getattr(torch.cpu, check, None) for feature, check in CPU_FEATURES.items()}
    return {
        "device": "cpu",
        "name": cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": sizes[0] * sizes[1] if len(sizes) == 2 else None,
        "capabilities": [feature for feature, check in checks.items() if check is not None and check()],
    }


def cpu_name() -> str:
    """Returns the processor's name as Linux or Python has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return one_line(names[0]) if names else platform.processor() or platform.machine()


def gpus() -> list[dict[str, Any]]:
    """Returns the CUDA or ROCm devices with memory and compute capability; the reason in one entry if there are none."""
    import torch

    build = "ROCm" if torch.version.hip is not None else "CUDA"
    number = torch.version.hip or torch.version.cuda
    if number is None:
        return [{"device": "cuda", "missing": "this torch is built without CUDA"}]
    if not torch.cuda.is_available():
        return [
            {"device": "cuda", "missing": f"this torch is built for {build} {number}, and finds no driver or device"}
        ]
    found = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        entry = {"device": f"cuda:{index}", "name": known.name, "memory_bytes": known.total_memory}
        found.append({**entry, "capabilities": [f"{build} {number}", f"compute {known.major}.{known.minor}"]})
    return found


def other_accelerators() -> list[dict[str, Any]]:
    """Returns Apple's and Intel's GPUs where torch sees one."""
    import torch

    mps = torch.backends.mps.is_available()
    xpu = hasattr(torch, "xpu") and torch.xpu.is_available()
    names = {"mps": "Apple GPU" if mps else None, "xpu": torch.xpu.get_device_name(0) if xpu else None}
    return [{"device": device, "name": name} for device, name in names.items() if name is not None]


def device_types() -> list[str]:
    """Returns the kinds of device that are here: "cpu", "cuda", ..."""
    present = [str(entry["device"]).partition(":")[0] for entry in devices() if "missing" not in entry]
    return list(dict.fromkeys(present))


def example_calls(device: str, dtype: torch.dtype) -> tuple[Facts, Facts]:
    """Returns the facts of an inference call without a mask: of multi-head attention, and of Tucker Attention."""
    from vit_tucker.attention.backends import Facts

    heads = Facts(device, dtype, HEADS, HEADS, WIDTH, WIDTH)
    return heads, Facts(device, dtype, HEADS, 1, RANK, RANK, ranks=(RANK, RANK, RANK, RANK))


def backends() -> list[dict[str, Any]]:
    """Returns, for each device and backend, whether it takes the example call, and why not; bfloat16 on accelerators."""
    import torch

    from vit_tucker.attention.backends import get_backend, is_whole, list_backends

    found = []
    for device in device_types():
        heads, tucker = example_calls(device, torch.float32 if device == "cpu" else torch.bfloat16)
        for name in list_backends():
            try:
                reason = get_backend(name).refuses(tucker if is_whole(name) else heads)
            except Exception as error:
                reason = reason_of(error)
            entry = {"device": device, "backend": name, "available": reason is None, "reason": reason}
            found.append({**entry, "tucker_only": is_whole(name)})
    return found


def automatic_choices() -> list[dict[str, str]]:
    """Returns the backend that "auto" chooses for the example call on each device, in float32 and bfloat16, with the reason."""
    import torch

    from vit_tucker.attention.backends.registry import AUTO, decide

    found = []
    for device in device_types():
        for dtype in (torch.float32, torch.bfloat16):
            choice = decide(example_calls(device, dtype)[0], AUTO)
            name = str(dtype).removeprefix("torch.")
            found.append({"device": device, "dtype": name, "backend": choice.name, "reason": choice.reason})
    return found
