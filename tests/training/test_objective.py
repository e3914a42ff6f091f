"""Penalties of a user's own, from the YAML to the gradients of the factors."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import vit_tucker as vt
from tests.run.tiny import config, run, same, trained, weights
from vit_tucker.config.load import load_config
from vit_tucker.config.registries import PENALTIES
from vit_tucker.data.loaders import Batch
from vit_tucker.run.run import run as run_shown
from vit_tucker.training.engine import batch_gradient
from vit_tucker.training.objective import Objective
from vit_tucker.training.progress import Progress

pytestmark = pytest.mark.usefixtures("in_tmp")
FILE = Path(__file__).with_name("norm_penalty.py")
PLUGIN = f"plugins=[{FILE}]"
SHORT = ["train.epochs=1", "train.warmup_epochs=0", "train.lr=0.02", PLUGIN]  # 5 steps


def cores(folder: str) -> list[torch.Tensor]:
    return [value for name, value in weights(folder).items() if name.endswith("_core")]


def distance(folder: str) -> float:
    return sum((core.norm() - 1).square().item() for core in cores(folder))


def test_a_users_penalty_acts_on_every_core_and_is_logged():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(config("output_dir=without", *SHORT))
    results = run_shown(config("output_dir=with", *SHORT, "train.penalties={normed_cores: 3.0}"))
    assert distance("with") < 0.8 * distance("without")
    assert all(not torch.equal(a, b) for a, b in zip(cores("with"), cores("without"), strict=True))
    (row,) = csv.DictReader(Path("with/summary.csv").read_text().splitlines())
    terms = {name: float(row[f"train_loss_{name}"]) for name in ("label", "normed_cores")}
    assert float(row["train_loss"]) == pytest.approx(terms["label"] + 3 * terms["normed_cores"], rel=1e-6)
    assert results["last"]["train_loss_normed_cores"] == terms["normed_cores"]
    events = EventAccumulator("with").Reload()
    logged = [event.value for event in events.Scalars("train/loss_normed_cores")]
    assert sum(logged) / len(logged) == pytest.approx(terms["normed_cores"], rel=1e-6)
    assert len(events.Scalars("train/loss_label")) == len(logged) == 5
    assert Path("without/summary.csv").read_text().startswith("epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n")
    with pytest.raises(vt.ConfigError, match=r"train.penalties.normed_cores: 3.0 -> 0.1"):
        run(config("output_dir=with", *SHORT, "train.penalties={normed_cores: 0.1}"))


def test_a_penalty_of_weight_zero_changes_nothing_and_is_logged():
    run(config("output_dir=without", *SHORT, "model.drop_path_rate=0.1"))
    run(config("output_dir=zero", *SHORT, "model.drop_path_rate=0.1", "train.penalties={normed_cores: 0}"))
    assert same(weights("without"), weights("zero"))
    rows = [next(csv.DictReader(Path(f, "summary.csv").read_text().splitlines())) for f in ("without", "zero")]
    assert rows[0] == {key: value for key, value in rows[1].items() if not key.startswith("train_loss_")}
    assert float(rows[1]["train_loss_normed_cores"]) > 0


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_the_gradient_of_a_penalty_is_that_of_one_step_however_many_micro_batches(count, scale):
    calls = []

    def penalty(model):
        calls.append(1)
        return model.weight.square().sum() / 2

    model, accelerator = nn.Linear(4, 2, bias=False), Accelerator(cpu=True)
    accelerator.scaler = scale and torch.amp.GradScaler("cpu", init_scale=scale)
    nothing = Objective(lambda logits, targets: 0 * logits.sum(), None, {"ridge": (0.5, penalty)})
    trainer = SimpleNamespace(
        accelerator=accelerator, model=model, bare=model, objective=nothing, mixup=None, seed=0, progress=Progress()
    )
    batch = Batch(torch.ones(5, 4), torch.zeros(5, dtype=torch.long), [])
    loss = batch_gradient(trainer, [batch] * count)
    assert len(calls) == 1
    assert torch.equal(model.weight.grad, 0.5 * (scale or 1) * model.weight)
    assert loss.terms == {"label": 0, "ridge": model.weight.square().sum() / 2}
    assert loss.total == loss.terms["ridge"] / 2
    del accelerator.scaler


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{normed_core: 1}",
            r"train.penalties: unknown penalty 'normed_core', known: .*; did you mean 'normed_cores'\?",
        ),
        ("{normed_cores: -1}", "train.penalties.normed_cores: Input should be greater than or equal to 0, not -1"),
        (
            "{normed_cores: .inf}",
            "train.penalties.normed_cores: Input should be less than or equal to 1000000000, not inf",
        ),
        ("{normed_cores: '1'}", "train.penalties.normed_cores: Input should be a valid number, not '1'"),
        ("[normed_cores]", "train.penalties: Input should be an object"),
    ],
)
def test_mistakes_in_the_yaml_are_one_line(given, message):
    with pytest.raises(vt.ConfigError, match=message) as caught:
        config(PLUGIN, f"train.penalties={given}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda model: 1.0, "must return a scalar tensor, not a float"),
        (lambda model: next(model.parameters()), r"must return a scalar tensor, not shape \("),
        (lambda model: torch.tensor(float("nan")), "is nan for the model as it starts"),
        (lambda model: model.nothing, "AttributeError: .* has no attribute 'nothing'"),
    ],
)
def test_a_penalty_that_fails_is_known_before_any_training(value, message):
    PENALTIES.entries.pop("failing", None)
    vt.register_penalty("failing")(value)
    with pytest.raises(vt.ConfigError, match=f"^train.penalties.failing: {message}"):
        run(config("output_dir=a", "train.penalties={failing: 1}"))
    assert not Path("a").exists()


def test_names_are_identifiers_and_taken_once():
    load_config("digits/dense", [PLUGIN])
    for name in ("label", "a b", "normed_cores"):
        with pytest.raises(vt.ConfigError, match=name):
            vt.register_penalty(name)(lambda model: torch.zeros(()))


def test_an_interrupted_epoch_has_the_same_means():
    progress = Progress(steps_per_epoch=4)
    progress.add_losses([1.0, 2.0], {"label": [1.0, 2.0], "ridge": [0.5, 0.5]})
    again = Progress(**json.loads(json.dumps(vars(progress))))
    again.add_losses([3.0], {"label": [3.0], "ridge": [0.25]})
    assert again.term_means() == {"label": 2.0, "ridge": pytest.approx(1.25 / 3)}
    again.finish_epoch({})
    assert again.term_means() == {}
