"""Which models the command shows: the run's own, and the dense one that it started from or that was named."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models._hub import has_hf_hub

import vit_tucker as vt
from tests.explain.runs import LABELS, MODEL, host, make_pair, make_run
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.explain.sources import host_of, open_dense, open_subject, seen_from_run
from vit_tucker.inference.predict import run_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("runs"))


def opened(where, choice="host"):
    run, config = open_subject(str(where)), run_config(str(where))
    return run, open_dense(choice, run, config, str(where))


def same(model, other):
    state = other.state_dict()
    return set(model.state_dict()) == set(state) and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )


def test_a_run_and_the_host_that_it_started_from(runs):
    run, dense = opened(runs[1])
    assert (run.kind, dense.kind) == ("tucker", "dense")
    assert same(dense.model, host())
    assert run.label_names == list(LABELS)
    assert dense.classifies
    assert re.fullmatch(r"weights: \S+: (\d+) of \1 tensors", dense.weights)
    assert run.weights == ""
    for subject in (run, dense):
        assert subject.data["input_size"] == (1, 16, 16)
        assert (tuple(subject.data["mean"]), tuple(subject.data["std"])) == ((0.3,), (0.4,))


def test_checkpoint_folders_belong_to_their_run(runs):
    assert run_config(str(runs[1] / "checkpoints" / "best")) == run_config(str(runs[1]))
    assert opened(runs[1] / "checkpoints" / "best")[1].kind == "dense"


def test_a_dense_run_stands_alone_unless_another_is_named(runs):
    assert opened(runs[0])[1] is None
    assert opened(runs[0], str(runs[0]))[1].kind == "dense"
    assert opened(runs[1], "none")[1] is None


def test_a_run_from_random_weights_has_no_host(tmp_path):
    model = host()
    vt.patch(model, vt.GQAConfig(num_kv_heads=1, init="random"), keep_originals=False)
    run = make_run(tmp_path / "run", model, attention={"method": "gqa", "num_kv_heads": 1, "init": "random"})
    assert opened(run)[1] is None


def test_named_folders_files_and_saved_models(runs, tmp_path):
    saved = vt.save(host(1), tmp_path / "saved")
    assert same(opened(runs[1], str(saved))[1].model, host(1))
    assert same(opened(runs[1], str(saved / "model.safetensors"))[1].model, host(1))
    lone = vt.save(open_subject(str(runs[1])).model, tmp_path / "lone")
    assert run_config(str(lone)) is None
    assert opened(lone)[1] is None
    assert same(opened(lone, str(saved / "model.safetensors"))[1].model, host(1))
    with pytest.raises(CheckpointError, match="--dense: .*patched with tucker, a dense host is needed"):
        opened(lone, str(lone / "model.safetensors"))
    with pytest.raises(ConfigError, match=r"takes other images than .*: \(3, 16, 16\) and \(1, 16, 16\)"):
        opened(lone, str(vt.save(host(in_chans=3), tmp_path / "colour")))
    with pytest.raises(CheckpointError, match="--dense nowhere: no such folder"):
        opened(lone, "nowhere")


def test_a_host_with_other_classes_loses_its_head(runs, tmp_path):
    dense = make_run(tmp_path / "dense", host(num_classes=7), model={**MODEL, "num_classes": 7})
    run = open_subject(str(runs[1]))
    config = run_config(str(runs[1]))
    config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": str(dense)})})
    found = host_of(config, run)
    assert not found.classifies
    assert found.model.num_classes == 0
    assert torch.equal(found.model.blocks[0].attn.qkv.weight, host(num_classes=7).blocks[0].attn.qkv.weight)


def test_a_host_that_is_gone(runs):
    run, config = open_subject(str(runs[1])), run_config(str(runs[1]))
    config = config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": "gone"})})
    with pytest.raises(CheckpointError, match="the run's model.checkpoint: gone: no such .*; --dense names another"):
        host_of(config, run)


def test_the_teacher_that_a_run_has_kept_is_its_host(runs, tmp_path):
    model = open_subject(str(runs[1])).model
    section = {"train": {"distill": {"teacher": "host"}}, "model": {**MODEL, "checkpoint": "gone"}}
    folder = make_run(tmp_path / "distilled", model, attention={"method": "tucker", "ranks": [3, 12, 12]}, **section)
    vt.save(host(2), folder / "teacher")
    assert same(opened(folder)[1].model, host(2))


@pytest.mark.skipif(not has_hf_hub(), reason="this timm can't use the hub's package")
def test_pretrained_weights_of_the_runs_architecture(runs, monkeypatch):
    """timm's own, of 1000 classes and three channels, from a stand-in for the hub."""
    run, config = open_subject(str(runs[1])), run_config(str(runs[1]))
    sizes = {key: value for key, value in MODEL.items() if key not in ("name", "in_chans", "num_classes")}
    published = timm.create_model(MODEL["name"], num_classes=1000, **sizes).state_dict()
    monkeypatch.setattr("vit_tucker.checkpoint.hub.unreachable", lambda: None)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: dict(published))
    dense = open_dense("pretrained", run, config, "the run")
    assert (dense.model.num_classes, dense.data["input_size"]) == (1000, (1, 16, 16))
    assert torch.equal(dense.model.blocks[0].attn.qkv.weight, published["blocks.0.attn.qkv.weight"])
    assert len(dense.label_names) == 1000


def test_a_runs_start_is_found_from_elsewhere(tmp_path, monkeypatch):
    """Its config says where it was from the folder that the run was started in."""
    (tmp_path / "runs/dense").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert seen_from_run(Path("runs/dense"), tmp_path / "runs/tucker") == tmp_path / "runs/dense"
    assert seen_from_run(Path("runs/none"), tmp_path / "runs/tucker") == Path("runs/none")
    monkeypatch.chdir(tmp_path)
    assert seen_from_run(Path("runs/dense"), tmp_path / "runs/tucker") == Path("runs/dense")
