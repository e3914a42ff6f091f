"""What goes wrong in a long run: divergence, full disks, damaged and foreign checkpoints, changed configs, dying processes."""

import errno
import json
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vit_tucker as vt
from tests.training.processes import finish, fork, saved_steps, start, start_all
from tests.training.test_run import config, in_tmp, same, weights
from vit_tucker import run as run_module
from vit_tucker.config.load import load_config
from vit_tucker.errors import DivergedError, SaveError
from vit_tucker.run import run
from vit_tucker.training import engine, state
from vit_tucker.training.state import _fingerprint
from vit_tucker.training.trainer import Trainer

__all__ = ["in_tmp"]  # the fixture of whole runs in this process
WILD = ["train.lr=1e18", "train.opt=sgd", "train.clip_grad=null", "train.warmup_epochs=0"]


def run_to(step: int, monkeypatch, given) -> None:
    """A run that is interrupted after this step, without a chance to save."""
    original = engine.train_step

    def stopping(trainer, micro_batches, measure=False):
        if trainer.progress.global_step == step:
            raise KeyboardInterrupt
        return original(trainer, micro_batches, measure)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(given)


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
    assert facts["lr"][0] == pytest.approx(1e18, rel=1e-2)  # the rate of that step, early in the cosine
    assert not all(t.isfinite().all() for t in load_file(folder / "model.safetensors").values())
    assert not Path("a/results.json").exists()
    assert not list(Path("a/checkpoints").glob("*"))  # nothing bad to continue from


def test_a_loss_scale_is_told(monkeypatch):
    """As on a GPU with fp16, here with a scaler that is only asked for its state."""
    original = Trainer.fail_diverged

    def with_scaler(self, losses):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        original(self, losses)

    monkeypatch.setattr(Trainer, "fail_diverged", with_scaler)
    with pytest.raises(DivergedError, match=r"the loss is .* lr .*, loss scale 512\); the state after step"):
        run(config("output_dir=a", *WILD))
    assert json.loads(next(Path("a").glob("diverged-*/state.json")).read_text())["loss_scale"] == 512.0


def test_weights_ruined_by_a_gradient_are_not_saved(monkeypatch):
    """The loss of the step is finite, its gradient is not, and a checkpoint is due: the one before it stays the last."""
    original = engine.gradient_norm

    def ruining(model):
        next(model.parameters()).grad.fill_(float("nan"))
        return original(model)

    monkeypatch.setattr(engine, "gradient_norm", ruining)
    with pytest.raises(DivergedError, match="the gradient is not finite at step 5"):
        run(config("output_dir=a", "train.clip_grad=null", "train.checkpoint_steps=5"))
    assert not list(Path("a/checkpoints").glob("step-*"))


def test_the_scaler_is_restored(monkeypatch):
    states = []
    original = Trainer._scaler_state
    monkeypatch.setattr(
        Trainer, "_scaler_state", lambda self: {**torch.amp.GradScaler("cpu").state_dict(), "scale": 8.0}
    )
    run(config("output_dir=a", "train.epochs=1"))
    monkeypatch.setattr(Trainer, "_scaler_state", original)
    create = run_module.create_accelerator

    def with_scaler(train, folder):
        accelerator = create(train, folder)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        states.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(run_module, "create_accelerator", with_scaler)
    run(config("output_dir=a"), allow_changes=True)
    assert states[0].get_scale() == 8.0


@pytest.mark.parametrize("at", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_keeps_the_checkpoint_before(monkeypatch, at):
    original = state.write_tensors if at.startswith("optim") else state.save_weights
    name = "write_tensors" if at.startswith("optim") else "save_weights"
    saves = []

    def filling(file, *rest):
        saves.append(file)
        if len(saves) == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return original(file, *rest)

    monkeypatch.setattr(state, name, filling)
    with pytest.raises(
        SaveError, match=r"a checkpoint at step 15 can't be written: No space left on device; the ones before"
    ):
        run(config("output_dir=a", "train.checkpoint_steps=5"))
    assert sorted(p.name for p in Path("a/checkpoints").iterdir()) == ["last", "step-00000005", "step-00000010"]
    monkeypatch.setattr(state, name, original)
    run(config("output_dir=a", "train.checkpoint_steps=5"))
    run(config("output_dir=b", "train.checkpoint_steps=5"))
    assert same(weights("a"), weights("b"))


def limited(log: str) -> None:
    """A save where no file may be larger than 20 kB, as on a full disk: the error comes from the system itself."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        weights = {"model": {"weight": torch.zeros(10_000)}}
        state.save_checkpoint(Path("checkpoints"), weights, ([], {}), {"global_step": 2}, {}, keep=1)
    except OSError as error:
        Path(log).write_text(f"OSError {error}")


def test_a_write_that_the_system_refuses_leaves_no_half(tmp_path):
    small = {"model": {"weight": torch.ones(10)}}
    state.save_checkpoint(Path("checkpoints"), small, ([], {}), {"global_step": 1}, {}, keep=1)
    process = fork.Process(target=limited, args=(str(tmp_path / "log"),))
    process.start()
    process.join()
    assert "OSError" in (tmp_path / "log").read_text()
    assert sorted(p.name for p in Path("checkpoints").iterdir()) == ["last", "step-00000001"]
    assert state.newest_intact(Path("checkpoints")) == (Path("checkpoints/step-00000001"), [])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_end(monkeypatch, capsys):
    run(config("output_dir=whole", "train.checkpoint_steps=5"))
    run_to(28, monkeypatch, config("output_dir=a", "train.checkpoint_steps=5"))
    last = Path("a/checkpoints/step-00000025")
    with (last / "optimizer.safetensors").open("r+b") as torn:
        torn.truncate(1000)
    capsys.readouterr()
    run(config("output_dir=a", "train.checkpoint_steps=5"))
    said = capsys.readouterr().out
    assert "a/checkpoints/step-00000025: damaged: optimizer.safetensors has 1,000 bytes of" in said
    assert "going back to step-00000022" in said
    assert same(weights("a"), weights("whole"))
    assert Path("a/summary.csv").read_text() == Path("whole/summary.csv").read_text()
    assert Path("a/checkpoints/damaged-step-00000025").is_dir()


def test_best_weights_ahead_of_the_checkpoint_keep_their_score(monkeypatch):
    """Killed after the best weights were written and before the checkpoint of their epoch."""
    run(config("output_dir=whole"))
    original = Trainer.save

    def killed(self):
        if self.progress.epoch == 2:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(config("output_dir=a"))
    results = run(config("output_dir=a"))
    assert results["best"] == json.loads(Path("whole/results.json").read_text())["best"]
    assert same(weights("a", "best"), weights("whole", "best"))
    best = Path("a/checkpoints/best/model.safetensors")
    best.write_bytes(best.read_bytes()[:100])
    with pytest.raises(vt.CheckpointError, match=r"best/model.safetensors: can't be read"):
        run(config("output_dir=a"))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_nothing_of_a_foreign_checkpoint_is_unpickled(monkeypatch, name):
    """A pickle in place of a file, with a manifest that knows it: refused in one line, and never executed."""
    run_to(28, monkeypatch, config("output_dir=a"))
    folder = Path("a/checkpoints/step-00000022")
    (folder / name).write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: _fingerprint(folder / name)}))
    with pytest.raises(vt.CheckpointError, match=r"step-00000022.*can't be (read|resumed from)") as caught:
        run(config("output_dir=a"))
    assert "\n" not in str(caught.value)
    assert not Path("executed").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert Path("executed").exists()  # it would have been


def test_a_changed_config_goes_on_only_by_the_flag(monkeypatch, capsys):
    run_to(28, monkeypatch, config("output_dir=a", "train.checkpoint_steps=5"))
    changed = config("output_dir=a", "train.checkpoint_steps=5", "train.lr=1e-3", "train.global_batch_size=32")
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
    assert "an epoch now has 44 steps: going on from step 6 of it" in said  # 3 of 22 steps were done
    assert load_config("a").train.lr == 1e-3
    assert results["last"]["epoch"] == 2
    longer = config(
        "output_dir=a", "train.checkpoint_steps=5", "train.lr=1e-3", "train.global_batch_size=32", "train.epochs=3"
    )
    assert run(longer, allow_changes=True)["last"]["epoch"] == 3  # a finished run goes on too
    with pytest.raises(vt.CheckpointError, match="is of another model"):
        run(config("output_dir=a", "attention.ranks=[3, 4, 4]"), allow_changes=True)
    assert load_config("a").attention.ranks == (3, 8, 8)


def test_what_changes_nothing_may_change(monkeypatch):
    run_to(28, monkeypatch, config("output_dir=a"))
    run(config("output_dir=a", "data.num_workers=0", "train.log_interval=7", "train.checkpoint_hist=1"))
    run(config("output_dir=b"))
    assert same(weights("a"), weights("b"))
    assert Path("a/summary.csv").read_text() == Path("b/summary.csv").read_text()
    assert load_config("a").train.log_interval == 7


PLUGIN = """
import os
from vit_tucker.training import engine
original = engine.train_step
def failing(trainer, *rest, **options):
    if os.environ.get("RANK") == "1" and trainer.progress.global_step == 3:
        {action}
    return original(trainer, *rest, **options)
engine.train_step = failing
"""


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("raise RuntimeError('out of tokens')", "process 1 failed: RuntimeError: out of tokens"),
        ("os.kill(os.getpid(), 9)", "process 0 failed: "),
    ],
    ids=["an error", "a kill"],
)
def test_a_process_that_dies_ends_the_run_and_the_log_says_so(tmp_path, action, said):
    folder, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "plugin.py").write_text(PLUGIN.format(action=action))
    arguments = ["--cfg", "digits/tucker_r16", "model.depth=1", "model.embed_dim=32", "attention.ranks=[3, 8, 8]"]
    arguments += [
        "train.cpu=true",
        f"plugins=[{tmp_path}/plugin.py]",
        f"output_dir={folder}",
        "train.timeout_minutes=0.5",
    ]
    before = time.monotonic()
    first, second = finish(start_all(2, arguments, log))
    assert first not in (0, None), log.read_text()  # rank 0 noticed, it did not wait for ever
    assert second not in (0, None)
    assert time.monotonic() - before < 60
    assert said in (folder / "train.log").read_text()
    if "kill" not in action:
        assert (
            "error: process 1: RuntimeError: out of tokens" in log.read_text()
        )  # the first process says whose fault it was
    assert saved_steps(folder) == 0


def test_a_process_that_hangs_ends_the_run_within_the_timeout(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "plugin.py").write_text(PLUGIN.format(action="os.kill(os.getpid(), 19)"))  # SIGSTOP
    arguments = ["--cfg", "digits/tucker_r16", "model.depth=1", "train.cpu=true", "train.timeout_minutes=0.15"]
    arguments += [f"plugins=[{tmp_path}/plugin.py]", f"output_dir={tmp_path}/run"]
    processes = start_all(2, arguments, log)
    (first,) = finish(processes[:1], seconds=60)
    assert first == 1, log.read_text()
    assert processes[1].is_alive()  # it was the timeout that ended the first
    finish(processes[1:], seconds=0)
    said = (tmp_path / "run" / "train.log").read_text()
    assert "process 0 failed: " in said
    assert "9000ms" in said.splitlines()[-1]


def test_a_mistake_that_one_process_meets_in_its_set_up_is_everyones(tmp_path):
    """The data are missing on one machine: all end with status 2, and the first says which process it was."""
    log = tmp_path / "log"
    (tmp_path / "plugin.py").write_text(
        "import os\nfrom vit_tucker import build, errors\nfrom vit_tucker import run\noriginal = run.build_loaders\n"
        "def missing(*a, **k):\n    if os.environ.get('RANK') == '1': raise errors.DataError('no such folder')\n"
        "    return original(*a, **k)\nrun.build_loaders = missing\n"
    )
    arguments = [
        "--cfg",
        "digits/dense",
        "train.cpu=true",
        f"plugins=[{tmp_path}/plugin.py]",
        f"output_dir={tmp_path}/run",
    ]
    assert finish(start_all(2, arguments, log)) == [2, 2], log.read_text()
    assert log.read_text().count("error: process 1: no such folder") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_from_the_command_line_fails_with_status_one(tmp_path):
    arguments = ["--cfg", "digits/dense", "model.depth=1", "model.embed_dim=32", *WILD, f"output_dir={tmp_path}/run"]
    assert finish([start(arguments, tmp_path / "log")]) == [1]
    assert (tmp_path / "log").read_text().splitlines()[-1].startswith("error: the loss is ")


@pytest.fixture
def folder_of_images(tmp_path):
    """48 training images in two classes, three of them bad; 17 to evaluate, two of them bad."""
    generator = np.random.default_rng(0)
    for split, count, bad in (("train", 24, {"a/03", "a/07", "b/11"}), ("validation", 9, {"a/01", "b/02"})):
        for label, shade in (("a", 0), ("b", 120)):
            for number in range(count - (split == "validation" and label == "b")):
                file = tmp_path / "data" / split / label / f"{number:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(shade, shade + 130, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(file)
                if f"{label}/{number:02d}" in bad:
                    file.write_bytes(file.read_bytes()[:60])
    return tmp_path / "data"


IMAGES = ["--cfg", "digits/dense", "data.dataset=folder", "model.num_classes=2", "model.in_chans=3", "model.depth=1"]
IMAGES += [
    "model.embed_dim=32",
    "train.global_batch_size=8",
    "train.epochs=2",
    "train.warmup_epochs=0",
    "data.num_workers=1",
]
IMAGES += ["train.cpu=true", "data.mean=[0.5]", "data.std=[0.5]"]


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_images_are_named_counted_and_skipped_up_to_the_limit(tmp_path, folder_of_images, processes):
    """Two processes meet some each; all are known to both, and the curve is that of one process."""
    for name, limit in (("enough", 5), ("few", 4)):
        arguments = [*IMAGES, f"data.root={folder_of_images}", f"data.max_bad_images={limit}"]
        log = tmp_path / f"{name}.log"
        statuses = finish(start_all(processes, [*arguments, f"output_dir={tmp_path / name}"], log))
        said = log.read_text()
        if name == "enough":
            assert statuses == [0] * processes, said
            results = json.loads((tmp_path / "enough" / "results.json").read_text())
            names = sorted(line.partition(".png")[0][-4:] for line in results["bad_images"])
            assert names == ["a/01", "a/03", "a/07", "b/02", "b/11"]
            assert said.count("bad image ") == 5
            assert "bad image 5 of at most 5: " in said
            assert round(results["last"]["eval_top1"] * 15 / 100, 6).is_integer()  # of 17 images, 15 can be read
        else:
            assert set(statuses) == {2}, said
            assert "5 images could not be read, data.max_bad_images allows 4: " in said
            assert "Traceback" not in said
    if processes == 2:
        one = finish(
            [start([*arguments[:-1], "data.max_bad_images=5", f"output_dir={tmp_path}/one"], tmp_path / "log")]
        )
        assert one == [0]
        losses = [
            (tmp_path / name / "summary.csv").read_text().splitlines()[-1].split(",")[1] for name in ("enough", "one")
        ]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)  # float32, other orders of summation


def test_a_bad_image_stops_a_run_that_allows_none(tmp_path, folder_of_images):
    arguments = [*IMAGES, f"data.root={folder_of_images}", f"output_dir={tmp_path}/run"]
    before = time.monotonic()
    assert finish([start(arguments, tmp_path / "log")]) == [2]
    assert time.monotonic() - before < 20
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: 1 image could not be read, data.max_bad_images allows 0: ")
    assert ".png of split 'train': " in last
