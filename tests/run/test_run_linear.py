"""A run whose YAML has ``attention:`` and ``linear:``, by a user's plug-in: it trains, goes on, is evaluated and loaded."""

import json
from pathlib import Path

import torch
import yaml

import vit_tucker as vt
from vit_tucker.config.load import load_config
from vit_tucker.linear.base import LINEAR_METHODS
from vit_tucker.patching.record import patch_records
from vit_tucker.run.convert import convert, plan
from vit_tucker.run.run import run

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


def test_both_sections_train_go_on_and_are_evaluated(in_tmp: Path) -> None:
    Path("kept.py").write_text(PLUGIN)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    values = {
        "plugins": ["kept.py"],
        "output_dir": "out",
        "model": {"name": "vit_tiny_patch16_224", **sizes},
        "attention": {"method": "tucker", "ranks": [1, 8, 8]},
        "linear": {"method": "kept", "layers": "blocks.*.mlp.fc1"},
        "data": {"dataset": "digits", "num_workers": 0},
        "train": {"epochs": 1, "warmup_epochs": 0, "cpu": True, "global_batch_size": 256},
    }
    Path("both.yaml").write_text(yaml.safe_dump(values))
    try:
        planned = plan(None, None, "both.yaml")
        assert [report.slot for report in planned.reports] == ["attention", "linear"]
        done = convert(None, None, Path("converted"), "both.yaml")
        assert [report.params_after for report in done.reports] == [r.params_after for r in planned.reports]
        assert set(patch_records(vt.load("converted"))) == {"attention", "linear"}
        results = run(load_config("both.yaml"))
        assert [row["name"] for row in results["linear"]["layers"]] == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
        assert results["patch"]["layers"][0]["method"] == "tucker"
        assert results["config"]["linear"]["method"] == "kept"
        stored = json.loads(Path("out/patch.json").read_text())
        assert stored["linear"] == results["linear"]
        assert run(load_config("both.yaml"))["evaluation"]["count"] > 0
        resumed = run(load_config("both.yaml", ["train.epochs=2"]), allow_changes=True)
        assert resumed["epochs"] == 2
        assert resumed["linear"] == results["linear"]
        loaded = vt.load("out")
        assert vt.patch_record(loaded, "linear").config.method == "kept"
        assert loaded(torch.zeros(1, loaded.patch_embed.proj.in_channels, 16, 16)).isfinite().all()
    finally:
        LINEAR_METHODS.entries.pop("kept", None)
