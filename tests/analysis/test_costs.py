"""Costs of a model with several methods: against models that are really built, and the ranks that a rule chooses."""

import pytest
import torch

import vit_tucker as vt
from vit_tucker.analysis.costs import HostFactory, activations_per_image, model_costs
from vit_tucker.analysis.flops import count_model_flops
from vit_tucker.analysis.training_memory import activation_bytes
from vit_tucker.checkpoint.host_model import count_parameters
from vit_tucker.config.schema import ModelConfig
from vit_tucker.errors import ConfigError, PatchError
from vit_tucker.training.task import ImageTask

pytestmark = pytest.mark.slow

SMALL = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
SIZE = (3, 32, 32)
METHODS = [
    ("tucker", vt.TuckerConfig(ranks=(3, 8, 8))),
    ("first", vt.MLAConfig(q_lora_rank=8, kv_lora_rank=8, layers=0)),
]


@pytest.fixture
def host():
    return HostFactory(ModelConfig(**SMALL))


def test_numbers_are_those_of_built_models(host):
    """Fake tensors run the kernels of the CPU: the activations are the bytes that a real pass has alive."""
    costs = model_costs(host, METHODS, "bf16", 4)
    assert [cost.label for cost in costs] == ["dense", "tucker", "first"]
    for cost, config in zip(costs, (None, *(config for _, config in METHODS)), strict=True):
        model = host.random()
        flops = vt.plan(model, vt.MHAConfig(init="random")).flops_before
        if config is not None:
            report = vt.patch(model, config, keep_originals=False)
            flops += report.flops_after - report.flops_before
        assert (cost.params, cost.attention_params) == count_parameters(model)
        assert cost.attention_flops == flops
        assert cost.flops == count_model_flops(model, SIZE)
        assert cost.activation_bytes == round(activation_bytes(model, ImageTask(SIZE), 4, "bf16", False) / 4)
        assert cost.latency is None
    bytes_per_token = {cost.label: cost.kv_bytes / (17 * 2) for cost in costs}  # 17 tokens, 2 bytes
    assert bytes_per_token == {"dense": 2 * 96, "tucker": 2 * 16, "first": 96 + 8}
    assert len({cost.activation_bytes for cost in costs}) == 3  # twin: they differ


def test_what_can_not_run_without_values_has_no_activations():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 2)

        def forward(self, images):
            x = self.linear(images.flatten(1)[:, :8])
            return x if x.sum().item() < 1e9 else -x

    assert activations_per_image(Model(), SIZE, 2, "no") is None
    assert activations_per_image(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 2)), SIZE, 2, "no") > 0


def test_latency_is_measured_in_turns(host):
    dense, tucker = model_costs(host, METHODS[:1], "no", 2, torch.device("cpu"), turns=2, seconds=0.0)
    assert dense.latency.ratio == 1.0
    assert (tucker.latency.batch_size, tucker.latency.turns) == (2, 2)
    assert tucker.latency.ms > 0 < tucker.latency.peak_bytes


def test_ranks_by_a_rule_come_from_the_weights(host, tmp_path):
    rule = [("rule", vt.TuckerConfig(ranks={"budget": 0.5}))]
    with pytest.raises(ConfigError, match=r"rule: ranks \{budget: 0.5, .*add model.pretrained=true"):
        model_costs(host, rule)
    model = host.random()
    torch.save(model.state_dict(), tmp_path / "dense.pth")
    trained = HostFactory(ModelConfig(**SMALL, checkpoint=str(tmp_path / "dense.pth")), num_classes=1000)
    dense, cost = model_costs(trained, rule)
    report = vt.patch(model, rule[0][1])
    assert cost.attention_params == report.params_after
    assert 0.4 < cost.attention_params / dense.attention_params <= 0.5
    chosen = vt.patch_record(model).config  # as a finished run's config has it: there is nothing left to choose
    assert model_costs(host, [("chosen", chosen)])[1].attention_params == cost.attention_params


def test_what_does_not_fit_is_named(host):
    with pytest.raises(PatchError, match=r"mine: blocks.0.attn: num_kv_heads=3 must divide"):
        model_costs(host, [("mine", vt.GQAConfig(num_kv_heads=3))])
