"""What the commands share: the device that --device names, and bars that programs never see."""

import io
from contextlib import redirect_stderr

import pytest
import torch

import vit_tucker as vt
from vit_tucker.cli.common import choose_device
from vit_tucker.cli.main import build_parser, main
from vit_tucker.inference.evaluate import on_cpu
from vit_tucker.run.convert import plan

TINY = ["model.depth=1", "model.img_size=32", "model.embed_dim=48", "model.num_heads=4"]
METHOD = "tucker ranks=[2,8,8]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_all_commands_that_run_a_model_take_a_device():
    without = {"push", "export", "hosts", "sweep", "tokenize", "train"}  # files, structures, and configs that say it
    others = {"compare", "tables", "report", "configs", "methods", "models", "schema", "completion", "info"}
    parsers = build_parser()._subparsers._group_actions[0].choices
    for name, parser in parsers.items():
        has = any("--device" in action.option_strings for action in parser._actions)
        assert has or name in without | others, name


def test_a_device_is_one_that_is_there():
    assert choose_device("cpu", double=True) == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(vt.ConfigError, match="--device cuda:99: "):
        choose_device("cuda:99")
    with pytest.raises(vt.ConfigError, match="--device gpu: one of cpu, cuda, mps, xpu"):
        choose_device("gpu")


def test_models_are_planned_where_they_are_told_to_be():
    reports = [plan("vit_tiny_patch16_224", METHOD, None, TINY, device=device).reports for device in ("cpu", "meta")]
    assert [report.layers[0].pre_error is None for (report,) in reports] == [False, True]  # meta has no values


def test_an_evaluation_runs_on_the_cpu_or_a_gpu(monkeypatch):
    assert on_cpu("cpu")
    assert not on_cpu(None)
    assert not on_cpu("cuda")
    with pytest.raises(vt.ConfigError, match="--device mps: an evaluation runs on cpu or cuda"):
        on_cpu("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vt.ConfigError, match="--device cuda:1: the launcher gives each process a GPU of its own"):
        on_cpu("cuda:1")


@pytest.mark.parametrize("json", [True, False])
def test_json_goes_without_progress_bars_in_a_terminal_too(json):
    with redirect_stderr(Terminal()) as shown:
        assert main(["plan", "vit_tiny_patch16_224", "--method", METHOD, *TINY, *(["--json"] if json else [])]) == 0
    assert ("converting blocks.0.attn" in shown.getvalue()) != json
