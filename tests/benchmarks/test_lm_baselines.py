"""Published baselines for KV caches: exact with all entries, as many entries as asked for, and the rules of their papers."""

import itertools

import pytest
import torch

pytest.importorskip("transformers")

from lm_baselines.caching import cached_entries, counted_entries, padding_errors
from lm_baselines.care import adjusted_ranks, care, svd_in_norm
from lm_baselines.energy import key_energies
from lm_baselines.mha2mla import mha2mla, mha2mla_weights
from lm_baselines.moments import attention_layers, dense_entries, layer_moments
from lm_baselines.rorope import rorope, rorope_weights, rotations

from vit_tucker.errors import ConfigError

FULL = 32  # keys and values of two heads with eight columns
EXACT = {
    "RoRoPE": lambda model, moments, entries: rorope(model, moments, entries, rope_heads=2),
    "MHA2MLA": lambda model, moments, entries: mha2mla(model, moments, entries, pairs=4),
    "MHA2MLA, whitened": lambda model, moments, entries: mha2mla(model, moments, entries, pairs=4, whiten=True),
    "CARE-E": lambda model, moments, entries: care(model, moments, entries),
    "CARE-U": lambda model, moments, entries: care(model, moments, entries, adjusted=False),
}
SMALL = EXACT | {
    "RoRoPE, one head": lambda model, moments, entries: rorope(model, moments, entries),
    "RoRoPE, folded": lambda model, moments, entries: rorope(model, moments, entries, collapse=2, fold=4),
    "MHA2MLA, two pairs": lambda model, moments, entries: mha2mla(model, moments, entries, pairs=2),
}


def outputs(model, moments):
    """Outputs of all attention layers on the same random inputs, in float64 throughout."""
    x = torch.randn(2, 9, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    position = model.model.rotary_emb(x, torch.arange(9)[None])
    return torch.stack([
        layer.self_attn(x, position_embeddings=tuple(t.double() for t in position), attention_mask=None)[0]
        for layer in model.model.layers
    ])  # fmt: skip


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("name", EXACT)
def test_exact_with_all_entries(name, host, copied, moments):
    assert dense_entries(host) == FULL
    wanted = outputs(host, moments)
    assert relative(outputs(EXACT[name](copied, moments, FULL), moments), wanted) < 1e-10


@pytest.mark.parametrize("name", EXACT)
def test_two_entries_fewer_are_no_longer_exact(name, host, copied, moments):
    assert relative(outputs(EXACT[name](copied, moments, FULL - 2), moments), outputs(host, moments)) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_so_many_entries_are_cached(name, copied, moments):
    """Where keys are cached rotated, the tensors of transformers' own cache are counted; CARE's are the latents' widths."""
    model = SMALL[name](copied, moments, 20)
    assert cached_entries(model) == 20
    if "CARE" in name:
        widths = [[layer.self_attn.k_proj[0].out_features, layer.self_attn.v_proj[0].out_features]
                  for layer in model.model.layers]  # fmt: skip
        assert [sum(width) for width in zip(*widths, strict=True)] == [20, 20]  # of both layers together, 10 each
    else:
        assert counted_entries(model) == 20


@pytest.mark.parametrize("name", SMALL)
def test_steps_with_a_cache_and_left_padding_are_right(name, copied, moments):
    model = SMALL[name](copied, moments, 20)
    tokens = torch.randint(97, (9,), generator=torch.Generator().manual_seed(4))
    from lm_baselines.caching import last_logits

    whole = model(input_ids=tokens[None]).logits[0]
    for found, place in zip(last_logits(model, tokens[None], 0), (-2, -1), strict=True):
        torch.testing.assert_close(found[0], whole[place], rtol=1e-6, atol=1e-6)
    assert max(padding_errors(model, tokens, 3)) < 1e-5


def test_moments_are_those_of_all_tokens(host, batches, moments):
    seen = []
    handle = attention_layers(host)[1].q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    host(torch.cat(batches))
    handle.remove()
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(moments[1].inputs, x.mT @ x / len(x))
    query = (x @ attention_layers(host)[1].q_proj.weight.mT).detach().unflatten(-1, (6, 8))
    torch.testing.assert_close(moments[1].query_norms[2, 3], query[:, 2, [3, 7]].norm(dim=-1).mean())


def test_padding_among_the_calibration_tokens_is_refused(host, batches):
    given = {"input_ids": batches[0], "attention_mask": torch.ones(4, 16).triu()}
    with pytest.raises(ConfigError, match="attention_mask has zeros"):
        layer_moments(host, [given])


def test_rorope_keeps_more_energy_in_its_first_components_than_the_heads_do(host, moments):
    attention = attention_layers(host)[0]
    key = attention.k_proj.weight.detach()
    turn = rotations(key, moments[0].inputs, 8, 1)
    weights = rorope_weights(attention, moments[0], 20, 1, 1, 1)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(2, dtype=torch.float64).expand(4, 2, 2))
    assert weights.frequencies.tolist() == [[0, 1, 2, 3]]
    held = [((w @ moments[0].inputs) * w).sum() for w in (weights.key_rotated[0], key[:8], key[8:])]
    assert held[0] > max(held[1:])


def test_rorope_s_folded_components_rotate_at_the_frequencies_of_the_authors_code(host, moments):
    """cos[..., ::collapse], with the components of a group at its slots one after the other."""
    attention = attention_layers(host)[0]
    for heads, collapse, fold, wanted in ((1, 1, 2, [0, 1, 2, 3]), (1, 2, 4, [0, 2]), (2, 2, 4, [0, 2, 0, 2])):
        assert rorope_weights(attention, moments[0], 20, heads, collapse, fold).frequencies.tolist() == [wanted]


def test_mha2mla_rotates_the_pairs_that_contribute_most(host, moments):
    attention = attention_layers(host)[0]
    boosted = moments[0]._replace(key_norms=moments[0].key_norms.clone())
    boosted.key_norms[0, 1] *= 1e3
    boosted.key_norms[1, 3] *= 1e3
    assert mha2mla_weights(attention, boosted, 20, 1, False).frequencies.tolist() == [[1], [3]]
    norms = moments[0].query_norms.unflatten(0, (2, 3)).sum(1) * moments[0].key_norms
    assert mha2mla_weights(attention, moments[0], 20, 1, False).frequencies[:, 0].tolist() == norms.argmax(1).tolist()


def test_care_is_the_best_approximation_for_the_calibration_tokens(host, moments):
    """No other of that rank, the weights' own SVD among them, is nearer in the norm of the inputs."""
    weight, inputs = attention_layers(host)[0].k_proj.weight.detach(), moments[0].inputs

    def error(found):
        return (((weight - found) @ inputs) * (weight - found)).sum().item()

    down, s, up = svd_in_norm(weight, inputs, 0.0)
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    best = error(up[:, :6] * s[:6] @ down[:6])
    assert best == pytest.approx(s[6:].square().sum().item(), rel=1e-6)
    assert best < 0.999 * error(u[:, :6] * values[:6] @ vh[:6])


def test_care_gives_more_ranks_to_flat_spectra():
    steep, flat = 0.5 ** torch.arange(16.0, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    ranks = adjusted_ranks([flat, steep, flat, steep], 6)
    assert sum(ranks) == 24
    assert all(3 <= rank <= 12 for rank in ranks)
    assert adjusted_ranks([flat] * 3, 16) == [16, 16, 16]


def test_complex_basis_holds_at_least_the_energy_of_any_real_one(host, moments):
    generator = torch.Generator().manual_seed(5)
    others = [torch.linalg.qr(torch.randn(4, 2, 2, generator=generator, dtype=torch.float64)).Q for _ in range(20)]
    for attention, moment in zip(attention_layers(host), moments, strict=True):
        found = key_energies(attention, moment)
        assert (found.complex >= found.real - 1e-12).all()
        assert found.complex[-1] == pytest.approx(1) == found.real[-1].item()
        for basis in others:
            other = key_energies(attention, moment, basis)
            torch.testing.assert_close(other.complex, found.complex)
            assert (found.complex >= other.real - 1e-12).all()
            assert (found.real >= other.real - 1e-12).all()  # RoRoPE's is the best real one


def test_a_real_basis_loses_half_of_keys_that_differ_by_a_quarter_turn(copied, moments):
    """The twin: one head's pairs are those of the other times i, which one complex component holds and no real one does."""
    attention = attention_layers(copied)[0]
    with torch.no_grad():
        first = attention.k_proj.weight[:8]
        attention.k_proj.weight[8:] = torch.cat([-first[4:], first[:4]])
    found = key_energies(attention, moments[0])
    assert found.complex[3].item() == pytest.approx(1)
    assert found.real[3] < 0.9
    assert not (found.real >= found.complex - 1e-12).all()


@pytest.mark.parametrize(("change", "message"), [("bias", "without biases"), ("norm", "norms on queries")])
def test_hosts_that_the_baselines_do_not_describe_are_refused(change, message, copied):
    attention = copied.model.layers[0].self_attn
    if change == "bias":
        attention.k_proj.bias = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    else:
        attention.q_norm = torch.nn.Identity()
    with pytest.raises(ConfigError, match=message):
        attention_layers(copied)
    with pytest.raises(ConfigError, match=r"no model\.layers"):
        attention_layers(torch.nn.Linear(2, 2))


def test_all_variants_of_the_comparison_have_the_entries(host, batches):
    from lm_baselines.methods import METHODS, Source, rebuild

    source = Source(host, None, torch.cat(batches))
    for method, entries in itertools.product(METHODS, (16, 24)):
        variants = list(METHODS[method](source, entries)) if method != "cacheshrink" else []
        assert len({str(options) for options, _ in variants}) == len(variants)
        assert all(0.8 * entries <= cached_entries(convert()) <= entries for _, convert in variants)
        if variants:
            options, convert = variants[-1]
            again = rebuild(source, method, entries, {**options, "calibration_loss": 1.0})
            torch.testing.assert_close(again.state_dict(), convert().state_dict())
        assert bool(variants) == (method != "cacheshrink" and (method, entries) != ("GQA", 24))
