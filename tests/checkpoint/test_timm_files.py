"""What timm's own functions save of a patched model, and the other class that timm makes of one on demand."""

import pickle

import pytest
import timm
import torch

import vit_tucker as vt
from tests.reference import randomise

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}


def patched(name, method, **options):
    """A small random model at full rank: exact, so the dense one is its reference."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = randomise(timm.create_model(name, **SIZES, **options)).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    vt.patch(model, vt.full_rank_config(model, method))
    return model, x, expected


def save_for_hf(model, folder, kind):
    if not hasattr(timm.models, "save_for_hf"):
        pytest.skip("this timm reads no folders")
    timm.models.save_for_hf(model, folder, safe_serialization=kind)


@pytest.mark.parametrize("kind", [False, True, "both"])
def test_folders_of_timm(tmp_path, kind):
    """Through ``local-dir:`` both kinds of files; ``load`` reads safetensors alone and says how to get them."""
    model, x, expected = patched("vit_tiny_patch16_224", "tucker")
    save_for_hf(model, tmp_path, kind)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert vt.patch_record(again).config == vt.patch_record(model).config
    assert timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)(x).shape == (2, 3)
    if kind:
        torch.testing.assert_close(vt.load(tmp_path)(x), expected, rtol=1e-3, atol=1e-4)
    else:
        with pytest.raises(vt.CheckpointError, match="pytorch_model.bin is not read here, .*safe_serialization=True"):
            vt.load(tmp_path)


class Code:
    """What a pickle executes."""

    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_is_executed(tmp_path, capsys):
    model, _, _ = patched("vit_tiny_patch16_224", "tucker")
    save_for_hf(model, tmp_path, False)
    torch.save({**model.state_dict(), "more": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(vt.CheckpointError, match="the weights: .*print"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert "executed" not in capsys.readouterr().out
    pickle.loads(pickle.dumps(Code()))
    assert "executed" in capsys.readouterr().out


NAFLEX = {
    "vit": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "class_token": False, "global_pool": "avg"}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "rope": ("vit_small_patch16_rope_224", {}),
}


@pytest.mark.parametrize(
    ("host", "method"), [("vit", "mha"), ("registers", "gqa"), ("eva02", "mla"), ("rope", "tucker")]
)
def test_vits_come_back_as_naflex_vits(tmp_path, host, method):
    """Where timm's dense models do, by both ways; and the model can be saved again.

    Each host and each method once: what timm renames lies outside the patched layers.
    """
    name, options = NAFLEX[host]
    model, x, expected = patched(name, method, **options)
    try:
        timm.create_model(name, **SIZES, **options, use_naflex=True)
    except TypeError:
        pytest.skip("this timm makes no NaFlexVit of it")
    vt.save(model, tmp_path / "a")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'a'}", pretrained=True, use_naflex=True).eval()
    by_load = vt.load(tmp_path / "a", use_naflex=True)
    vt.save(by_load, tmp_path / "b")
    for again in (by_timm, by_load, vt.load(tmp_path / "b")):
        assert type(again).__name__ == "NaFlexVit"
        assert len(vt.patch_record(again).report.layers) == 2
        torch.testing.assert_close(again(x), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert vt.load(tmp_path / "a", use_naflex=True, num_classes=3)(x).shape == (2, 3)
    with torch.no_grad():
        by_load.blocks[0].attn.proj.weight.zero_()
    assert not torch.allclose(by_load(x), expected, rtol=1e-3)
