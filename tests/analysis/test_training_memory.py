"""Memory of a training step: optimizer state against the real one, activations against larger batches."""

import copy

import pytest
import timm
import timm.optim
import torch
from torch import nn
from torch.nn import functional as F

import vit_tucker as vt
from vit_tucker.analysis.live_bytes import LiveBytes
from vit_tucker.analysis.training_memory import (
    MemoryEstimate,
    activation_bytes,
    estimate_memory,
    optimizer_bytes,
    tensor_bytes,
)
from vit_tucker.config.schema import TrainConfig
from vit_tucker.training.optim import create_optimizer
from vit_tucker.training.task import ImageTask


@pytest.fixture
def tiny():
    """A patched ViT, float32: 16 tokens and a class token, 3 blocks."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=7
    )
    vt.patch(model, vt.TuckerConfig(ranks=(3, 6, 6), init="random"), keep_originals=False)
    return model


class Net(nn.Module):
    """Linear, tanh, linear, tanh on flat images: what it saves is easily counted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).tanh()).tanh()


@pytest.mark.parametrize("micro_batch", [1, 500])
def test_activations_by_hand(micro_batch):
    """Tanh's results and the images are there when cross-entropy's gradients come.

    Alive at the peak, floats per image: images 48, tanh 64 and 32; and of the 32 logits the log-softmax (saved), its gradient
    and the gradient of the logits. Labels are int64: 2 floats.
    """
    found = activation_bytes(Net(), ImageTask((3, 4, 4)), micro_batch, "no", False)
    floats = 48 + 64 + 32 + 3 * 32 + 2
    slack = 200  # scalars: losses, their gradients
    # targets of the loss are 8 bytes per image; cross-entropy's backward may hold one temporary of the logits more or less
    assert abs(found - 4 * floats * micro_batch) <= 4 * 32 * micro_batch + slack
    assert found > 4 * (48 + 64 + 32) * micro_batch


class Moody(Net):
    """Keeps a copy of its images if there are many."""

    def forward(self, x):
        self.kept = x + 0 if len(x) > 2 else None
        return super().forward(x)


def test_a_model_that_works_differently_on_larger_batches_is_still_measured():
    line = [activation_bytes(Moody(), ImageTask((3, 4, 4)), n, "no", False) for n in (2, 4, 102)]
    assert line[2] == pytest.approx(line[0] + 50 * (line[1] - line[0]))
    assert line[2] > activation_bytes(Net(), ImageTask((3, 4, 4)), 102, "no", False)


def saved_bytes(model, images):
    """Bytes that autograd saves for the backward pass, each storage once, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).sum()
    del loss
    return sum(size for pointer, size in storages.items() if pointer not in own)


def allocator_peak(work):
    """Highest sum of what the CPU allocator handed out during ``work``, by the profiler's own events."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    live = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            highest = max(highest, live)
    return highest


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_allocator_says_the_same(tiny, checkpointed):
    """Against what PyTorch's allocator really handed out for 32 images; kernels' own workspaces are all that is not seen."""
    estimate = activation_bytes(tiny, ImageTask((3, 16, 16)), 32, "no", checkpointed)
    model = copy.deepcopy(tiny).train()
    model.set_grad_checkpointing(checkpointed)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def work():
        images, targets = torch.zeros(32, 3, 16, 16), torch.zeros(32, dtype=torch.long)
        F.cross_entropy(model(images), targets).backward()

    work()
    real = allocator_peak(work)
    assert 0.95 * real < estimate <= 1.001 * real
    assert (
        not 0.95 * real < activation_bytes(tiny, ImageTask((3, 16, 16)), 28, "no", checkpointed) <= 1.001 * real
    )  # twin: 4 fewer


def test_extrapolation_is_the_measurement(tiny):
    """From 2 and 4 images to 32: what measuring 32 gives, and above what autograd saves alone."""
    estimate = activation_bytes(tiny, ImageTask((3, 16, 16)), 32, "no", False)
    model = copy.deepcopy(tiny).train()
    with LiveBytes([*model.parameters(), *model.buffers()]) as counter:
        images, targets = torch.zeros(32, 3, 16, 16), torch.zeros(32, dtype=torch.long)
        F.cross_entropy(model(images), targets).backward()
        for p in model.parameters():
            counter.leave_out(p.grad)
    measured = counter.peak()
    assert estimate == pytest.approx(measured, rel=1e-3)
    saved = saved_bytes(model, torch.zeros(32, 3, 16, 16))
    assert saved < estimate < 1.5 * saved  # temporaries of one block beside what all blocks save
    assert activation_bytes(tiny, ImageTask((3, 16, 16)), 16, "no", False) == pytest.approx(estimate / 2, rel=0.05)


def test_checkpointing_and_bf16_need_less(tiny):
    plain = activation_bytes(tiny, ImageTask((3, 16, 16)), 64, "no", False)
    assert activation_bytes(tiny, ImageTask((3, 16, 16)), 64, "no", True) < 0.7 * plain  # a block of three
    assert (
        0.4 * plain < activation_bytes(tiny, ImageTask((3, 16, 16)), 64, "bf16", False) < 0.95 * plain
    )  # norms stay float32


def real_state(model, config):
    """Bytes of the whole model's optimizer state."""
    optimizer = create_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    for _ in range(6 if config.opt.startswith("lookahead") else 1):
        optimizer.step()
    tensors = [v for state in optimizer.state_dict()["state"].values() for v in state.values()]
    tensors += [q for v in tensors if isinstance(v, list) for q in v]
    return tensor_bytes([v for v in tensors if isinstance(v, torch.Tensor)])


@pytest.mark.parametrize("opt", ["adamw", "sgd", "momentum", "adafactor", "lion", "muon", "lookahead_adamw", "kron"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # opt_einsum, which Kron recommends
def test_optimizer_state_is_exact(tiny, opt):
    if opt in ("muon", "kron") and opt not in getattr(timm.optim, "list_optimizers", list)():
        pytest.skip(f"this timm has no {opt}")
    config = TrainConfig(opt=opt, momentum=0.9)
    tiny.blocks = tiny.blocks[:1]  # the others' parameters have the same shapes
    parameters = list(tiny.parameters())
    found = optimizer_bytes(parameters, config)
    with torch.compiler.set_stance("force_eager"):
        assert found == real_state(copy.deepcopy(tiny), config)
    if opt == "adamw":
        assert found == 2 * tensor_bytes(parameters) + 4 * len(parameters)  # two moments and a step each
    assert optimizer_bytes(parameters[1:], config) < found or found == 0


def test_the_estimate_adds_up_and_leaves_everything_alone(tiny):
    config = TrainConfig(model_ema=True, model_ema_decay=0.9)
    teacher = Net()
    before, generator = copy.deepcopy(tiny.state_dict()), torch.get_rng_state()
    tiny.eval()
    estimate = estimate_memory(tiny, config, ImageTask((3, 16, 16)), 32, teacher=teacher, processes=2)
    weights = tensor_bytes([*tiny.parameters(), *tiny.buffers()])
    assert estimate.parameters == estimate.ema == weights
    assert estimate.gradients == 2 * tensor_bytes(tiny.parameters())
    assert estimate.teacher == 4 * (48 * 64 + 64 + 64 * 32 + 32)
    parts = estimate.parameters + estimate.gradients + estimate.optimizer + estimate.ema + estimate.teacher
    assert estimate.total == parts + estimate.activations
    assert not tiny.training
    assert all(p.grad is None for p in tiny.parameters())
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    tiny.patch_embed.requires_grad_(False)
    frozen = estimate_memory(tiny, TrainConfig(), ImageTask((3, 16, 16)), 32)
    assert frozen.gradients == tensor_bytes(p for p in tiny.parameters() if p.requires_grad)
    assert frozen.ema == frozen.teacher == 0


def test_text():
    text = str(MemoryEstimate(2**20, 2**20, 2**21, 0, 0, 2**31))
    assert text.startswith(
        "about 2.00 GB per device (parameters 1.0 MB, gradients 1.0 MB, optimizer 2.0 MB, activations 2.00 GB)"
    )
