"""Latency in turns: of models whose times are known to differ, and what is left of the models."""

import time

import pytest
import torch
from torch import nn

import vit_tucker as vt
from vit_tucker.analysis.flops import count_cost, count_model_flops
from vit_tucker.analysis.interleaved import WARM_UP
from vit_tucker.analysis.latency import latency_to_dense, measure_latency
from vit_tucker.errors import ConfigError

SIZE = (3, 16, 16)


class Timed(nn.Module):
    """A forward pass of a given time, on a clock that nothing else moves."""

    def __init__(self, clock: list[float], seconds: float):
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, []
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        self.clock[0] += self.seconds
        self.calls.append((self.training, torch.is_grad_enabled(), images.dtype))
        return images * self.weight


def test_ratios_of_known_times(monkeypatch):
    """4 and 20 ms: a ratio of 5, and turns of 20 ms of each."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    fast, slow = Timed(clock, 0.004).train(), Timed(clock, 0.02)
    found = measure_latency({"fast": fast, "slow": slow}, SIZE, 4, "cpu", turns=4, seconds=0.02)
    assert found["fast"].ratio == found["fast"].ratio_low == found["fast"].ratio_high == 1.0
    row = found["slow"]
    assert (row.ratio_low, row.ratio, row.ratio_high) == pytest.approx((5.0, 5.0, 5.0))
    assert (found["fast"].ms, row.ms) == pytest.approx((4.0, 20.0))
    assert (row.device, row.precision, row.batch_size, row.turns) == ("cpu", "no", 4, 4)
    assert row.threads == torch.get_num_threads()
    assert fast.training  # as before
    assert set(fast.calls) == {(False, False, torch.float32)}
    before, after = WARM_UP + 1, 1
    assert (len(fast.calls), len(slow.calls)) == (before + 4 * 5 + after, before + 4 + after)


def test_the_order_alternates():
    order: list[str] = []
    models = {name: nn.Identity() for name in "abc"}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    measure_latency(models, SIZE, 1, "cpu", turns=2, seconds=0.0)
    assert "".join(order).endswith("abccba" + "abc")  # two turns, then the peaks


def test_peak_bytes_by_hand():
    """exp().exp(): two results alive at once; the images do not count."""

    class Twice(nn.Module):
        def forward(self, images):
            return images.exp().exp()

    found = measure_latency({"twice": Twice(), "once": nn.Tanh()}, SIZE, 2, "cpu", turns=2, seconds=0.0)
    one = 4 * 2 * 3 * 16 * 16
    assert (found["twice"].peak_bytes, found["once"].peak_bytes) == (2 * one, one)


def test_bf16_is_autocast():
    seen = []
    linear = nn.Linear(16, 16)
    linear.register_forward_hook(lambda module, args, result: seen.append(result.dtype))
    measure_latency({"linear": linear}, SIZE, 1, "cpu", "bf16", turns=2, seconds=0.0)
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    measure_latency({"linear": linear}, SIZE, 1, "cpu", "no", turns=2, seconds=0.0)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("wrong", [{"precision": "fp8"}, {"batch_size": 0}, {"turns": 1}, {"models": {}}], ids=str)
def test_wrong_arguments_are_refused(wrong):
    given = {"models": {"a": nn.Identity()}, "input_size": SIZE, "batch_size": 1, "device": "cpu", **wrong}
    with pytest.raises(ConfigError):
        measure_latency(**given)


def test_cost_of_a_run(make_vit):
    dense, model = make_vit(dtype=torch.float32), make_vit(dtype=torch.float32)
    vt.patch(model, vt.TuckerConfig(ranks=(2, 4, 4)), keep_originals=False)
    cost = count_cost(model, dense, SIZE)
    assert cost == {
        "flops": count_model_flops(model, SIZE),
        "dense_flops": count_model_flops(dense, SIZE),
        "latency": None,
    }
    assert cost["flops"] < cost["dense_flops"]
    latency = latency_to_dense(model, dense, SIZE, 2, "cpu", "no", turns=2, seconds=0.0)
    assert list(latency) == [
        *("device", "precision", "threads", "batch_size", "turns"),
        *("ms", "ratio", "ratio_low", "ratio_high", "dense_ms"),
    ]
    assert latency["ratio_low"] <= latency["ratio"] <= latency["ratio_high"]
    assert latency["ms"] > 0 < latency["dense_ms"]
