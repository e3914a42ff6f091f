"""Streamed second moments against autograd and against direct formulas."""

import pytest
import torch

from tests.reference import make_angles, make_spec, make_weights, rope_of
from vit_tucker.attention.moment_sums import MomentSums
from vit_tucker.attention.moments import MEANS, LayerCall, Needs
from vit_tucker.attention.rope import RopeSpec

SPEC = make_spec()
B, N, C, H, D = 3, 5, 24, 4, 6


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(x, w, pre=None, post=None, mask=None):
    """The host by its formula, with the folded matrices W_i (H, C + 1, C) and Wt_i (H, C, O) as leaves."""
    pre = w.pre_pairs().dense() if pre is None else pre
    post = w.post_pairs().dense().mT if post is None else post
    ones = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    scores = torch.einsum("bnc,hcd,bmd->bhnm", ones, pre, x) * SPEC.scale
    if mask is not None:
        scores = scores + mask
    return torch.einsum("bhnm,bmc,hco->bno", scores.softmax(-1), x, post)


def collected(x, probe, w=None, spec=SPEC, **options):
    sums = MomentSums(spec, make_weights(spec) if w is None else w)
    sums.add(LayerCall(x, torch.zeros_like(probe), probe, **options))
    return sums.moments()


@pytest.mark.parametrize("masked", [False, True])
def test_key_moments_are_those_of_the_gradients_of_the_scores(masked):
    """With one probed token n the gradient of W_i is scale * x~_n kappa_in^T: kappa's second moment follows from it."""
    w, x, probe = make_weights(SPEC), rand(1, N, C, seed=1), rand(1, N, C, seed=2)
    mask = rand(1, H, N, N, seed=3) if masked else None
    expected = torch.zeros(H, C, C, dtype=torch.float64)
    for n in range(N):
        pre = w.pre_pairs().dense().requires_grad_(True)
        (layer(x, w, pre=pre, mask=mask)[0, n] @ probe[0, n]).backward()
        length = x[0, n].square().sum() + 1
        expected += pre.grad.mT @ pre.grad / (length * SPEC.scale**2) / N
    found = collected(x, probe, attn_mask=mask)
    torch.testing.assert_close(found.key, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(collected(x, probe).key, expected, rtol=1e-3) or not masked


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_key_moments_with_rope_are_those_of_each_rotations_gradients(per_head, half):
    """Score gradients with respect to the cosine and the sine matrix of each rotation, from tokens probed one by one."""
    rope = RopeSpec(1, half, per_head)
    spec = make_spec(rope=rope)
    w, x, probe = make_weights(spec), rand(1, N, C, seed=1) + 1, rand(1, N, C, seed=2)
    angles = torch.nn.functional.pad(make_angles(spec, N), (0, 0, 1, 0))
    turns = angles if per_head else angles.expand(H, -1, -1)  # (H, N, D/2)
    tensor = w.rotary_pairs(rope)
    left, right = (torch.view_as_complex(side.unflatten(-1, (-1, 2))) for side in (tensor.left, tensor.right))
    matrices = torch.einsum("hip,hjp->hpij", left.conj(), right)  # score = Re(x~_m M x~_n exp(i (angle_n - angle_m)))
    ones = torch.cat([x, torch.ones_like(x[..., :1])], -1)[0]
    weights = left.abs().square().sum(1) * right.abs().square().sum(1)
    weights = weights / weights.sum(1, keepdim=True)
    expected = torch.zeros(H, C + 1, C + 1, dtype=torch.float64)
    for n in range(N):
        cosine, sine = matrices.real.clone().requires_grad_(True), (-matrices.imag).clone().requires_grad_(True)
        turn = turns[:, None] - turns[:, n][:, None, None]  # (H, 1, N, D/2)
        products = [torch.einsum("i,hpij,nj->hnp", ones[n], m, ones) for m in (cosine, sine)]
        scores = (products[0] * turn[:, 0].cos() + products[1] * turn[:, 0].sin()).sum(-1) * spec.scale
        averaged = scores.softmax(-1) @ x[0]
        y = torch.einsum("hc,hcd,hdo->o", averaged, w.value, w.out)
        (y @ probe[0, n]).backward()
        for grad in (cosine.grad, sine.grad):
            share = grad * weights.sqrt()[:, :, None, None] / (ones[n].norm() * spec.scale)
            expected += torch.einsum("hpij,hpik->hjk", share, share) / N
    found = collected(x, probe, w, spec=spec, **rope_of(spec, N))
    torch.testing.assert_close(found.key, expected, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(collected(x, probe, w, spec=spec).key, expected, rtol=1e-2)


def test_other_moments_by_their_formulas():
    w, x, probe = make_weights(SPEC), rand(B, N, C, seed=1) + 2, rand(B, N, C, seed=2)
    found = collected(x, probe)
    ones = torch.cat([x, torch.ones(B, N, 1, dtype=torch.float64)], -1).flatten(0, 1)
    torch.testing.assert_close(found.query, ones.mT @ ones / len(ones))
    torch.testing.assert_close(found.mean, x.mean((0, 1)))
    torch.testing.assert_close(found.token_covariance, torch.cov(x.flatten(0, 1).mT, correction=0))
    flat = probe.flatten(0, 1)
    torch.testing.assert_close(found.output, flat.mT @ flat / len(flat))
    scores = torch.einsum(
        "bnc,hcd,bmd->bhnm", torch.cat([x, torch.ones_like(x[..., :1])], -1), w.pre_pairs().dense(), x
    )
    averaged = ((scores * SPEC.scale).softmax(-1) @ x[:, None]).transpose(0, 1).flatten(1, 2)  # (H, B*N, C)
    weights = flat.norm(dim=-1)
    for head in range(H):
        mean = weights @ averaged[head] / weights.sum()
        centred = averaged[head] - mean
        torch.testing.assert_close(found.value_mean[head], mean)
        torch.testing.assert_close(found.value[head], (centred * weights[:, None]).mT @ centred / weights.sum())


def test_gradients_of_queries_keys_and_values():
    w, x, probe = make_weights(SPEC), rand(B, N, C, seed=1), rand(B, N, C, seed=2)
    q, k, v = (
        (torch.einsum("bnc,hcd->bhnd", x, weight) + bias[:, None]).requires_grad_(True)
        for weight, bias in ((w.query, w.query_bias), (w.key, w.key_bias), (w.value, w.value_bias))
    )
    y = torch.einsum("bhnd,hdo->bno", (q @ k.mT * SPEC.scale).softmax(-1) @ v, w.out)
    grads = torch.autograd.grad((y * probe).sum(), (q, k, v))
    joined = [g.transpose(1, 2).flatten(2).flatten(0, 1) for g in grads]
    found = collected(x, probe)
    torch.testing.assert_close(found.query_grad, joined[0].mT @ joined[0] / (B * N), rtol=1e-9, atol=1e-12)
    both = torch.cat(joined[1:], 1)
    torch.testing.assert_close(found.kv_grad, both.mT @ both / (B * N), rtol=1e-9, atol=1e-12)


def test_streaming_in_parts_changes_nothing():
    w, x, probe = make_weights(SPEC), rand(B, N, C, seed=1) + 5, rand(B, N, C, seed=2)
    sums = MomentSums(SPEC, w)
    for part in (slice(0, 1), slice(1, 3)):
        sums.add(LayerCall(x[part], probe[part], probe[part]))
    for name, value in vars(collected(x, probe)).items():
        if name != "tokens":
            torch.testing.assert_close(getattr(sums.moments(), name), value, rtol=1e-9, atol=1e-9)


def test_shifting_all_keys_changes_no_key_moment():
    """The softmax doesn't see a constant added to every key; a metric that did would waste rank on it."""
    w = make_weights(SPEC)
    flat = type(w)(**{**vars(w), "query": w.query * 0, "query_bias": w.query_bias * 0})  # the same softmax for both
    x, probe = rand(B, N, C, seed=1), rand(B, N, C, seed=2)
    here, there = collected(x, probe, flat), collected(x + rand(C, seed=4), probe, flat)
    torch.testing.assert_close(here.key, there.key, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(here.value, there.value, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(here.query, there.query, rtol=1e-2)


def test_float32_moments_of_tokens_far_from_zero():
    """A mean a thousand times the spread must not eat the digits."""
    w, probe = make_weights(SPEC), rand(B, N, C, seed=2)
    x = rand(B, N, C, seed=1) * 0.1 + 100
    single = type(w)(**{k: v.float() for k, v in vars(w).items() if v is not None})
    single = type(w)(**{**vars(single), "query": single.query * 0, "query_bias": single.query_bias * 0})
    double = type(w)(**{**vars(w), "query": w.query * 0, "query_bias": w.query_bias * 0})
    found, expected = collected(x.float(), probe.float(), single), collected(x, probe, double)
    torch.testing.assert_close(found.value, expected.value, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found.key, expected.key, rtol=2e-3, atol=1e-5)


def test_unusable_moments_are_refused_with_the_reason():
    w = make_weights(SPEC)
    with pytest.raises(ValueError, match="no tokens"):
        MomentSums(SPEC, w).moments()
    x = rand(B, N, C)
    with pytest.raises(ValueError, match="inputs are constant"):
        collected(torch.ones_like(x), x)
    with pytest.raises(ValueError, match="no influence"):
        collected(x, torch.zeros_like(x))
    with pytest.raises(ValueError, match="not finite"):
        collected(x * float("inf"), x)


@pytest.mark.parametrize(
    "rope", [None, RopeSpec(1, True, False), RopeSpec(1, False, True)], ids=["plain", "half", "per head"]
)
@pytest.mark.parametrize("biased", [True, False])
def test_sums_over_heads_are_the_means_of_the_heads_moments(rope, biased):
    """What is summed over all heads at once equals what follows from each head's moments; so do the traces."""
    spec = make_spec(rope=rope, qkv_bias=biased)
    w = make_weights(spec)
    calls = [LayerCall(x + 3, x, rand(B, N, C, seed=seed + 9), is_causal=seed == 1, **rope_of(spec, N))
             for seed in (0, 1) for x in (rand(B, N, C, seed=seed),)]  # fmt: skip
    single, both = MomentSums(spec, w), MomentSums(spec, w, MEANS)
    for call in calls:
        single.add(call)
        both.add(call)
    for call in calls:
        both.add_keys(call)
    heads, means = single.moments(), both.moments()
    assert means.key is None
    assert means.value is None
    columns = C + (rope is not None and biased)
    torch.testing.assert_close(means.key_metric(columns), heads.key_metric(columns), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(means.key_traces, heads.key_traces, rtol=1e-9, atol=1e-12)
    for centred in (True, False):
        torch.testing.assert_close(means.value_metric(centred), heads.value_metric(centred), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(means.value_mean, heads.value_mean)
    plain = heads.key[:, :columns, :columns].mean(0)  # not scaled to trace 1: another metric
    assert not torch.allclose(plain / plain.trace(), heads.key_metric(columns), rtol=1e-2)


def test_moments_that_were_not_asked_for_are_refused_by_name():
    sums = MomentSums(SPEC, make_weights(SPEC), Needs("none", "none", gradients=False))
    sums.add(LayerCall(rand(B, N, C), rand(B, N, C), rand(B, N, C, seed=2)))
    moments = sums.moments()
    assert set(sums.sums) == {"query", "output"}
    for name in ("key_mean", "value_covariance", "query_grad"):
        with pytest.raises(ValueError, match=f"'{name}' was not summed"):
            moments.given(name)


@pytest.mark.parametrize("rope", [None, RopeSpec(0, True, False)], ids=["plain", "rope"])
@pytest.mark.parametrize("needs", [Needs(), MEANS], ids=["heads", "means"])
@pytest.mark.parametrize("boolean", [True, False])
def test_padding_counts_nowhere(rope, needs, boolean):
    """A batch of three lengths with left padding has the moments of the sequences by themselves, whatever the padding holds."""
    spec = make_spec(rope=rope)
    w, x, probe = make_weights(spec), rand(B, N, C, seed=1) + 1, rand(B, N, C, seed=2)
    valid = torch.arange(N) >= torch.tensor([[0], [2], [3]])
    table = {} if rope is None else {"rope": rope_of(spec, N)["rope"]}
    mask = valid[:, None, None, :] & torch.ones(N, N, dtype=torch.bool).tril()
    if not boolean:
        mask = torch.zeros(B, 1, N, N, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    padded, alone, blind = MomentSums(spec, w, needs), MomentSums(spec, w, needs), MomentSums(spec, w, needs)
    noise = torch.where(valid.unsqueeze(-1), x, 1e3)
    calls = {padded: [LayerCall(noise, x, probe * valid.unsqueeze(-1), mask, valid=valid, **table)], alone: []}
    calls[blind] = [LayerCall(noise, x, probe * valid.unsqueeze(-1), mask, **table)]
    for row in range(B):
        part = slice(row, row + 1), slice(int(N - valid[row].sum()), N)
        own = {name: value[part[1]] for name, value in table.items()}
        calls[alone].append(LayerCall(x[part], x[part], probe[part], is_causal=True, **own))
    for sums, given in calls.items():
        for call in given:
            sums.add(call)
        for call in given if sums.second_sweep else ():
            sums.add_keys(call)
    assert padded.tokens == alone.tokens == int(valid.sum())
    found, expected = vars(padded.moments()), vars(alone.moments())
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9, msg=name)
    assert not torch.allclose(blind.moments().query, expected["query"], rtol=1e-2)
