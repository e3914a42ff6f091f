"""The read-out's regression: its ridge is chosen on held-out sequences, so that nothing is learned by heart."""

import pytest
import torch

from tests.reference import make_spec, make_weights
from vit_tucker.attention.variants.tucker.config import TuckerConfig
from vit_tucker.conversion.fit_readout import HeldOut, fit_readout, linear_map
from vit_tucker.tensor.metric import metric_root
from vit_tucker.tensor.regression import LinearMoments


def converted(ranks=(4, 6, 6), dtype=torch.float64):
    spec = make_spec()
    module = TuckerConfig(ranks=ranks, post_ranks=(4, 24, 24)).build(spec, dtype=dtype).eval()
    with torch.no_grad():
        module.convert_from(make_weights(spec))
    return module


def noisy_data(module, sequences, seed, noise=1.0):
    """Features in few directions (and a little in all), targets that the present read-out explains up to noise."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(10, 96, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    few = torch.randn(sequences, 5, 10, generator=g, dtype=torch.float64)
    f = few @ basis + 0.1 * torch.randn(sequences, 5, 96, generator=g, dtype=torch.float64)
    with torch.no_grad():
        y = module.readout(f) * 1.5
    return f, y + noise * y.std() * torch.randn(y.shape, generator=g, dtype=torch.float64)


def fitted(module, f, y, **options):
    sums = HeldOut.like(f[:3], y[:3], centre=True)
    for part in torch.arange(len(f)).split(3):
        sums.add(f[part], y[part], torch.ones(len(part), f.shape[1]))
    with torch.no_grad():
        fit_readout(module, sums, metric_root(torch.eye(24, dtype=torch.float64)), 1e-3, **options)
    return sums


def error(module, f, y):
    with torch.no_grad():
        return (module.readout(f) - y).square().mean().item()


def test_better_on_unseen_data_than_before_and_than_a_weak_ridge(monkeypatch):
    before = converted()
    clean = noisy_data(before, 200, seed=2, noise=0.0)
    data = noisy_data(before, 40, seed=1, noise=0.5)
    chosen, weak = converted(), converted()
    fitted(chosen, *data)
    monkeypatch.setattr("vit_tucker.conversion.fit_readout.RIDGES", (1e-6,))
    monkeypatch.setattr("vit_tucker.conversion.fit_readout.HELD_OUT", 10**9)  # unseen: as if nothing were held out
    fitted(weak, *data)
    assert error(weak, *data) < error(chosen, *data)  # the weak ridge knows its data by heart
    assert error(chosen, *clean) < 0.7 * error(weak, *clean)
    assert error(chosen, *clean) < 0.7 * error(before, *clean)


def test_left_alone_where_no_ridge_gains():
    module = converted()
    f, _ = noisy_data(module, 16, seed=3)
    with torch.no_grad():
        y = module.readout(f)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    fitted(module, f, y + 3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype))
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


def test_one_sequence_is_enough_for_a_fit():
    module = converted()
    f, y = noisy_data(module, 1, seed=4, noise=0.0)
    before = error(module, f, y)
    fitted(module, f, y)
    assert error(module, f, y) < before


def test_every_fourth_sequence_is_held_out_whatever_the_batches():
    module = converted()
    f, y = noisy_data(module, 10, seed=5)
    sums = fitted(module, f, y)
    held = LinearMoments.like(f[:3].flatten(0, 1), y[:3].flatten(0, 1), centre=True)
    held.add(f[3::4].flatten(0, 1), y[3::4].flatten(0, 1), torch.ones(10, dtype=f.dtype))
    torch.testing.assert_close(sums.held.ff, held.ff)
    torch.testing.assert_close(sums.kept.plus(sums.held).count.item(), 50.0)
    assert sums.sequences == 10


@pytest.mark.parametrize("centre", [True, False])
def test_loss_is_the_error_up_to_a_constant(centre):
    g = torch.Generator().manual_seed(0)
    f, y = (torch.randn(40, n, generator=g, dtype=torch.float64) + 3 for n in (7, 5))
    weights = torch.rand(40, generator=g, dtype=torch.float64)
    root = torch.randn(5, 5, generator=g, dtype=torch.float64)
    metric = root.T @ root
    sums = LinearMoments.like(f, y, centre)
    sums.add(f[:25], y[:25], weights[:25])
    rest = LinearMoments.zeros(sums.f_shift, sums.y_shift)
    rest.add(f[25:], y[25:], weights[25:])
    sums = sums.plus(rest)

    def direct(readout, bias):
        return (weights * ((f @ readout.T + bias - y) @ root.T).square().sum(1)).sum().item()

    maps = [(torch.randn(5, 7, generator=g, dtype=torch.float64), torch.randn(5, generator=g, dtype=torch.float64))]
    maps.append((torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)))
    losses, errors = [sums.loss(*m, metric) for m in maps], [direct(*m) for m in maps]
    assert losses[0] - losses[1] == pytest.approx(errors[0] - errors[1], rel=1e-10)
    assert losses[0] != pytest.approx(errors[0] - errors[1] + 1.0, rel=1e-10)


def test_linear_map_is_the_readout():
    module = converted()
    matrix, bias = (t.detach() for t in linear_map(module, 96))
    f = torch.randn(2, 3, 96, dtype=torch.float64)
    torch.testing.assert_close(f @ matrix.T + bias, module.readout(f).detach())
