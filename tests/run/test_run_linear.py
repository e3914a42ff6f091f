"""Runs whose YAML has ``linear:``, beside ``attention:`` or alone: training, resuming, evaluation, tables."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import vit_tucker as vt
from tests.run.tiny import run
from vit_tucker.cli.main import main
from vit_tucker.config.load import load_config
from vit_tucker.linear.base import LINEAR_METHODS
from vit_tucker.patching.record import patch_records
from vit_tucker.run.convert import convert, plan

pytestmark = pytest.mark.slow

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
PLUGIN = """
from typing import Literal
from torch import nn
import vit_tucker as vt

class Kept(vt.LinearModule):
    def __init__(self, spec, **factory):
        super().__init__(spec)
        self.inside = nn.Linear(spec.in_features, spec.out_features, bias=spec.bias, **factory)

    def forward(self, input):
        return self.inside(input)

    def convert_from(self, weights):
        self.inside.weight.copy_(weights.weight)
        self.inside.bias.copy_(weights.bias)

    def dense_weights(self):
        return vt.LinearWeights(self.inside.weight, self.inside.bias).double()

@vt.register_linear_method("kept")
class KeptConfig(vt.LinearConfig):
    method: Literal["kept"] = "kept"

    def build(self, spec, **factory):
        return Kept(spec, **factory)

    def count_parameters(self, spec):
        return vt.ParameterCount(spec.in_features * spec.out_features, spec.bias * spec.out_features)

    def count_flops(self, spec, num_tokens):
        return 2 * num_tokens * spec.in_features * spec.out_features
"""


@pytest.fixture
def write_config(in_tmp: Path) -> Iterator[Callable[..., str]]:
    """Makes the file of a tiny run with ``linear:``, given its other sections."""
    Path("kept.py").write_text(PLUGIN)

    def write(**sections: Any) -> str:
        train = {"epochs": 1, "warmup_epochs": 0, "cpu": True, "global_batch_size": 256, "sched": "constant"}
        values = {
            "plugins": ["kept.py"],
            "output_dir": "out",
            "model": {"name": "vit_tiny_patch16_224", **SIZES},
            "linear": {"method": "kept", "layers": "blocks.*.mlp.fc1"},
            "data": {"dataset": "digits", "num_workers": 0},
            "train": train,
            **sections,
        }
        Path("run.yaml").write_text(yaml.safe_dump(values))
        return "run.yaml"

    yield write
    LINEAR_METHODS.entries.pop("kept", None)


def test_both_sections_train_go_on_and_are_evaluated(write_config: Callable[..., str]) -> None:
    file = write_config(attention={"method": "tucker", "ranks": [1, 8, 8]})
    planned = plan(None, None, file)
    assert [report.slot for report in planned.reports] == ["attention", "linear"]
    done = convert(None, None, Path("converted"), file)
    assert [report.params_after for report in done.reports] == [report.params_after for report in planned.reports]
    assert set(patch_records(vt.load("converted"))) == {"attention", "linear"}
    results = run(load_config(file))
    assert [row["name"] for row in results["linear"]["layers"]] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert results["patch"]["layers"][0]["method"] == "tucker"
    assert results["config"]["linear"]["method"] == "kept"
    stored = json.loads(Path("out/patch.json").read_text())
    assert stored["linear"] == results["linear"]
    assert run(load_config(file))["evaluation"]["count"] > 0
    resumed = run(load_config(file, ["train.epochs=2"]), allow_changes=True)
    assert resumed["epochs"] == 2
    assert resumed["linear"] == results["linear"]
    loaded = vt.load("out")
    assert vt.patch_record(loaded, "linear").config.method == "kept"
    assert loaded(torch.zeros(1, loaded.patch_embed.proj.in_channels, 16, 16)).isfinite().all()


def test_a_linear_patch_alone_trains_resumes_and_is_reported(write_config: Callable[..., str]) -> None:
    """A resumed run has the weights of one that was never stopped; commands that read runs know what was replaced."""
    file = write_config()
    results = run(load_config(file))
    assert results["patch"] is None
    assert [row["name"] for row in results["linear"]["layers"]] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    assert json.loads(Path("out/patch.json").read_text()) == {"linear": results["linear"]}
    resumed = run(load_config(file, ["train.epochs=2"]), allow_changes=True)
    assert resumed["linear"] == results["linear"]
    run(load_config(file, ["train.epochs=2", "output_dir=straight"]))
    loaded, straight = (
        vt.load(folder).state_dict() for folder in ("out/checkpoints/last", "straight/checkpoints/last")
    )
    assert loaded.keys() == straight.keys()
    assert all(torch.equal(value, straight[name]) for name, value in loaded.items())
    model = vt.load("out")
    assert vt.patch_record(model) is None
    assert vt.patch_record(model, "linear").config.layers == "blocks.*.mlp.fc1"
    assert main(["evaluate", "out", "--trust-plugins"]) == 0
    assert main(["tables", "out", "--out", "tables"]) == 0
    assert "| " in Path("tables/tables.md").read_text()


def test_low_rank_layers_are_calibrated_trained_and_stored(write_config: Callable[..., str]) -> None:
    """Beside Tucker Attention, from weights of another run; the stored model has their ranks, and a dense form."""
    dense = run(load_config(write_config(linear=None, output_dir="dense")))
    linear = {"method": "lowrank_linear", "rank": 6, "layers": "blocks.*.mlp.*", "calibration": {"images": 16}}
    model = {"name": "vit_tiny_patch16_224", "checkpoint": "dense", **SIZES}
    file = write_config(model=model, linear=linear, attention={"method": "tucker", "ranks": [2, 8, 8]}, plugins=[])
    results = run(load_config(file))
    rows = results["linear"]["layers"]
    assert [row["name"] for row in rows] == [f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)]
    assert all(0 < row["output_error"] < 1 for row in rows)
    assert "linear" not in dense
    loaded = vt.load("out")
    layers = [module for module in loaded.modules() if isinstance(module, vt.LinearModule)]
    assert [layer.rank_options() for layer in layers] == [{"rank": 6}] * 4
    assert vt.config_of(loaded, slot="linear").calibration.images == 16
    x = torch.randn(2, loaded.patch_embed.proj.in_channels, 16, 16)
    torch.testing.assert_close(vt.dense_model(loaded)(x), loaded(x), rtol=1e-4, atol=1e-5)  # float32
    assert main(["evaluate", "out"]) == 0
    layers[0].resize(rank=3)
    vt.save(loaded, "smaller")
    again = vt.load("smaller")
    assert torch.equal(again(x), loaded(x))
    assert again.blocks[0].mlp.fc1.rank == 3


def test_linear_methods_are_not_calibrated(write_config: Callable[..., str]) -> None:
    with pytest.raises(vt.ConfigError, match=r"run\.yaml:\d+: linear\.calibration: ") as caught:
        load_config(write_config(linear={"method": "kept", "calibration": {"images": 8}}))
    assert "\n" not in str(caught.value)
