"""Metrics, optimizer groups, schedule and checkpoints, each by itself."""

import json
import math
import os

import pytest
import torch
from torch import nn

import vit_tucker as vt
from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.storage.checkpoints import list_checkpoints
from vit_tucker.storage.weights import full_state, load_weights, save_weights, weights_metadata
from vit_tucker.training.metrics import batch_sums, scores_from_sums
from vit_tucker.training.optim import create_optimizer, create_scheduler, learning_rate
from vit_tucker.training.optimizer_state import load_optimizer
from vit_tucker.training.state import flatten, load_checkpoint
from vit_tucker.training.state import save_checkpoint as save_states

RECIPE = TrainConfig(epochs=10, warmup_epochs=2, lr=1.0, warmup_lr=0.0, min_lr=0.0)


def test_sums_by_hand():
    logits = torch.tensor([[2.0, 1, 0, -1, -2, -3, -4], [0.0, 1, 2, 3, 4, 5, 6]])
    labels = torch.tensor([1, 0])  # second best; worst of seven
    loss = -logits.log_softmax(1)[[0, 1], labels].sum().item()
    sums = batch_sums(logits, labels)
    assert sums.tolist() == pytest.approx([loss, 0, 1, 2])
    scores = scores_from_sums(sums + batch_sums(logits[:1], torch.tensor([0])))
    assert (scores.top1, scores.top5, scores.count) == pytest.approx((100 / 3, 200 / 3, 3))
    assert batch_sums(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0])).tolist()[2] == 1  # fewer than five classes
    with pytest.raises(ValueError, match="no images"):
        scores_from_sums(torch.zeros(4))


def test_weight_decay_acts_on_matrices_and_cores_only(make_vit):
    model = make_vit(init_values=0.1, reg_tokens=1)
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6)))
    optimizer = create_optimizer(model, RECIPE)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert set(decay) == {id(p) for p in names.values()}
    for name, p in names.items():
        kept = p.ndim < 2 or name in model.no_weight_decay()
        assert decay[id(p)] == (0.0 if kept else RECIPE.weight_decay), name
    assert decay[id(names["pos_embed"])] == 0
    assert decay[id(names["blocks.0.attn.pre_core"])] > 0
    assert decay[id(names["blocks.0.attn.pre_head"])] > 0
    assert decay[id(names["blocks.0.attn.q_proj.bias"])] == 0


@pytest.mark.parametrize(
    ("sched", "expected"),
    [
        ("cosine", lambda t: 0.5 * (1 + math.cos(math.pi * t / 100))),
        ("linear", lambda t: 1 - t / 100),
        ("constant", lambda t: 1.0),
        ("step", lambda t: 0.1 ** (t // 40)),
    ],
)
def test_schedule_counts_optimizer_steps(sched, expected):
    """10 epochs of 10 steps: warm-up to step 20, then the curve over all 100 steps, whatever the number of processes."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    config = RECIPE.model_copy(update={"sched": sched, "decay_epochs": 4.0})
    scheduler = create_scheduler(optimizer, config, steps_per_epoch=10)
    assert learning_rate(optimizer) == 0.0
    for step in range(1, 100):
        scheduler.step_update(step)
        wanted = step / 20 if step < 20 else expected(step)
        assert learning_rate(optimizer) == pytest.approx(wanted, abs=1e-9), step


def test_layer_decay_reaches_the_learning_rates(make_vit):
    model = make_vit()
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6)))
    config = RECIPE.model_copy(update={"layer_decay": 0.5})
    optimizer = create_optimizer(model, config)
    create_scheduler(optimizer, config, 10).step_update(20)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    cores = [rate[id(b.attn.pre_core)] for b in model.blocks]
    assert cores[1] / cores[0] == pytest.approx(2)
    assert cores[2] / cores[1] == pytest.approx(2)


def test_impossible_recipes_are_refused(make_vit):
    with pytest.raises(ConfigError, match="warmup_epochs: 5 is more than train.epochs=2"):
        TrainConfig(epochs=2, warmup_epochs=5.0)
    with pytest.raises(ConfigError, match="train.opt=adamm: .* no such optimizer; did you mean 'adam'?"):
        create_optimizer(make_vit(), RECIPE.model_copy(update={"opt": "adamm"}))


def trained(opt="adamw", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = create_optimizer(
        model, TrainConfig(opt=opt, opt_betas=(0.8, 0.9)) if opt == "adamw" else TrainConfig(opt=opt)
    )
    step(model, optimizer)
    return model, optimizer


def save_checkpoint(folder, model, ema, optimizer, progress, metadata, keep):
    weights = {"model": full_state(model)} | ({"ema": full_state(ema)} if ema is not None else {})
    tensors = {}
    return save_states(
        folder, weights, (flatten(optimizer.state_dict(), "optimizer", tensors), tensors), progress, metadata, keep
    )


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 8).view(2, 4)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "lamb", "adafactor", "lookahead_adamw"])
def test_checkpoints_restore_model_and_optimizer_exactly(tmp_path, opt):
    model, optimizer = trained(opt)
    ema, _ = trained(opt, seed=3)
    progress = {"global_step": 7, "loss_sum": 0.1 + 0.2, "rows": [{"epoch": 1, "lr": 1e-3}], "best": None}
    save_checkpoint(tmp_path, model, ema, optimizer, progress, {}, keep=2)
    other, other_optimizer = trained(opt, seed=1)
    other_ema, _ = trained(opt, seed=2)
    loaded, state, _ = load_checkpoint(list_checkpoints(tmp_path)[-1], other, other_ema)
    load_optimizer(other_optimizer, state)
    assert loaded == progress
    for a, b in ((model, other), (ema, other_ema)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    for _ in range(7):  # past lookahead's slow step
        step(model, optimizer)
        step(other, other_optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("averaged", [False, True])
def test_an_average_that_was_not_saved_starts_from_the_model(tmp_path, averaged):
    """A run that goes on with an EMA which it did not have."""
    model, optimizer = trained()
    saved, ema = trained(seed=3)[0] if averaged else None, trained(seed=2)[0]
    progress = {"global_step": 7, "loss_sum": 0.5, "rows": [], "best": None}
    save_checkpoint(tmp_path, model, saved, optimizer, progress, {}, keep=1)
    load_checkpoint(list_checkpoints(tmp_path)[-1], trained(seed=1)[0], ema)
    assert torch.equal(model[0].weight, ema[0].weight) != averaged


def test_only_the_newest_checkpoints_are_kept_and_torn_ones_ignored(tmp_path):
    model, optimizer = trained()
    for number in (1, 2, 3):
        save_checkpoint(tmp_path, model, None, optimizer, {"global_step": number}, {}, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    assert (tmp_path / "last").resolve() == tmp_path / "step-00000003"
    (tmp_path / ".step-00000004.tmp").mkdir()  # killed while writing
    assert list_checkpoints(tmp_path)[-1].name == "step-00000003"
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_torn_and_foreign_checkpoints_are_named(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, model, None, optimizer, {"global_step": 1}, {}, keep=1)
    with pytest.raises(CheckpointError, match="model.safetensors: is of another model: .*size mismatch"):
        load_weights(folder / "model.safetensors", nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)))
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="step-00000001: can't be resumed from"):
        load_checkpoint(folder, model, None)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="model.safetensors: can't be read"):
        load_checkpoint(folder, model, None)


def test_weights_are_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_weights(file, nn.Linear(2, 2).state_dict(), {"attention": "tucker"})
    assert weights_metadata(file)["attention"] == "tucker"
    before = file.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(file, nn.Linear(2, 2).state_dict(), {})
    assert file.read_bytes() == before
    assert weights_metadata(tmp_path / "x.pth") == {}


def test_progress_floats_survive_json():
    assert json.loads(json.dumps(0.1 + 0.2)) == 0.1 + 0.2
