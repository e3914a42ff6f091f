"""Distillation: the losses by hand and against timm's own, and a student in every kind of wrapper."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import vit_tucker as vt
from vit_tucker.config.train_section import DistillConfig
from vit_tucker.errors import ConfigError
from vit_tucker.training.distill import Distiller, distillation_loss

pytestmark = pytest.mark.slow

LABEL_LOSS = nn.CrossEntropyLoss()


@pytest.fixture
def pair(make_vit):
    """A dense teacher and a patched student that has begun to differ, float64."""
    teacher = make_vit()
    student = copy.deepcopy(teacher)
    vt.patch(student, vt.TuckerConfig(ranks=(2, 4, 4)))
    return teacher, student.train()


def loss_of(distiller, model, images, targets, label_loss=LABEL_LOSS):
    with distiller.observe():
        logits = model(images)
    return distiller(images, logits, targets, label_loss)


def gradient(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def by_formula(student, teacher, images, targets, kind, alpha, temperature, features):
    """The total loss from probabilities, as the papers write it."""
    with torch.no_grad():
        teacher_tokens, teacher_logits = teacher.forward_features(images), teacher(images)
    tokens = student.forward_features(images)
    logits = student.forward_head(tokens)
    label = -logits.log_softmax(-1)[range(len(targets)), targets].mean()
    if kind == "soft":
        p, q = (teacher_logits / temperature).softmax(-1), (logits / temperature).softmax(-1)
        distill = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    else:
        distill = -logits.log_softmax(-1)[range(len(targets)), teacher_logits.argmax(-1)].mean()
    return (1 - alpha) * label + alpha * distill + features * (tokens - teacher_tokens).square().mean()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_loss_and_gradients_follow_the_formula(pair, images, kind):
    teacher, student = pair
    targets = torch.tensor([1, 5])
    config = DistillConfig(kind=kind, alpha=0.3, temperature=2.5, features=0.7)
    loss = loss_of(Distiller(teacher, config, student), student, images, targets)
    wanted = by_formula(student, teacher, images, targets, kind, 0.3, 2.5, 0.7)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)  # float64, a few operations in another order
    found, expected = gradient(loss, student), gradient(wanted, student)
    for name in expected:  # float64 gradients of order 1 through three blocks
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-12, msg=name)
    for wrong in ((kind, 0.7, 2.5, 0.7), (kind, 0.3, 2.5, 0.0), ("hard" if kind == "soft" else "soft", 0.3, 2.5, 0.7)):
        assert not torch.allclose(loss, by_formula(student, teacher, images, targets, *wrong), rtol=1e-6)  # twins


def test_temperature_scales_as_in_hintons_paper():
    """T^2 keeps the gradients' size: for large T they tend to (student - teacher) / classes, centred; without T^2 to zero."""
    student = torch.tensor([[0.2, -1.0, 0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.3, -0.4, 0.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(distillation_loss(student, teacher, "soft", 1e4), student)
    difference = (student - teacher).detach()
    wanted = (difference - difference.mean()) / 4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)  # next term of order 1/T, and T^2 amplifies rounding
    (cold,) = torch.autograd.grad(distillation_loss(student, teacher, "soft", 1.0), student)
    assert not torch.allclose(cold, wanted, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_equal_to_timms_own_task(kind):
    task = pytest.importorskip("timm.task", reason="this timm has no timm.task")
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 7}
    teacher = timm.create_model("vit_tiny_patch16_224", **options)
    student = timm.create_model("deit_tiny_distilled_patch16_224", **options).train()
    teacher.pretrained_cfg = student.pretrained_cfg  # the same normalisation, so that timm hands on the same images
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 6, 2])
    theirs = task.TokenDistillationTask(
        student,
        teacher,
        LABEL_LOSS,
        distill_type=kind,
        task_loss_weight=0.4,
        distill_loss_weight=0.6,
        temperature=3.0,
        verbose=False,
    )
    wanted = theirs(images, targets)["loss"]
    distiller = Distiller(teacher, DistillConfig(kind=kind, alpha=0.6, temperature=3.0), student)
    loss = loss_of(distiller, student, images, targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)  # the same float32 operations on sums of 28 terms
    assert not torch.allclose(loss, distiller.parts["label"], rtol=1e-3)


def test_a_distillation_token_has_a_teacher_of_its_own():
    """In training mode the host returns two logits: labels teach one head, the teacher the other; evaluation is one tensor."""
    student = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=4, num_classes=5
    )
    teacher = copy.deepcopy(student)
    vt.patch(student, vt.TuckerConfig(ranks=(2, 4, 4)))
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 4, 2])
    for alpha, taught, untaught in ((0.0, "head", "head_dist"), (1.0, "head_dist", "head")):
        distiller = Distiller(teacher, DistillConfig(alpha=alpha, temperature=2.0), student.train())
        grads = gradient(loss_of(distiller, student, images, targets), student)
        assert grads[f"{taught}.weight"].abs().max() > 0
        assert grads[f"{untaught}.weight"].abs().max() == 0
    assert student.eval()(images).shape == (4, 5)


def test_a_perfect_student_learns_from_labels_only(make_vit, images):
    teacher = make_vit()
    student = copy.deepcopy(teacher)
    distiller = Distiller(teacher, DistillConfig(alpha=0.25, features=3.0, temperature=2.0), student)
    loss = loss_of(distiller, student, images, torch.tensor([1, 5]))
    # KL of equal float64 distributions: rounding only
    torch.testing.assert_close(loss, 0.75 * distiller.parts["label"], rtol=1e-12, atol=1e-15)
    assert distiller.parts["distill"].abs() < 1e-15
    assert distiller.parts["features"] == 0


def test_the_teacher_stays_as_it_is(pair, images):
    """Frozen, in eval mode, no random number drawn, the same images as the student, mixed targets to the label loss only."""
    teacher, student = pair
    teacher.train()
    distiller = Distiller(teacher, DistillConfig(features=1.0), student)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    seen = []
    teacher.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    generator = torch.get_rng_state()
    mixed = torch.full((2, 7), 1 / 7, dtype=torch.float64)
    loss_of(distiller, student, images, mixed).backward()
    assert torch.equal(generator, torch.get_rng_state())
    assert seen[0] is images
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is not None for p in student.parameters())


def test_observing_leaves_no_trace(pair, images):
    teacher, student = pair
    keys, attributes = list(student.state_dict()), set(student.__dict__)
    distiller = Distiller(teacher, DistillConfig(features=1.0), student)
    loss_of(distiller, student, images, torch.tensor([1, 5]))
    assert list(student.state_dict()) == keys
    assert set(student.__dict__) == attributes
    copied = copy.deepcopy(student)  # as an EMA is made
    with torch.no_grad():
        copied.head.bias.add_(1.0)
        torch.testing.assert_close(
            copied(images), student(images) + 1.0, rtol=0, atol=1e-12
        )  # its own weights, float64
    with pytest.raises(RuntimeError, match="interrupted"), distiller.observe():
        raise RuntimeError("interrupted")
    assert set(student.__dict__) == attributes


class Counter:
    """Backend of torch.compile that runs what Dynamo traced, and counts how often it traced."""

    def __init__(self):
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def process_group(tmp_path):
    """A group of one process."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_students_give_the_same_gradients(pair, images, process_group):
    """DDP, gradient checkpointing, torch.compile (Dynamo traces all of it; no code is generated): as the bare student."""
    teacher, student = pair
    config, targets = DistillConfig(alpha=0.4, features=2.0), torch.tensor([1, 5])
    wanted = gradient(loss_of(Distiller(teacher, config, student), student, images, targets), student)
    assert wanted["head.weight"].abs().max() > 0

    def gradients_through(wrap, checkpointed=False):
        own = copy.deepcopy(student)
        own.set_grad_checkpointing(checkpointed)
        distiller, model = Distiller(teacher, config, own), wrap(own)
        for _ in range(2):  # the second step is that of a compiled, synchronised model
            own.zero_grad()
            loss_of(distiller, model, images, targets).backward()
        return {name: p.grad for name, p in own.named_parameters()}

    counter = Counter()
    for wrap, checkpointed in (
        (lambda m: m, True),
        (DistributedDataParallel, False),
        (lambda m: torch.compile(m, backend=counter), False),
    ):
        found = gradients_through(wrap, checkpointed)
        for name, value in wanted.items():  # float64; DDP divides by one process, Dynamo may reorder
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)
    assert counter.graphs > 0
    without = gradient(F.cross_entropy(student(images), targets), student)
    assert not torch.allclose(
        without["pos_embed"], wanted["pos_embed"], rtol=0, atol=1e-6
    )  # twin: tokens and teacher count


def test_compiled_once_for_all_steps(pair, images):
    teacher, student = pair
    distiller = Distiller(teacher, DistillConfig(features=1.0), student)
    counter = Counter()
    model = torch.compile(student, backend=counter)
    frames = []
    for _ in range(3):
        loss_of(distiller, model, images, torch.tensor([1, 5])).backward()
        frames.append(counter.graphs)
    assert frames[0] > 0
    assert frames == frames[:1] * 3


def test_autocast_of_the_student_is_the_teachers_too(make_vit):
    teacher, student = make_vit(dtype=torch.float32), make_vit(dtype=torch.float32)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    seen = []
    teacher.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    distiller = Distiller(teacher, DistillConfig(features=1.0), student, autocast)
    images = torch.randn(2, 3, 16, 16)
    with distiller.observe(), autocast():
        logits = student(images)
    loss = distiller(images, logits, torch.tensor([1, 5]), LABEL_LOSS)
    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32


def test_pairs_that_do_not_fit_are_refused(make_vit, images):
    student = make_vit()
    with pytest.raises(ConfigError, match="the teacher has 5 classes, the student 7"):
        Distiller(make_vit(num_classes=5), DistillConfig(), student)
    wide = make_vit(embed_dim=48)
    with pytest.raises(ConfigError, match="the teacher has 48 token channels, the student 24"):
        Distiller(wide, DistillConfig(features=0.1), student)
    targets = torch.tensor([1, 5])
    assert loss_of(Distiller(wide, DistillConfig(), student), student, images, targets).isfinite()
    registers = Distiller(make_vit(reg_tokens=2), DistillConfig(features=0.1), student)
    with pytest.raises(ConfigError, match=r"train.distill.features: .*\(2, 17, 24\), the teacher's \(2, 19, 24\)"):
        loss_of(registers, student, images, targets)
    with pytest.raises(ConfigError, match="timm's models"):
        Distiller(nn.Linear(2, 2), DistillConfig(), student)
