"""Launchers: the shipped Accelerate configs, and two launchers that make one training over the loopback."""

import csv
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from torch import nn

from tests.conftest import process_environment
from tests.training.test_distributed import RECIPE, ROOT, data_root  # noqa: F401  # a fixture
from vit_tucker.cli import train_main
from vit_tucker.hosts.find import find_attention
from vit_tucker.run.trainer import name_blocks

CONFIGS = ROOT / "experiments" / "accelerate"
PROCESSES = {"cpu": 1, "cpu2": 2, "gpu1": 1, "gpu8": 8, "nodes2x8": 16, "fsdp2": 8}
SCRIPT = str(ROOT / "experiments" / "train_vit.py")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


# ---- the shipped configs


def launch_arguments(file: Path):
    """What `accelerate launch --config_file FILE script.py` makes of a file; unknown keys of a section are refused."""
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(file), "script.py"])
    unknown = set(yaml.safe_load(file.read_text()).get("fsdp_config", {})) - set(vars(args))
    assert not unknown, f"accelerate launch has no such options: {sorted(unknown)}"
    return _validate_launch_command(args)[0]


def known_by_this_accelerate(name: str) -> bool:
    return name != "fsdp2" or "fsdp_version" in vars(launch_command_parser().parse_args(["script.py"]))


def test_every_shipped_config_is_tested():
    assert {file.stem for file in CONFIGS.glob("*")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_launch_accepts_the_config(name):
    if not known_by_this_accelerate(name):
        pytest.skip("this accelerate has no FSDP version 2")
    file = CONFIGS / f"{name}.yaml"
    assert isinstance(load_config_from_file(str(file)), ClusterConfig)
    args = launch_arguments(file)
    assert args.num_processes == PROCESSES[name]
    assert args.num_machines == (2 if name == "nodes2x8" else 1)
    assert args.multi_gpu == (name in ("cpu2", "gpu8", "nodes2x8"))
    assert args.use_fsdp == (name == "fsdp2")
    if args.use_fsdp:
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")


@pytest.mark.parametrize("name", PROCESSES)
def test_config_describes_its_use(name):
    header = (CONFIGS / f"{name}.yaml").read_text().partition("compute_environment")[0]
    assert f"--config_file experiments/accelerate/{name}.yaml" in header
    assert "experiments/train_vit.py --cfg" in header
    assert "# Change" in header


def test_a_typo_in_a_config_is_seen(tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text((CONFIGS / "gpu8.yaml").read_text().replace("num_processes", "num_proceses"))
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(file))
    file.write_text((CONFIGS / "fsdp2.yaml").read_text().replace("fsdp_auto_wrap_policy", "fsdp_auto_wrap_polcy"))
    with pytest.raises(AssertionError, match="fsdp_auto_wrap_polcy"):
        launch_arguments(file)


BLOCKS = {
    "deit_tiny_patch16_224": "Block",
    "beit_base_patch16_224": "Block",
    "eva02_tiny_patch14_224": "EvaBlock",
    "swin_tiny_patch4_window7_224": "SwinTransformerBlock",
    "swinv2_tiny_window8_256": "SwinTransformerV2Block",
}


def sharded_modules(model: nn.Module, names: list[str] | None) -> set[str]:
    """Which modules accelerate would make FSDP2 shards of their own, with the policy of fsdp2.yaml."""
    from accelerate.utils import FullyShardedDataParallelPlugin, fsdp_utils

    settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"].lower(),
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
        transformer_cls_names_to_wrap=names,
    )
    plugin.set_auto_wrap_policy(model)
    prepare = fsdp_utils.fsdp2_prepare_auto_wrap_policy  # the first accelerates with it also want the kind of policy
    kind = ["transformer"] if "auto_wrap_policy_type" in inspect.signature(prepare).parameters else []
    if kind and "getattr(model" not in inspect.getsource(prepare):
        pytest.skip("this accelerate's FSDP version 2 takes models of transformers only")
    policy = prepare(plugin, *kind, model)
    return {name for name, module in model.named_modules() if policy(module)}


@pytest.mark.skipif(not known_by_this_accelerate("fsdp2"), reason="this accelerate has no FSDP version 2")
@pytest.mark.parametrize("name", BLOCKS)
def test_fsdp2_config_shards_the_blocks_that_it_names(name):
    model = timm.create_model(name)
    blocks = {attention.rpartition(".")[0] for attention in find_attention(model)}
    assert BLOCKS[name] in (CONFIGS / "fsdp2.yaml").read_text()
    assert sharded_modules(model, [BLOCKS[name]]) == blocks
    assert sharded_modules(model, None) == set()  # the model as one shard: works everywhere
    name_blocks(model)  # as every run does
    assert sharded_modules(model, None) == blocks
    with pytest.raises(ValueError, match="NoSuchBlock"):
        sharded_modules(model, ["NoSuchBlock"])


# ---- real trainings


def start(launcher: list[str], folder: Path, data: Path) -> subprocess.Popen:
    """A launcher in a session of its own, as on a machine of its own."""
    command = [*LAUNCH, *launcher, SCRIPT, *RECIPE, f"data.root={data}", f"output_dir={folder}"]
    environment = process_environment(ROOT, OMP_NUM_THREADS="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def finish(*launchers: subprocess.Popen) -> list[str]:
    """Outputs of launchers that must all succeed; none is left behind."""
    try:
        outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    for launcher, output in zip(launchers, outputs, strict=True):
        assert launcher.returncode == 0, output
    return outputs


def losses(folder: Path) -> list[list[float]]:
    with (folder / "summary.csv").open() as opened:
        return [[float(row["train_loss"]), float(row["eval_loss"])] for row in csv.DictReader(opened)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory, data_root):  # noqa: F811
    """Folder and outputs of two launchers by cpu2.yaml, of which each starts one of the two processes, as on two machines.

    They run at once, beside a run in this process, which is what they must give.
    """
    folder = tmp_path_factory.mktemp("runs")
    shipped = ["--config_file", str(CONFIGS / "cpu2.yaml"), "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    shipped += ["--main_process_port", free_port()]
    launchers = [start([*shipped, "--machine_rank", rank], folder / "pair", data_root) for rank in ("0", "1")]
    try:
        assert train_main([*RECIPE, f"data.root={data_root}", f"output_dir={folder / 'cpu'}"]) == 0
    finally:
        outputs = finish(*launchers)
    return folder, outputs


def assert_alike(a: Path, b: Path) -> None:
    for row, other in zip(losses(a), losses(b), strict=True):
        assert row == pytest.approx(other, rel=1e-4)  # float32: gradients are summed in another order, over 3 epochs


def test_two_launchers_make_one_training(pair, data_root):  # noqa: F811
    folder, (first, second) = pair
    assert "2 process(es) on cpu" in first
    assert "process(es)" not in second  # one log, on the first machine
    assert json.loads((folder / "pair" / "results.json").read_text())["processes"] == 2
    assert_alike(folder / "pair", folder / "cpu")
    other = folder / "other"
    assert train_main([*RECIPE, f"data.root={data_root}", f"output_dir={other}", "seed=1"]) == 0
    with pytest.raises(AssertionError):  # the tolerance tells two runs apart
        assert_alike(other, folder / "cpu")
