"""FSDP2 through Accelerate: sharded training, whole checkpoints, and going on with or without it.

Accelerate shards on GPUs only; the plugin tells it that these two CPU processes are such. All the rest is what runs there.
"""

import csv
import dataclasses
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from tests.training.processes import finish, saved_steps, start_all
from tests.training.test_distributed import RECIPE, data_root

__all__ = ["data_root"]
pytestmark = pytest.mark.skipif(
    "fsdp_version" not in {f.name for f in dataclasses.fields(FullyShardedDataParallelPlugin)},
    reason="this Accelerate has no FSDP2",
)

PLUGIN = """
import os, signal
import vit_tucker
import vit_tucker.run.run as run
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from vit_tucker.storage import weights
from vit_tucker.training.step import OrdinaryStep

create = run.create_accelerator
def sharding(*args):
    accelerator = create(*args)
    if accelerator.num_processes > 1:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator
run.create_accelerator = sharding

@vit_tucker.register_step_rule("watched")
class Watched(OrdinaryStep):
    def step(self, closure, trainer):
        shards = [m for m in trainer.bare.modules() if type(m).__name__ == "FSDPBlock"]
        assert weights.is_sharded(trainer.bare) == (trainer.accelerator.num_processes > 1) == (len(shards) == 1)
        if {stop} and trainer.progress.global_step == {stop}: os.kill(os.getpid(), signal.SIGTERM)
        return super().step(closure, trainer)
"""


def train(processes: int, folder: Path, data_root: Path, *extra: str, stop: int = 0) -> list[int | None]:
    plugin, log = folder.with_suffix(".py"), folder.with_suffix(".log")
    plugin.write_text(PLUGIN.format(stop=stop))
    arguments = [
        *RECIPE,
        f"data.root={data_root}",
        f"output_dir={folder}",
        f"plugins=[{plugin}]",
        "train.step_rule=watched",
        "train.epochs=2",
        *extra,
    ]
    return finish(start_all(processes, arguments, log))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "summary.csv").open() as opened:
        return list(csv.DictReader(opened))


def assert_alike(one: Path, other: Path) -> None:
    for a, b in zip(rows(one), rows(other), strict=True):
        for key in ("train_loss", "eval_loss", "eval_top1"):
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), key  # float32, other orders of summation
    first, second = (load_file(folder / "checkpoints/last/model.safetensors") for folder in (one, other))
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}
    states = [load_file(folder / "checkpoints/last/optimizer.safetensors") for folder in (one, other)]
    assert {k: v.shape for k, v in states[0].items()} == {k: v.shape for k, v in states[1].items()}


def test_sharded_training_is_the_same_training(tmp_path, data_root):
    """Accumulation, clipping and an evaluation set that two processes share unevenly; then each goes on where the other was."""
    folders = [tmp_path / name for name in ("one", "two", "mixed")]
    one, two, mixed = folders
    assert train(1, one, data_root) == [0]
    assert train(2, two, data_root) == [0, 0], two.with_suffix(".log").read_text()
    assert_alike(one, two)
    assert train(2, mixed, data_root, stop=3) == [130, 130], mixed.with_suffix(".log").read_text()
    assert train(1, mixed, data_root, stop=5) == [130], mixed.with_suffix(".log").read_text()
    assert saved_steps(mixed) == 6
    assert train(2, mixed, data_root) == [0, 0], mixed.with_suffix(".log").read_text()
    assert_alike(one, mixed)


def test_fsdp_without_gpus_is_refused(tmp_path, data_root):
    """Accelerate itself would go on with DDP and say nothing."""
    arguments, log = [*RECIPE, f"data.root={data_root}", f"output_dir={tmp_path / 'run'}"], tmp_path / "log"
    assert finish(start_all(2, arguments, log, ACCELERATE_USE_FSDP="true")) == [2, 2]
    assert log.read_text().count("error: the launcher asks for FSDP, which needs GPUs; ") == 1


def test_an_ema_is_refused(tmp_path, data_root):
    folder = tmp_path / "run"
    assert train(2, folder, data_root, "train.model_ema=true") == [2, 2]
    said = folder.with_suffix(".log").read_text()
    assert (
        said.count("error: train.model_ema: not with FSDP2, whose shards it can't follow; use DDP, or turn it off") == 1
    )
    assert not folder.exists()
