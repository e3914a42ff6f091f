"""Sequential calibration: what layers are fitted to is what they meet in the converted model, and makes up for earlier errors."""

import copy

import pytest
import timm
import torch

import vit_tucker as vt
from tests.conversion.test_calibrate import pictures
from tests.hosts.decoders import make_decoder, tokens
from tests.patching.test_families import small_model
from tests.reference import randomise
from vit_tucker.conversion.blocks import adds_output
from vit_tucker.conversion.collect import collect_inputs
from vit_tucker.conversion.observe import CalibratedLayer, WatchedLayer, watching
from vit_tucker.conversion.probes import kept_calls
from vit_tucker.conversion.refine import joined, step_size
from vit_tucker.conversion.stream import BlockStream, replaced
from vit_tucker.hosts.families import read_host
from vit_tucker.hosts.find import find_attention
from vit_tucker.hosts.images import input_shape
from vit_tucker.patching.full_rank import full_rank_config

IDS = tokens(6, 12) % 9 + 2
SEQUENTIAL = vt.Calibration(sequential=True, objective="layer")
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def small_vit(**options):
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "num_classes": 5}
    return randomise(timm.create_model("vit_tiny_patch16_224", **shape, **options)).double().eval()


def make_host(name):
    """A host, its inputs, and whether its blocks add what its attention returns."""
    if name in ("gpt2", "llama", "mistral"):
        return make_decoder(name), list(IDS.split(2)), True
    if name == "granite":
        return make_decoder(name, residual_multiplier=0.5), list(IDS.split(2)), False
    if name == "swin":
        model = randomise(timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **SWIN)).double().eval()
        return model, list(torch.randn(4, 3, 32, 32, dtype=torch.float64).split(2)), False
    return (
        small_vit(**({"init_values": 0.5} if name == "layer scale" else {})),
        list(pictures(6).split(2)),
        name == "vit",
    )


HOSTS = ("vit", "layer scale", "swin", "gpt2", "llama", "mistral", "granite")


def watched(model):
    return [WatchedLayer(name, module, read_host(module, model)) for name, module in find_attention(model).items()]


def seen_by(model, inputs, layers):
    """What the layers meet and return in passes through the model, by name."""
    found = {layer.name: [] for layer in layers}
    with torch.no_grad(), watching(layers, lambda layer, call, y: found[layer.name].append((call.x, y))):
        for batch in inputs:
            batch.features(model)
    return found


def streamed(model, batches, dtype=torch.float64):
    """A model's layers, whose replacements have one key/value head, as every host may; their calls, the inputs and the stream."""
    inputs, layers = collect_inputs(model, batches, 100), []
    for name, module in find_attention(model).items():
        host = read_host(module, model)
        replacement = vt.GQAConfig(num_kv_heads=1).build(host.spec, dtype=dtype).eval()
        with torch.no_grad():
            replacement.convert_from(host.weights.double())
        layers.append(CalibratedLayer(name, module, host, replacement=replacement))
    return layers, kept_calls(model, layers, inputs, SEQUENTIAL, 2**30), inputs, BlockStream(model, layers, inputs)


@pytest.mark.parametrize("name", HOSTS)
def test_tokens_are_those_of_the_converted_model(name):
    """At each layer: as in whole passes of the model with all earlier layers replaced, and not as in the dense model."""
    model, batches, _ = make_host(name)
    layers, calls, inputs, stream = streamed(model, batches)
    state = copy.deepcopy(model.state_dict())
    for number, layer in enumerate(layers):
        with replaced(layers[:number]):
            met = seen_by(model, inputs, layers)[layer.name]
        found = stream.calls(layer, calls[layer.name])
        dense = calls[layer.name]
        assert len(found) == len(met) == len(dense) == len(inputs)
        for call, (x, _), before in zip(found, met, dense, strict=True):
            torch.testing.assert_close(call.x, x.reshape(call.x.shape), rtol=1e-9, atol=1e-9)
            assert torch.equal(call.probe, before.probe)
            assert (number == 0) == torch.equal(call.x, before.x)
        stream.add(layer)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", HOSTS)
def test_targets_make_up_for_errors_where_blocks_add(name):
    """A layer that returned its target would restore the tokens of the dense model; elsewhere the target is the dense output."""
    model, batches, adds = make_host(name)
    layers, calls, _, stream = streamed(model, batches)
    for layer in layers[:2]:
        found = stream.calls(layer, calls[layer.name])
        if layer is layers[0]:
            stream.add(layer)
    changed = [not torch.equal(call.y, before.y) for call, before in zip(found, calls[layer.name], strict=True)]
    assert all(changed) if adds else not any(changed)
    if not adds:
        return
    block = stream.blocks[layer.name]
    for number, call in enumerate(found):
        target = call.y
        handle = layer.module.register_forward_hook(
            lambda module, args, output, y=target: y if isinstance(output, torch.Tensor) else (y, *output[1:])
        )
        with torch.no_grad():
            restored = block.run(number, stream.current[number])
        handle.remove()
        with torch.no_grad():
            torch.testing.assert_close(restored, block.run(number, stream.dense[number]), rtol=1e-9, atol=1e-9)
            assert not torch.allclose(block.run(number, stream.current[number]), restored, rtol=1e-3)


@pytest.mark.parametrize(("name", "adds"), [("llama", True), ("granite", False)])
def test_rounding_of_bfloat16_does_not_hide_what_blocks_add(name, adds):
    model = make_decoder(name, torch.bfloat16, **({} if adds else {"residual_multiplier": 0.5}))
    layers, _, _, stream = streamed(model, [IDS], torch.bfloat16)
    block = stream.blocks[layers[1].name]
    assert (
        adds_output(block, layers[1], stream.blocks[layers[0].name].run(0, stream.blocks[layers[0].name].tokens[0]))
        == adds
    )


@pytest.mark.parametrize(
    "family",
    ["beit_base_patch16_224", "crossvit_tiny_240", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "fastvit_sa12",
     "maxvit_rmlp_pico_rw_256", "metaformer.MetaFormer", "visformer_tiny", "vit_relpos_small_patch16_224", "volo.VOLO"],
)  # fmt: skip
def test_families_can_be_calibrated_in_sequence(family):
    """Grids, windows, channels first, biases by position, several stages: each at full rank, which stays exact."""
    model = small_model(family)
    images = torch.randn(24, *input_shape(model), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
    config = full_rank_config(model, "gqa").model_copy(update={"calibration": SEQUENTIAL})
    vt.patch(model, config, calibration=[images])
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-6, atol=1e-7)


def test_a_layer_between_others_that_stay_dense():
    model = make_decoder("gpt2", n_layer=4)
    exact = vt.patch(model, vt.TuckerConfig(ranks=(4, 24, 24), layers=(0, 2), calibration=SEQUENTIAL), calibration=IDS)
    assert [layer.name for layer in exact.layers] == ["transformer.h.0.attn", "transformer.h.2.attn"]
    assert max(layer.output_error for layer in exact.layers) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_errors_of_the_model_shrink(name):
    """Six layers, cut to a quarter of their ranks: final features are nearer to the dense model's, on inputs never seen."""
    errors = []
    for sequential in (False, True):
        if name == "vit":
            model, given, unseen = small_vit(), pictures(64).split(16), pictures(16, seed=3)
        else:
            model, given, unseen = (
                make_decoder("gpt2", n_layer=6),
                tokens(48, 12) % 9 + 2,
                tokens(16, 12, seed=5) % 9 + 2,
            )

        def features(model, x):
            with torch.no_grad():
                return model.forward_features(x) if name == "vit" else model.transformer(x).last_hidden_state

        reference = features(model, unseen)
        config = vt.TuckerConfig(ranks=(4, 8, 6), calibration=vt.Calibration(sequential=sequential))
        vt.patch(model, config, calibration=given)
        errors.append(((features(model, unseen) - reference).norm() / reference.norm()).item())
    assert errors[1] < 0.97 * errors[0]


def test_blocks_that_cannot_be_followed_are_refused():
    class Twice(torch.nn.Module):
        """A model whose only block is called twice."""

        def __init__(self):
            super().__init__()
            self.block = small_vit().blocks[0]
            self.embed = torch.nn.Conv2d(3, 24, 8, 8).double()

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            return self.block(self.block(x))

    config = vt.TuckerConfig(ranks=(2, 8, 8), calibration=SEQUENTIAL)
    with pytest.raises(
        vt.PatchError, match=r"^block.attn: calibration: sequential=true needs .* once per pass.*; leave it out$"
    ):
        vt.patch(Twice(), config, calibration=[pictures(4)])
    vt.patch(Twice(), config.model_copy(update={"calibration": vt.Calibration()}), calibration=[pictures(4)])


def test_calls_of_few_sequences_are_joined_for_refinement():
    model = make_decoder("llama")
    layers = watched(model)
    inputs = collect_inputs(model, list(tokens(20, 12).split(1)), 100)
    (calls, _) = kept_calls(model, layers, inputs, SEQUENTIAL, 2**30).values()
    found = joined(calls)
    assert [len(call.x) for call in found] == [16, 4]
    assert torch.equal(torch.cat([call.y for call in found]), torch.cat([call.y for call in calls]))
    other = kept_calls(model, layers, collect_inputs(model, [tokens(1, 9)], 9), SEQUENTIAL, 2**30)
    assert [len(call.x) for call in joined([*calls[:2], *other[layers[0].name], *calls[2:4]])] == [2, 1, 2]
    assert step_size(found[0]) == 16
    long = collect_inputs(model, [tokens(20, 250)], 20)
    (call, _) = kept_calls(model, layers, long, SEQUENTIAL, 2**30).values()
    assert step_size(joined(call)[0]) == 12
