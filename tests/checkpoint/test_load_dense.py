"""A plain timm checkpoint goes into a patched model by conversion; nothing else does."""

import copy
import shutil

import pytest
import torch

import vit_tucker as vt
from tests.checkpoint.small_vit import CONFIG, SMALL, TIMM_TELLS, dense_vit


class TestDenseWeights:
    """A plain timm checkpoint into a patched model, by conversion."""

    @pytest.fixture
    def dense(self):
        return dense_vit(5)

    @pytest.mark.parametrize("method", vt.list_methods())
    def test_dense_weights_are_converted_as_by_patch(self, dense, x, tmp_path, method):
        config = vt.full_rank_config(dense, method)
        model = dense_vit(6)
        vt.patch(model, config)
        assert (model(x) - dense(x)).abs().max() > 1e-2
        vt.load_dense(model, dense.state_dict(), **({} if TIMM_TELLS else {"model_args": SMALL}))
        assert (model(x) - dense(x)).abs().max() < 1e-4  # full rank: float32 rounding of logits of order 1

    def test_all_kinds_of_files(self, dense, model, x, tmp_path):
        more = {} if TIMM_TELLS else {"model_args": SMALL}
        expected = copy.deepcopy(dense)
        vt.patch(expected, CONFIG)
        vt.save(dense, tmp_path / "ours", model_args=SMALL)
        torch.save(dense.state_dict(), tmp_path / "timm.pth")
        shutil.copy(tmp_path / "ours" / "model.safetensors", tmp_path / "some.safetensors")
        for place in ("ours", "timm.pth", "some.safetensors"):
            target = copy.deepcopy(model)
            vt.load_dense(target, tmp_path / place, **more)
            assert torch.equal(target(x), expected(x))

    def test_other_classes_and_sizes_are_adapted_as_timm_does_it(self, model):
        other = dense_vit(5, num_classes=3, img_size=64)
        head = model.head.weight.clone()
        vt.load_dense(model, other.state_dict(), model_args=SMALL)
        assert torch.equal(model.head.weight, head)
        assert model.pos_embed.shape[1] == 17  # 4 x 4 patches of 8 x 8 in the file, and a class token
        assert torch.equal(model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
        converted = copy.deepcopy(other)
        vt.patch(converted, CONFIG)
        assert torch.equal(model.blocks[2].attn.pre_core, converted.blocks[2].attn.pre_core)

    def test_what_is_not_the_hosts_is_refused_and_changes_nothing(self, dense, model, x, tmp_path):
        before = model(x)
        wrong = dense.state_dict()
        wrong.pop("blocks.1.attn.qkv.weight")
        with pytest.raises(
            vt.CheckpointError,
            match=r"load_dense: state dict does not fit .*: it has no blocks\.1\.attn\.qkv\.weight; it is a ViT of 3",
        ):
            vt.load_dense(model, wrong, model_args=SMALL)
        vt.save(model, tmp_path, model_args=SMALL)
        with pytest.raises(vt.CheckpointError, match="patched with tucker, a dense host is needed"):
            vt.load_dense(model, tmp_path)
        with pytest.raises(vt.CheckpointError, match="load_dense: .*none.pth: no such file"):
            vt.load_dense(model, tmp_path / "none.pth")
        (tmp_path / "text.pth").write_text("x")
        with pytest.raises(vt.CheckpointError, match="can't be read as weights"):
            vt.load_dense(model, tmp_path / "text.pth")
        with pytest.raises(vt.CheckpointError, match="not patched"):
            vt.load_dense(dense, dense.state_dict())
        assert torch.equal(model(x), before)
