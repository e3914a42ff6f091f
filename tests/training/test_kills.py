"""Runs killed by SIGKILL, at random moments and at each write of a save, end like the run that nobody killed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import saved_steps, start
from vit_tucker.storage.checkpoints import damage, newest_intact
from vit_tucker.training import state as state_module
from vit_tucker.training.state import save_checkpoint

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.slow

RECIPE = ["model.depth=1", "model.embed_dim=32", "model.num_heads=4", "attention.ranks=[3, 8, 8]", "train.lr=2e-3"]
RECIPE += ["model.drop_path_rate=0.1", "model.proj_drop_rate=0.1", "data.reprob=0.2", "data.num_workers=1"]
RECIPE += ["data.num_samples=352", "train.global_batch_size=32", "train.mixup=0.4", "train.model_ema=true"]
RECIPE += ["train.checkpoint_steps=2", "train.checkpoint_hist=1"]
KILLS, EPOCHS = 8, 8
STEPS = EPOCHS * 11


MORTAL = """
import os
import vit_tucker
from vit_tucker.training.step import OrdinaryStep

@vit_tucker.register_step_rule("mortal")
class Mortal(OrdinaryStep):
    "Sends SIGNAL to the process when MODEL meets its second batch of an evaluation in epoch EPOCH; a third one is an error."
    def __init__(self, options):
        super().__init__(options)
        self.signal, self.batches = int(os.environ.get("SIGNAL", 0)), 0

    def step(self, closure, trainer):
        if self.signal and self.batches == 0 and trainer.progress.epoch == int(os.environ["EPOCH"]):
            model = trainer.bare if os.environ["MODEL"] == "model" else trainer.ema.module
            model.register_forward_pre_hook(self.meet)
            self.batches = 1
        return super().step(closure, trainer)

    def meet(self, model, images):
        if not model.training:
            self.batches += 1
            if self.batches == 3:
                os.kill(os.getpid(), self.signal)
            assert self.batches < 4, "the evaluation went on"
"""


def mortal(folder: Path) -> list[str]:
    """Overrides that have a run use the rule above."""
    (folder / "mortal.py").write_text(MORTAL)
    return [f"plugins=[{folder}/mortal.py]", "train.step_rule=mortal", "train.eval_batch_size=90"]


def started(folder: Path, *extra: str, **environment: str) -> multiprocessing.Process:
    arguments = ["--cfg", "digits/tucker_r16", *RECIPE, f"train.epochs={EPOCHS}", *extra, f"output_dir={folder}"]
    return start(arguments, folder.with_suffix(".log"), shown=False, **environment)


def outcome(folder: Path) -> dict:
    """All that must be the same, bit for bit: weights, EMA, optimizer, best weights, curves, best metric."""
    tensors = {
        f"{file.parent.name}/{file.name}/{key}": value
        for file in [*folder.glob("checkpoints/last/*.safetensors"), folder / "checkpoints/best/model.safetensors"]
        for key, value in load_file(file).items()
    }
    results = json.loads((folder / "results.json").read_text())
    return {
        "tensors": {key: value.numpy().tobytes() for key, value in tensors.items()},
        "summary": (folder / "summary.csv").read_text(),
        "best": results["best"],
        "last": results["last"],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = started(folder)
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The uninterrupted run of three epochs."""
    folder = tmp_path_factory.mktemp("short")
    process = started(folder, "train.epochs=3", "train.eval_batch_size=90")
    process.join()
    assert process.exitcode == 0
    return folder


def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(whole, tmp_path):
    """A quarter of the kills comes within the start's first second; the others anywhere after some more steps.

    On a busy machine the run may end before the last ones.
    """
    folder, moments, reached = tmp_path / "run", random.Random(0), []
    for number in range(KILLS):
        begun = saved_steps(folder)
        goal = begun + moments.uniform(0, (STEPS - begun) / (KILLS - number + 1))
        process = started(folder)
        if number % 4:
            while process.is_alive() and saved_steps(folder) < goal:
                time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05 if number % 4 else 1))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()
        if process.exitcode == 0:
            break
        reached.append(saved_steps(folder))
    process = started(folder)
    process.join()
    assert process.exitcode == 0
    assert len(set(reached)) > KILLS // 3, reached  # it was killed at many places, not in its start alone
    expected, found = outcome(whole), outcome(folder)
    assert found == expected
    rows = expected["summary"].splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == [str(epoch + 1) for epoch in range(EPOCHS)]
    shutil.copy(folder / "checkpoints/last/ema.safetensors", folder / "checkpoints/last/model.safetensors")
    assert outcome(folder) != expected  # the EMA's weights are not the model's: the comparison sees a difference


@pytest.mark.parametrize("evaluated", ["model", "average"])
def test_a_run_killed_in_its_evaluation_ends_like_an_uninterrupted_one(short, tmp_path, evaluated):
    killed = {"SIGNAL": "9", "EPOCH": "1", "MODEL": evaluated}
    for environment, status in ((killed, -signal.SIGKILL), ({}, 0)):
        process = started(tmp_path / "run", *mortal(tmp_path), "train.epochs=3", **environment)
        process.join()
        assert process.exitcode == status, (tmp_path / "run.log").read_text()
    assert outcome(tmp_path / "run") == outcome(short)


def tiny_state(step: int) -> tuple[dict, tuple, dict]:
    model = {"model": {"weight": torch.full((4,), float(step))}, "ema": {"weight": torch.full((4,), step + 0.5)}}
    return model, ([], {"moment": torch.full((4,), step * 2.0)}), {"global_step": step}


def save_and_die(folder: Path, step: int, at: int) -> None:
    """Save a checkpoint; the ``at``-th operation on files never happens, the process dies in its place."""
    left = [at]

    def mortal(function):
        def wrapped(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return wrapped

    os.replace, os.fsync = mortal(os.replace), mortal(os.fsync)
    shutil.rmtree = mortal(shutil.rmtree)
    state_module._write = mortal(state_module._write)
    Path.symlink_to = mortal(Path.symlink_to)
    save_checkpoint(folder, *tiny_state(step), {}, keep=1)


@pytest.mark.parametrize("step", [1, 2], ids=["the same step again", "the next step"])
def test_a_save_killed_at_any_operation_leaves_a_whole_checkpoint(tmp_path, step):
    """Also when it replaces the only checkpoint there is."""
    deaths, operation, found = 0, 0, set()
    while True:
        operation += 1
        folder = tmp_path / str(operation)
        save_checkpoint(folder, *tiny_state(1), {}, keep=1)
        process = FORK.Process(target=save_and_die, args=(folder, step, operation))
        process.start()
        process.join()
        checkpoint, damaged = newest_intact(folder)
        assert damaged == []
        number = json.loads((checkpoint / "state.json").read_text())["progress"]["global_step"]
        assert load_file(checkpoint / "model.safetensors")["weight"].tolist() == [number] * 4
        assert load_file(checkpoint / "optimizer.safetensors")["moment"].tolist() == [number * 2.0] * 4
        found.add(number)
        save_checkpoint(folder, *tiny_state(3), {}, keep=1)
        assert sorted(p.name for p in folder.iterdir()) == ["last", "step-00000003"]  # no leftovers
        if process.exitcode == 0:
            break
        deaths += 1
    assert deaths > 10
    assert found == {1, step}


def test_damage_is_named_and_the_checkpoint_before_it_used(tmp_path):
    for number in (1, 2, 3, 4):
        save_checkpoint(tmp_path, *tiny_state(number), {}, keep=4)
    flipped = bytearray((tmp_path / "step-00000004" / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "step-00000004" / "model.safetensors").write_bytes(flipped)
    torn = (tmp_path / "step-00000003" / "optimizer.safetensors").read_bytes()
    (tmp_path / "step-00000003" / "optimizer.safetensors").write_bytes(torn[:50])
    checkpoint, damaged = newest_intact(tmp_path)
    assert checkpoint == tmp_path / "step-00000002"
    assert damaged == [
        f"{tmp_path}/step-00000004: damaged: model.safetensors is not what was written (SHA-256)",
        f"{tmp_path}/step-00000003: damaged: optimizer.safetensors has 50 bytes of {len(torn)}",
    ]
    (checkpoint / "state.json").unlink()
    assert damage(checkpoint) == "state.json is missing"
    (checkpoint / "manifest.json").write_text("[]")
    assert damage(checkpoint) == "manifest.json is no manifest"
    (checkpoint / "manifest.json").unlink()
    assert "manifest.json can't be read: No such file" in damage(checkpoint)
    assert newest_intact(tmp_path)[0] == tmp_path / "step-00000001"
    (tmp_path / "step-00000001" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-00000001: damaged: files are missing; none is left"):
        newest_intact(tmp_path)
    assert newest_intact(tmp_path / "nothing") == (None, [])
