"""Every optimizer of timm: its state saved, loaded and continued bit for bit, or refused."""

import json

import pytest
import timm
import timm.optim
import torch
from safetensors.torch import load, save
from torch import nn

import vit_tucker as vt
from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import ConfigError
from vit_tucker.training.optim import create_optimizer
from vit_tucker.training.saved_state import unflatten
from vit_tucker.training.state import flatten

BEFORE_LISTS = [
    "sgd",
    "adam",
    "adamw",
    "nadam",
    "radam",
    "adamp",
    "adafactor",
    "adahessian",
    "lamb",
    "lars",
    "lion",
]
"""Some of the names that timm's factory knew before it could list them."""


def optimizer_names():
    """All that this timm can list."""
    listed = getattr(timm.optim, "list_optimizers", None)
    return BEFORE_LISTS if listed is None else listed()


def tiny_model(seed):
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3
    )
    vt.patch(model, vt.TuckerConfig(ranks=(2, 3, 3), init="random"), keep_originals=False)
    return model


def take_step(model, optimizer, number):
    images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).roll(number, -1)
    model(images).square().sum().backward()
    before = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(before, torch.get_rng_state())  # each process has random numbers of its own: replicas would part
    optimizer.zero_grad()


def as_on_disk(state):
    """What ``save_checkpoint`` writes of an optimizer, read back."""
    tensors = {}
    values = flatten(state, "optimizer", tensors)
    return unflatten(json.loads(json.dumps(values)), load(save(tensors)), "optimizer")


def continued(config, through):
    """Two steps, the state moved into a new optimizer, one more step of both: the parameters of both."""
    model, other = tiny_model(0), tiny_model(1)
    optimizer, fresh = create_optimizer(model, config), create_optimizer(other, config)
    for number in range(2):
        take_step(model, optimizer, number)
    state = through(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(state)
    take_step(model, optimizer, 2)
    take_step(other, fresh, 2)
    return [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, other)]


NOT_HERE = ("bnb", "fused")
"""Optimizers of bitsandbytes and Apex, which need CUDA."""


@pytest.mark.parametrize("name", [*optimizer_names(), "lookahead_radam"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # opt_einsum, which Kron recommends
def test_every_optimizer_continues_from_its_saved_state(name, monkeypatch):
    config = TrainConfig(opt=name, lr=1e-2, weight_decay=0.1, layer_decay=0.9)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # Kron's: 40 s, and not what is tested
    if name == "adahessian" or (name.startswith(NOT_HERE) and not torch.cuda.is_available()):
        with pytest.raises(ConfigError, match=f"train.opt={name}: .*(second derivatives|CUDA|required|installed)"):
            create_optimizer(tiny_model(0), config)
        return
    uninterrupted, resumed = continued(config, as_on_disk)
    assert torch.equal(uninterrupted, resumed)
    assert not torch.equal(uninterrupted, torch.cat([p.detach().flatten() for p in tiny_model(0).parameters()]))


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_an_optimizer_without_its_state_differs(name):
    """Twin of the above: the comparison sees lost moments."""
    if name not in optimizer_names():
        pytest.skip(f"this timm has no {name}")
    uninterrupted, resumed = continued(TrainConfig(opt=name, lr=1e-2), lambda state: {**as_on_disk(state), "state": {}})
    assert not torch.equal(uninterrupted, resumed)


def test_lookahead_of_a_second_order_optimizer_is_refused_too():
    with pytest.raises(ConfigError, match="second derivatives"):
        create_optimizer(nn.Linear(2, 2), TrainConfig(opt="lookahead_adahessian"))
