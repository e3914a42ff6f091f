"""Calibration of language models on tokens: what counts as a batch, padding, what it gains, cache budgets, what is refused."""

import pytest
import torch

import vit_tucker as vt
from tests.hosts.decoders import make_decoder, small, tokens
from vit_tucker.conversion import collect
from vit_tucker.conversion.collect import collect_inputs
from vit_tucker.conversion.inputs import Tokens
from vit_tucker.patching.full_rank import full_rank_config
from vit_tucker.patching.record import patch_record

pytest.importorskip("transformers")

IDS = tokens(24, 12) % 9 + 2
"""Few tokens, as embeddings with few degrees of freedom: what calibration can make use of."""
LIKELIHOOD = vt.Calibration(objective="likelihood")


def calibrated(batches, name="llama", config=None, **options):
    model = make_decoder(name)
    config = (small(name) if config is None else config).model_copy(update={"calibration": vt.Calibration(**options)})
    return model, vt.patch(model, config, calibration=batches)


def distance(model, reference, ids):
    with torch.no_grad():
        return ((model(ids).logits - reference).norm() / reference.norm()).item()


def same(states):
    return all(torch.equal(states[0][k], v) for state in states[1:] for k, v in state.items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("objective", ["features", "likelihood", "layer"])
def test_calibrated_conversions_are_nearer_on_unseen_tokens(name, objective):
    plain, unseen = make_decoder(name), tokens(8, 12, seed=5) % 9 + 2
    with torch.no_grad():
        reference = plain(unseen).logits
    vt.patch(plain, small(name))
    model, report = calibrated(IDS, name, objective=objective)
    assert distance(model, reference, unseen) < 0.9 * distance(plain, reference, unseen)
    assert all(0 < layer.output_error < 1 for layer in report.layers)
    assert patch_record(model).config.calibration.objective == objective


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "mistral"])
def test_full_rank_stays_exact(name):
    model, unseen = make_decoder(name), tokens(4, 12, seed=5)
    with torch.no_grad():
        reference = model(unseen).logits
    vt.patch(model, full_rank_config(model, "tucker"), calibration=IDS)
    assert distance(model, reference, unseen) < 1e-5  # RMSNorm computes in float32


def test_all_kinds_of_batches_are_the_same_tokens(monkeypatch):
    """A tensor, dicts, tuples, a DataLoader and parts of batches are the same sequences; no more are used than asked for."""
    loader = torch.utils.data.DataLoader(IDS, batch_size=8)
    mappings = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in IDS.split(8)]
    states = []
    for batches in (
        IDS.split(8),
        loader,
        mappings,
        [(part, part) for part in IDS.split(8)],
        [[mapping] for mapping in mappings],
        [*IDS.split(8), IDS],
        IDS.int().split(8),
    ):
        model, report = calibrated(batches, images=24)
        states.append(model.state_dict())
        assert not [note for note in report.notes if "calibration" in note]
    assert same(states)
    assert [len(part) for part in collect_inputs(make_decoder("llama"), IDS, 100)] == [24]
    assert [len(part) for part in collect_inputs(make_decoder("llama"), mappings[0], 5)] == [5]
    monkeypatch.setattr(collect, "TOKENS_PER_PASS", 50)
    assert [len(part) for part in collect_inputs(make_decoder("llama"), [IDS], 10)] == [4, 4, 2]
    assert not same([states[0], calibrated(tokens(24, 12, seed=3))[0].state_dict()])


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_changes_nothing(name, implementation):
    """Batches of several lengths with left padding convert to the layers that the sequences by themselves convert to."""
    if name == "gpt2" and implementation == "flex_attention":
        pytest.skip("transformers' GPT-2 has no flex attention")
    lengths = (12, 7, 9, 12)
    padded, single = [], []
    for seed in range(6):
        ids, mask = tokens(4, 12, seed=seed), torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]
        padded.append({"input_ids": ids * mask, "attention_mask": mask.long()})
        single += [row[12 - length :][None] for row, length in zip(ids, lengths, strict=True)]
    models = [make_decoder(name, torch.float32, attn_implementation=implementation) for _ in range(2)]
    config = small(name).model_copy(update={"calibration": LIKELIHOOD})
    reports = [
        vt.patch(model, config, calibration=given) for model, given in zip(models, (padded, single), strict=True)
    ]
    assert all(model.config._attn_implementation == implementation for model in models)
    unseen = tokens(4, 12, seed=99)
    for model in models:
        model.config._attn_implementation = "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(models[0](unseen).logits, models[1](unseen).logits, rtol=1e-4, atol=1e-4)
    for rows in zip(*(report.layers for report in reports), strict=True):
        assert rows[0].output_error == pytest.approx(rows[1].output_error, rel=1e-3)
    blind = make_decoder(name, torch.float32)
    vt.patch(blind, config, calibration=[batch["input_ids"] for batch in padded])
    assert distance(blind, models[1](unseen).logits.detach(), unseen) > 1e-3  # padding that counts gives other layers


def test_the_model_is_left_as_it_was():
    model = make_decoder("llama").train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    vt.patch(model, small("llama"), calibration=IDS)
    vt.unpatch(model)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("batches", [None, IDS], ids=["weights", "calibrated"])
def test_cache_budgets_hold(share, batches):
    """Key and value ranks within the share of the host's cache; the others as these fill them, or within a budget."""
    entries = 2 * 2 * 2 * 6  # layers, keys and values, heads, width
    parameters = []
    for budget in ({}, {"budget": 0.9}):
        model = make_decoder("llama")
        report = vt.patch(
            model, vt.TuckerConfig(ranks={"cache": share, "multiple_of": 2, **budget}), calibration=batches
        )
        layers = [block.self_attn for block in model.model.layers]
        assert 0.9 * share * entries <= sum(layer.kv_width for layer in layers) <= share * entries
        parameters.append(report.params_after / report.params_before)
        if not budget:
            assert all(ranks[:2] == (4, min(24, 4 * ranks[2])) for layer in layers for ranks in layer.ranks)
    assert parameters[1] <= min(0.9, parameters[0])
    assert (parameters[0] > 0.9) == (share > 0.25)  # narrow latents leave little to fill


def refused(batches, message, **options):
    model = make_decoder("llama")
    with pytest.raises(vt.PatchError, match=message):
        vt.patch(
            model, small("llama").model_copy(update={"calibration": vt.Calibration(**options)}), calibration=batches
        )
    assert patch_record(model) is None


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "^calibration: no sequences$"),
        (
            [torch.zeros(1, 3, 16, 16)],
            r"^calibration: batch 0 is \(1, 3, 16, 16\), not an integer tensor \(B, tokens\)",
        ),
        ([torch.zeros(2, 12)], r"^calibration: batch 0 is \(2, 12\), not an integer tensor"),
        ([{"labels": IDS}], "^calibration: batch 0 is dict, not an integer tensor .* or a mapping with input_ids$"),
        ([IDS, IDS + 60], "^calibration: batch 1 has token 70, but LlamaForCausalLM has 61: another tokenizer's"),
        ([IDS - 5], "^calibration: batch 0 has token -3, but"),
        (
            [{"input_ids": IDS, "attention_mask": torch.ones(24, 9)}],
            r"attention_mask is \(24, 9\), but input_ids are \(24, 12\)",
        ),
        ([{"input_ids": IDS, "attention_mask": torch.zeros(24, 12)}], "^calibration: no sequences$"),
        (["text"], "^calibration: batch 0 is str, not an integer tensor"),
    ],
)
def test_bad_batches_are_refused(batches, message):
    refused(batches, message)


def test_models_without_a_head_have_no_likelihood():
    model = make_decoder("llama").model
    assert isinstance(collect_inputs(model, IDS, 4)[0], Tokens)
    vt.patch(model, small("llama"), calibration=IDS)
    vt.unpatch(model)
    with pytest.raises(
        vt.PatchError, match="^calibration: objective='likelihood' needs scores of tokens, which LlamaModel lacks"
    ):
        vt.patch(model, small("llama").model_copy(update={"calibration": LIKELIHOOD}), calibration=IDS)
