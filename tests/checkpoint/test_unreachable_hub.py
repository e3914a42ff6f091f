"""A hub that can't be reached is found out at once, and the message names the ways out; what is in the cache is used."""

import socket
import time

import pytest
from huggingface_hub import constants
from timm.models._hub import has_hf_hub

import vit_tucker as vt
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.checkpoint.hub import refuse_missing, unreachable
from vit_tucker.cli.main import main
from vit_tucker.config.schema import ModelConfig

pytestmark = pytest.mark.skipif(not has_hf_hub(), reason="this timm can't use the installed huggingface_hub")
NAME = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
WAYS = ("model.pretrained=false", "model.checkpoint=FILE", "HF_HUB_OFFLINE=1")


@pytest.fixture
def listening():
    """A port of this machine on which somebody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def without_hub(monkeypatch, tmp_path):
    """A hub at a port of this machine where nobody answers, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "cache"


def put(cache, repo: str, file: str) -> None:
    """Puts a file of a repository into the cache as huggingface_hub does."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / file).write_bytes(b"x")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")


@pytest.mark.usefixtures("without_hub")
@pytest.mark.parametrize("name", [NAME, "vit_tiny_patch16_224"])
def test_pretrained_weights_are_refused_at_once_with_ways_out(name):
    start = time.monotonic()
    with pytest.raises(
        vt.CheckpointError, match=f"^model.pretrained: no weights for {name}: not in the hub's cache"
    ) as caught:
        load_host(ModelConfig(name=name, pretrained=True))
    assert time.monotonic() - start < 5
    assert "127.0.0.1 can't be reached" in str(caught.value)
    assert all(way in str(caught.value) for way in WAYS)


@pytest.mark.usefixtures("without_hub")
def test_commands_and_load_are_refused_too(capsys, in_tmp):
    plan = ["plan", NAME, "--method", "tucker ranks=[2,8,8]", "model.pretrained=true"]
    for command in (
        plan,
        ["ranks", NAME],
        ["cost", NAME, "--method", "tucker ranks={budget: 0.2}", "model.pretrained=true"],
        ["ranks", "me/model"],
        ["evaluate", "me/model", "--data", "digits"],
    ):
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "not in the hub's cache" in line
    for where in ("me/model", "hf-hub:me/model@v1"):
        with pytest.raises(vt.CheckpointError, match="not in the hub's cache .me/model.*can't be reached"):
            vt.load(where)
    with pytest.raises(vt.CheckpointError, match="model.name: hf-hub:me/model: not in the hub's cache"):
        load_host(ModelConfig(name="hf-hub:me/model"))


def test_offline_mode_is_named_where_it_is_the_reason(without_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(vt.CheckpointError, match="and HF_HUB_OFFLINE is set; model.pretrained=false .* of yours$"):
        load_host(ModelConfig(name=NAME, pretrained=True))
    with pytest.raises(vt.CheckpointError, match="HF_HUB_OFFLINE is set$"):
        vt.load("me/model")


def test_what_is_in_the_cache_is_not_refused(without_hub):
    put(without_hub, "me/model", "pytorch_model.bin")
    refuse_missing("me/model", ("model.safetensors", "pytorch_model.bin"), "it")
    with pytest.raises(vt.CheckpointError, match="^it: not in the hub's cache"):
        refuse_missing("me/model", ("model.safetensors",), "it")
    with pytest.raises(vt.CheckpointError, match="^it: not in the hub's cache"):
        refuse_missing("me/model@v1", ("pytorch_model.bin",), "it")


@pytest.mark.usefixtures("without_hub")
def test_a_hub_that_answers_and_one_behind_a_proxy_are_not_refused(monkeypatch, listening):
    assert "can't be reached" in str(unreachable())
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert unreachable() is None  # the proxy knows
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert "can't be reached" in str(unreachable())
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    assert unreachable() is None


def test_other_sources_need_no_hub(without_hub, tmp_path):
    load_host(ModelConfig(name="vit_tiny_patch16_224", depth=1))
    with pytest.raises(vt.ConfigError, match="local-dir:none can't be built"):
        load_host(ModelConfig(name="local-dir:none"))
    with pytest.raises(vt.CheckpointError, match="no such file"):
        load_host(ModelConfig(name=NAME, checkpoint=str(tmp_path / "none.safetensors")))
