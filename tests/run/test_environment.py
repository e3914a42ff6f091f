"""What `vit-tucker info` reports: each part against what the machine says, and faults that cost their own entry only."""

import importlib.metadata
import sys

import pytest
import torch

from vit_tucker.attention.backends import list_backends
from vit_tucker.run import environment
from vit_tucker.version import __version__


def test_versions_are_those_of_the_packages():
    found = environment.versions()
    assert found["vit_tucker"] == __version__
    assert found["torch"] == importlib.metadata.version("torch")
    assert environment.version_of("no-such-package") is None


def test_extras_have_their_packages_with_versions():
    found = environment.extras()
    assert set(found["onnx"]) == {"onnx", "onnxscript", "onnxruntime"}
    assert found["lint"]["ruff"] == importlib.metadata.version("ruff")
    assert environment.UNION_OF_EXTRAS not in found


def test_unmet_requirements_are_named(monkeypatch):
    assert environment.unmet_requirements() == {}
    needed = ["torch>=99", "no-such-package>=1", "timm>=0.1", 'sphinx; extra == "docs"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    found = environment.unmet_requirements()
    assert found["no-such-package"] == "not installed, >=1 is needed"
    assert found["torch"].endswith("is installed, >=99 is needed")
    assert set(found) == {"no-such-package", "torch"}


def test_the_cpu_is_described():
    cpu = environment.cpu()
    assert cpu["device"] == "cpu"
    assert cpu["threads"] == torch.get_num_threads()
    assert cpu["name"]
    assert set(cpu["capabilities"]) <= set(environment.CPU_FEATURES)


def test_a_missing_gpu_has_its_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert environment.gpus() == [{"device": "cuda", "missing": "this torch is built without CUDA"}]
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no driver or device" in environment.gpus()[0]["missing"]


def test_gpus_have_memory_and_capability(monkeypatch):
    known = type("Properties", (), {"name": "A GPU", "total_memory": 2**34, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    first, second = environment.gpus()
    assert (first["device"], second["device"]) == ("cuda:0", "cuda:1")
    assert first["memory_bytes"] == 2**34
    assert first["capabilities"] == ["CUDA 12.6", "compute 9.0"]


def test_every_backend_is_listed_on_the_cpu_with_a_reason_where_it_is_not_available():
    found = {entry["backend"]: entry for entry in environment.backends() if entry["device"] == "cpu"}
    assert set(found) == set(list_backends())
    assert all(entry["available"] == (entry["reason"] is None) for entry in found.values())
    assert found["sdpa"]["available"]
    assert found["latent"]["available"]
    assert found["latent"]["tucker_only"]
    assert found["flex"]["reason"].startswith("it is for CUDA")


def test_auto_chooses_an_available_backend_in_both_precisions():
    chosen = [entry for entry in environment.automatic_choices() if entry["device"] == "cpu"]
    assert [entry["dtype"] for entry in chosen] == ["float32", "bfloat16"]
    assert chosen[0]["backend"] == "sdpa"


@pytest.mark.parametrize("name", environment.all_parts())
def test_a_part_that_fails_costs_its_own_entry(name):
    def broken():
        raise OSError("libcuda.so:\n no such file")

    found = environment.machine_info({**dict.fromkeys(environment.all_parts(), lambda: "known"), name: broken})
    assert found.pop("problems") == {name: "libcuda.so: no such file"}
    assert found.pop(name) is None
    assert set(found.values()) == {"known"}


def test_a_package_without_metadata_is_no_failure(monkeypatch):
    distribution = importlib.metadata.distribution

    def absent(name):
        if name == "vit_tucker":
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    found = environment.machine_info()
    assert found["extras"] is None
    assert set(found["problems"]) == {"extras"}
    assert found["versions"]["torch"]


def test_a_torch_that_can_t_be_imported_leaves_versions_and_platform(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found = environment.machine_info()
    assert found["versions"]["python"]
    assert found["platform"]["system"]
    assert found["devices"] is None
    assert "torch" in found["problems"]["devices"]
