"""What goes wrong in a long run: divergence, full disks, damaged and foreign checkpoints, changed configs, dying processes."""

import json
import math
import os
import pickle
import resource
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import vit_tucker as vt
from tests.run.tiny import config, run, same, trained, weights
from tests.training.rules import AfterStep, RuinGradients, StopAt, with_scale
from vit_tucker.config.load import load_config
from vit_tucker.config.schema import TrainConfig
from vit_tucker.data.faults import FaultLog
from vit_tucker.errors import DivergedError, SaveError
from vit_tucker.run.run import run as run_shown
from vit_tucker.run.trainer import go_on
from vit_tucker.storage import checkpoints
from vit_tucker.storage.checkpoints import fingerprint
from vit_tucker.training import state
from vit_tucker.training.coordination import Coordinator
from vit_tucker.training.monitor import NullMonitor
from vit_tucker.training.optim import create_scheduler
from vit_tucker.training.progress import Progress
from vit_tucker.training.resume import Saved
from vit_tucker.training.saved_state import read_progress
from vit_tucker.training.step import OrdinaryStep

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]
WILD = ["train.lr=1000", "train.weight_decay=1000", "train.opt=sgd", "train.clip_grad=null", "train.warmup_epochs=0"]


def run_to(step: int, given) -> None:
    """A run that is interrupted after this step, without a chance to save."""
    with pytest.raises(KeyboardInterrupt):
        run(given, step_rule=StopAt(step))


def test_divergence_stops_with_step_rate_and_a_state_to_look_at():
    with pytest.raises(DivergedError) as caught:
        run(config("output_dir=a", *WILD))
    folder = next(Path("a").glob("diverged-*"))
    facts = json.loads((folder / "state.json").read_text())
    step = facts["step"]
    assert str(caught.value) == (
        f"the loss is {facts['losses'][-1]} at step {step} (epoch 1, lr {facts['lr'][0]:.3g}); the state after step "
        f"{facts['saved_after_step']} is in {folder}; lower train.lr, or set train.clip_grad or train.mixed_precision"
    )
    assert step == int(folder.name.partition("-")[2]) == facts["saved_after_step"]  # one process sees it at once
    assert facts["lr"][0] == pytest.approx(500 * (1 + math.cos(math.pi * (step - 1) / 10)))  # the rate of that step
    assert not all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
    assert not Path("a/results.json").exists()
    assert not list(Path("a/checkpoints").glob("*"))  # nothing bad to continue from
    Path("b").mkdir()
    Path("b", folder.name).write_text("in the way, as a full disk would be")
    with pytest.raises(
        DivergedError, match=rf"^the loss is .*; the diverged state at step {step} can't be written: File ex.*; lower"
    ):
        run(config("output_dir=b", *WILD))


def test_a_loss_scale_is_reported():
    with pytest.raises(DivergedError, match=r"the loss is .* lr .*, loss scale 512\); the state after step"):
        run(config("output_dir=a", *WILD), step_rule=AfterStep(with_scale(512.0)))
    assert json.loads(next(Path("a").glob("diverged-*/state.json")).read_text())["loss_scale"] == 512.0


def test_weights_ruined_by_a_gradient_are_not_saved():
    """The loss of the step is finite, its gradient is not, and a checkpoint is due: the one before it stays the last."""
    with pytest.raises(DivergedError, match="the gradient is not finite at step 3"):
        run(config("output_dir=a", "train.clip_grad=null", "train.checkpoint_steps=3"), step_rule=RuinGradients(2))
    assert not list(Path("a/checkpoints").glob("step-*"))


def test_a_run_without_a_monitor_trains_and_diverges_alike():
    """What is shown decides nothing: without a monitor the same files, and the same end of a run that diverges."""
    run_shown(config("output_dir=a", "train.epochs=1"))
    results = run_shown(config("output_dir=b", "train.epochs=1"), monitor=NullMonitor())
    assert same(weights("a"), weights("b"))
    assert Path("a/summary.csv").read_bytes() == Path("b/summary.csv").read_bytes()
    assert results["train_seconds"] > 0
    assert list(Path("a").glob("events.*"))
    assert not list(Path("b").glob("events.*"))
    said = []
    for monitor in (None, NullMonitor()):
        with pytest.raises(DivergedError) as caught:
            run_shown(config("output_dir=c", *WILD), monitor=monitor)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_the_scaler_is_restored():
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    run(config("output_dir=a", "train.epochs=1"), step_rule=AfterStep(with_scale(8.0)))
    model, step = torch.nn.Linear(1, 1), int(Path("a/checkpoints/last").resolve().name.partition("-")[2])
    state = json.loads(Path("a/checkpoints/last/state.json").read_text())["progress"]
    progress, scaler = read_progress(state, Path("a/checkpoints/last"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = SimpleNamespace(
        accelerator=accelerator, progress=progress, rule=OrdinaryStep(), config=TrainConfig(), faults=FaultLog(0),
        coordinator=Coordinator(), scheduler=create_scheduler(optimizer, TrainConfig(), 5),
    )  # fmt: skip
    go_on(trainer, Saved(progress, None, scaler), optimizer, 5)
    assert accelerator.scaler.get_scale() == 8.0
    assert progress.global_step == step


@contextmanager
def file_limit():
    """Yields what limits the size of files in this process, as a full disk does: the error comes from the system itself.

    The limit ends with the block and not with the test, between whose phases pytest and coverage write files too.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_keeps_the_checkpoint_before(name):
    trained(config("output_dir=whole", "train.checkpoint_steps=2"))
    size = Path("whole/checkpoints/last", name).stat().st_size - 1  # the optimizer's file is the larger one

    def fill(trainer, result):
        if trainer.progress.global_step == 5:
            limit(size)

    given = config("output_dir=a", "train.checkpoint_steps=2")
    with (
        file_limit() as limit,
        pytest.raises(SaveError, match=r"a checkpoint at step 6 can't be written: .*; the ones before"),
    ):
        run(given, step_rule=AfterStep(fill))
    names = sorted(p.name for p in Path("a/checkpoints").iterdir())
    assert names == ["best", "last", "step-00000004", "step-00000005"]
    run(given)
    assert same(weights("a"), weights("whole"))


def test_a_write_that_the_system_refuses_leaves_no_half():
    small, large = ({"model": {"weight": torch.ones(size)}} for size in (10, 10_000))
    folder = Path("checkpoints")
    state.save_checkpoint(folder, small, ([], {}), {"global_step": 1}, {}, keep=1)
    with file_limit() as limit:
        limit(20_000)
        with pytest.raises(OSError, match="File too large"):
            state.save_checkpoint(folder, large, ([], {}), {"global_step": 2}, {}, keep=1)
    assert sorted(p.name for p in folder.iterdir()) == ["last", "step-00000001"]
    assert checkpoints.newest_intact(folder) == (folder / "step-00000001", [])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_end(capsys):
    trained(config("output_dir=whole", "train.checkpoint_steps=2"))
    run_to(7, config("output_dir=a", "train.checkpoint_steps=2"))
    last = Path("a/checkpoints/step-00000006")
    with (last / "optimizer.safetensors").open("r+b") as torn:
        torn.truncate(1000)
    capsys.readouterr()
    run(config("output_dir=a", "train.checkpoint_steps=2"))
    said = capsys.readouterr().out
    assert "a/checkpoints/step-00000006: damaged: optimizer.safetensors has 1,000 bytes of" in said
    assert "going back to step-00000005" in said
    assert same(weights("a"), weights("whole"))
    assert Path("a/summary.csv").read_text() == Path("whole/summary.csv").read_text()
    assert checkpoints.damage(Path("a/checkpoints/last")) is None
    assert not last.exists()  # replaced when its step came again, and dropped in its turn


def test_best_weights_ahead_of_the_checkpoint_keep_their_score():
    """Killed after the best weights were written and before the checkpoint of their epoch."""
    trained(config("output_dir=whole"))
    with pytest.raises(KeyboardInterrupt):
        run(config("output_dir=a"), monitor=StopAfter(2))
    results = run(config("output_dir=a"))
    assert results["best"] == json.loads(Path("whole/results.json").read_text())["best"]
    assert same(weights("a", "best"), weights("whole", "best"))
    best = Path("a/checkpoints/best/model.safetensors")
    best.write_bytes(best.read_bytes()[:100])
    with pytest.raises(vt.CheckpointError, match=r"best: model.safetensors is not what was saved, and can.t be read"):
        run(config("output_dir=a"))


def test_a_run_killed_before_its_first_checkpoint_starts_from_its_host_again():
    """Its best weights are there already, and are none to go on from."""
    trained(config("output_dir=dense", base="digits/dense"))
    given = ["model.checkpoint=dense", "attention={method: tucker, ranks: [2, 8, 8]}"]
    whole = run(config("output_dir=whole", *given, base="digits/dense"))
    with pytest.raises(KeyboardInterrupt):
        run(config("output_dir=a", *given, base="digits/dense"), monitor=StopAfter(1))
    assert Path("a/checkpoints/best/model.safetensors").is_file()
    results = run(config("output_dir=a", *given, base="digits/dense"))
    assert same(weights("a"), weights("whole"))
    assert results["best"] == whole["best"]
    errors = [run_results["patch"]["layers"][0]["pre_error"] for run_results in (results, whole)]
    assert errors[0] == errors[1] > 0


class StopAfter(NullMonitor):
    """Interrupts a run when an epoch is evaluated and its best weights are written, before its checkpoint is."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def end_epoch(self, progress: Progress) -> None:
        if progress.epoch == self.epoch:
            raise KeyboardInterrupt


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_nothing_of_a_foreign_checkpoint_is_unpickled(name):
    """A pickle in place of a file, with a manifest that knows it: refused in one line, and never executed."""
    trained(config("output_dir=a", "train.checkpoint_hist=1"))
    Path("a/results.json").unlink()  # as if its last epoch were not finished
    folder = Path("a/checkpoints/step-00000010")
    (folder / name).write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: fingerprint(folder / name)}))
    refused = r"step-00000010.*(is not the file that config.json lists|can't be resumed from)"
    with pytest.raises(vt.CheckpointError, match=refused) as caught:
        run(config("output_dir=a", "train.checkpoint_hist=1"))
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Path("executed").exists()  # it would have been


def test_a_changed_config_goes_on_only_by_the_flag(capsys):
    run_to(8, config("output_dir=a", "train.checkpoint_steps=2"))
    changed = config("output_dir=a", "train.checkpoint_steps=2", "train.lr=1e-3", "train.global_batch_size=32")
    refused = (
        "a holds a run with another config: train.global_batch_size: 64 -> 32; train.lr: 0.002 -> 0.001; choose another"
    )
    with pytest.raises(vt.ConfigError, match=f"{refused}.* or continue it .* by --allow-changes"):
        run(changed)
    assert load_config("a").train.lr == 2e-3
    capsys.readouterr()
    results = run(changed, allow_changes=True)
    said = capsys.readouterr().out
    assert "changed: train.lr: 0.002 -> 0.001" in said
    assert "an epoch now has 10 steps: going on from step 6 of it" in said  # 3 of 5 steps were done
    assert load_config("a").train.lr == 1e-3
    assert results["last"]["epoch"] == 2
    longer = config(
        "output_dir=a", "train.checkpoint_steps=2", "train.lr=1e-3", "train.global_batch_size=32", "train.epochs=3"
    )
    assert run(longer, allow_changes=True)["last"]["epoch"] == 3  # a finished run goes on too
    with pytest.raises(vt.CheckpointError, match="is of another model"):
        run(config("output_dir=a", "attention.ranks=[3, 4, 4]"), allow_changes=True)
    assert load_config("a").attention.ranks == (3, 8, 8)


def test_what_changes_nothing_may_change():
    run_to(7, config("output_dir=a"))
    run(config("output_dir=a", "data.num_workers=0", "train.log_interval=7", "train.checkpoint_hist=1"))
    trained(config("output_dir=b"))
    assert same(weights("a"), weights("b"))
    assert Path("a/summary.csv").read_text() == Path("b/summary.csv").read_text()
    assert load_config("a").train.log_interval == 7
