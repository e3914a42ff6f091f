"""Step rules of a user's own: options from the YAML, their state in checkpoints, and parameters that change their shapes."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import vit_tucker as vt
from tests.run.tiny import config, run, same, weights
from vit_tucker.config.load import load_config
from vit_tucker.config.registries import STEP_RULES
from vit_tucker.config.schema import TrainConfig
from vit_tucker.training.objective import Loss
from vit_tucker.training.optim import create_optimizer
from vit_tucker.training.reshape import replace_parameters
from vit_tucker.training.step import OrdinaryStep, StepResult, create_step_rule, restore_rule

pytestmark = pytest.mark.usefixtures("in_tmp")
SHORT = ["train.epochs=1", "train.warmup_epochs=0", "data.num_samples=352", "train.global_batch_size=32"]  # 11 steps
RESTLESS = """
import torch
import vit_tucker
from pydantic import Field
from vit_tucker.training.step import OrdinaryStep
from vit_tucker.validation.checked import Checked

class Options(Checked):
    every: int = Field(default=2, ge=1, description="Steps between two of noise.")
    size: float = Field(default=0.1, ge=0, description="Of the noise.")

@vit_tucker.register_step_rule("restless")
class Restless(OrdinaryStep):
    Options = Options

    def __init__(self, options):
        super().__init__(options)
        self.noise = torch.Generator().manual_seed(0)
        self.count = 0

    def step(self, closure, trainer):
        result = super().step(closure, trainer)
        self.count += 1
        if self.count % self.options.every == 0:
            head = trainer.bare.head.weight.data
            head += self.options.size * torch.randn(head.shape, generator=self.noise)
        return result

    def state_dict(self):
        return {"noise": self.noise.get_state(), "count": self.count}

    def load_state_dict(self, state):
        self.noise.set_state(state["noise"])
        self.count = int(state["count"])
"""


@pytest.fixture
def restless(in_tmp):
    STEP_RULES.entries.pop("restless", None)
    Path("restless.py").write_text(RESTLESS)
    return "plugins=[restless.py]"


def test_a_rule_has_options_and_a_state_that_goes_on(restless):
    given = [*SHORT, restless, "train.checkpoint_steps=3", "train.step_rule={name: restless, every: 3}"]
    whole = config("output_dir=whole", *given)
    assert whole.train.step_rule == {"name": "restless", "every": 3, "size": 0.1}
    assert load_config("whole" if run(whole) else "").train == whole.train
    rule = create_step_rule(whole.train.step_rule)

    class Stopping(type(rule)):
        def step(self, closure, trainer):
            if trainer.progress.global_step == 8:
                raise KeyboardInterrupt
            return super().step(closure, trainer)

    parts = config("output_dir=parts", *given)
    with pytest.raises(KeyboardInterrupt):
        run(parts, step_rule=Stopping(rule.options))
    state = json.loads(Path("parts/checkpoints/step-00000006/state.json").read_text())["step_rule"]
    assert ["name", "restless"] in state["dict"]
    run(parts)
    assert same(weights("whole"), weights("parts"))
    with pytest.raises(vt.ConfigError, match="train.step_rule.every: 3 -> 2"):
        run(config("output_dir=parts", *SHORT, restless, "train.step_rule=restless"))
    run(config("output_dir=plain", *SHORT))
    assert not same(weights("whole"), weights("plain"))
    assert "step_rule" not in json.loads(Path("plain/checkpoints/last/state.json").read_text())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("restles", r"unknown step rule 'restles', known: .*; did you mean 'restless'\?"),
        ("{name: restless, evry: 2}", r"restless: evry: unknown key; did you mean 'every'\?"),
        ("{name: restless, every: 0}", "restless: every: Input should be greater than or equal to 1, not 0"),
        ("{name: restless, size: .nan}", "restless: size: Input should be greater than or equal to 0, not nan"),
        ("{every: 2}", "name: missing, the name of a registered rule"),
        ("[restless]", "Input should be an object, not "),
    ],
)
def test_mistakes_in_the_yaml_are_one_line(restless, given, message):
    with pytest.raises(vt.ConfigError, match=f"command line: train.step_rule: {message}") as caught:
        config(restless, f"train.step_rule={given}")
    assert "\n" not in str(caught.value)


def test_a_class_that_is_no_rule_is_refused():
    with pytest.raises(vt.ConfigError, match="step rule 'x': object has no step; derive it from OrdinaryStep"):
        vt.register_step_rule("x")(object)
    with pytest.raises(vt.ConfigError, match="step rule 'x': Odd.Options must derive from Checked"):
        vt.register_step_rule("x")(type("Odd", (OrdinaryStep,), {"Options": dict}))


def test_a_state_of_another_kind_is_refused_and_of_another_rule_left_alone():
    rule, given = OrdinaryStep(), {"name": "mine"}
    assert not restore_rule(rule, given, None)
    assert not restore_rule(rule, given, {"name": "other", "state": {"x": 1}})
    assert restore_rule(rule, given, {"name": "mine", "state": {}})
    with pytest.raises(vt.CheckpointError, match="the step rule mine does not fit: ValueError: it has x, which"):
        restore_rule(rule, given, {"name": "mine", "state": {"x": 1}})


class Wide(nn.Module):
    """A model whose hidden width can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.inner(x))

    def narrow(self, width: int) -> dict[nn.Parameter, nn.Parameter]:
        before = dict(self.named_parameters())
        self.inner[0].weight = nn.Parameter(self.inner[0].weight.detach()[:width].clone())
        self.inner[0].bias = nn.Parameter(self.inner[0].bias.detach()[:width].clone())
        self.inner[1] = nn.LayerNorm(width)
        self.head.weight = nn.Parameter(self.head.weight.detach()[:, :width].clone())
        after = dict(self.named_parameters())
        return {old: after[name] for name, old in before.items() if after[name] is not old}


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "sgd"])
def test_reshaped_parameters_train_on_in_optimizer_and_average(opt):
    torch.manual_seed(0)
    model, recipe = Wide(), TrainConfig(opt=opt, weight_decay=0.1)
    optimizer = create_optimizer(model, recipe)
    ema = ModelEmaV3(model, decay=0.5)
    described = []
    trainer = SimpleNamespace(
        bare=model, model=model, optimizer=optimizer, ema=ema, progress=SimpleNamespace(global_step=3), groups=[],
        describe=lambda model: (described.append(model), ({"width": "3"}, None))[1],
    )  # fmt: skip

    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        ema.update(model)

    step()
    kept, average = model.head.bias, ema.module.head.bias.clone()
    moment = copy.deepcopy(optimizer.state.get(kept, {}))
    new = model.narrow(3)
    carried = {
        model.head.weight: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2, 3), "exp_avg_sq": torch.ones(2, 3)}
    }
    replace_parameters(trainer, StepResult(Loss(torch.zeros(()), {}), None, new, carried if opt == "adamw" else {}))
    assert trainer.metadata == {"width": "3"}
    assert described == [model]
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters()}
    assert not any(p is old for p in optimizer.state for old in new)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model.head.weight)] == 0.1
    assert decay[id(model.inner[1].weight)] == 0
    assert str(optimizer.state.get(kept, {})) == str(moment)  # what keeps its shape keeps its state
    if opt == "adamw":
        assert torch.equal(optimizer.state[model.head.weight]["exp_avg"], torch.ones(2, 3))
    averages = dict(ema.module.named_parameters())
    assert {n: p.shape for n, p in averages.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert torch.equal(averages["head.bias"], average)
    assert torch.equal(averages["head.weight"], model.head.weight)
    assert averages["head.weight"].data_ptr() != model.head.weight.data_ptr()
    assert not any(p.requires_grad for p in averages.values())
    before = [p.clone() for p in model.parameters()]
    for _ in range(7):
        step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_rule_that_reports_the_wrong_parameters_is_stopped():
    model = Wide()
    trainer = SimpleNamespace(bare=model, model=model)
    stray = nn.Parameter(torch.ones(2))
    for new in ({stray: nn.Parameter(torch.ones(3))}, {model.head.bias: model.head.weight}):
        with pytest.raises(
            RuntimeError, match="reshaped must be {parameter that left the model: the one in its place}"
        ):
            replace_parameters(trainer, StepResult(Loss(torch.zeros(()), {}), None, new))


def test_a_closure_may_be_called_again_and_repeats_itself():
    """As a rule of second order does: the same images, mixed alike, and the same dropout."""
    seen = []

    class Twice(OrdinaryStep):
        def step(self, closure, trainer):
            first = closure()
            gradients = [p.grad.clone() for p in trainer.bare.parameters()]
            trainer.optimizer.zero_grad()
            result = super().step(closure, trainer)
            seen.append(torch.equal(first.total, result.loss.total))
            seen.append(len(gradients) > 0)
            return result

    options = [*SHORT, "train.mixup=0.5", "model.proj_drop_rate=0.2", "train.grad_accum_steps=2"]
    run(config("output_dir=twice", *options), step_rule=Twice())
    run(config("output_dir=once", *options))
    assert len(seen) == 22
    assert all(seen)
    assert same(weights("once"), weights("twice"))
