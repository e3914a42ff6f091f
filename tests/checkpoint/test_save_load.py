"""A folder that ``save`` wrote is enough to rebuild the model, by ``load`` and by timm; what doesn't fit is refused."""

import copy
import json
import os
import shutil

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import DropPath

import vit_tucker as vt
from tests.checkpoint.small_vit import CONFIG, SMALL, TIMM_TELLS, dense_vit, edit
from tests.patching.test_families import FAMILIES
from tests.patching.trios import HOSTS, METHODS, make_trio
from tests.reference import randomise
from vit_tucker.patching.identity import PATCHED

NAMES = ["ant", "bee", "cat", "dog", "eel"]
PAIRS = [
    *(("vit_1", method) for method in METHODS),
    *(("mixed_1", method) for method in ("tucker", "mla")),
    *(
        ("eva02_1", "tucker"),
        ("dinov3_5", "mla"),
        ("beit", "tucker"),
        ("swin", "gqa"),
        ("vit_5", "mha"),
        ("srelpos", "gqa"),
    ),
]
"""All methods on a plain host, those with rotations of their own on hosts with RoPE too, each other host by one method: how a
host is rebuilt does not depend on the method, nor do a method's tensors on what else the host has."""


@pytest.mark.parametrize(("host", "method"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_all_methods_and_hosts_come_back_bit_exact(host, method, tmp_path):
    trio = make_trio(host, method)
    model = copy.deepcopy(trio.small).float()
    name, own = HOSTS[host]
    vt.save(model, tmp_path, model_args=None if TIMM_TELLS else {**FAMILIES[name], **own})
    loaded = vt.load(tmp_path)
    assert torch.equal(loaded(trio.x.float()), model(trio.x.float()))
    assert {type(m) for m in model.modules()} - {type(m) for m in loaded.modules()} <= {DropPath}
    other = copy.deepcopy(trio.dense).float()
    assert not torch.equal(other(trio.x.float()), model(trio.x.float()))


def test_the_config_says_what_is_in_the_folder(model, tmp_path):
    vt.save(model, tmp_path, label_names=NAMES, data={"mean": (0.1, 0.2, 0.3)})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == PATCHED
    assert config["model_args"]["host"] == "vit_tiny_patch16_224"
    assert config["vit_tucker"]["version"] == vt.__version__
    assert config["vit_tucker"]["method"] == "tucker"
    assert list(config["vit_tucker"]["layers"]) == ["blocks.1.attn", "blocks.2.attn"]
    assert [o["ranks"] for o in config["vit_tucker"]["layers"].values()] == [[2, 8, 8], [3, 16, 12]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = vt.load(tmp_path)
    assert list(loaded.pretrained_cfg["mean"]) == [0.1, 0.2, 0.3]
    assert tuple(loaded.pretrained_cfg["input_size"]) == (3, 32, 32)
    assert list(loaded.pretrained_cfg["label_names"]) == NAMES
    assert not loaded.training


def test_a_loaded_model_can_be_saved_and_loaded_again(model, x, tmp_path):
    vt.save(model, tmp_path / "a", label_names=NAMES)
    vt.save(vt.load(tmp_path / "a"), tmp_path / "b")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    for config in (first, second):  # the order of the entries in a file's header is the library's, and differs
        config["vit_tucker"]["stored"]["files"]["model.safetensors"].pop("sha256")
    assert first == second
    assert torch.equal(vt.load(tmp_path / "b")(x), model(x))


def test_other_classes_and_image_sizes_are_timms_adaptation(model, saved_folder):
    loaded = vt.load(saved_folder, num_classes=3, img_size=64)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    for name, value in model.state_dict().items():
        if not name.startswith(("head.", "pos_embed")):
            assert torch.equal(loaded.state_dict()[name], value), name


def test_a_model_may_come_without_its_classifier(model, x, saved_folder, tmp_path):
    features = vt.load(saved_folder, num_classes=0)
    assert torch.equal(features(x), model.forward_head(model.forward_features(x), pre_logits=True))
    vt.save(features, tmp_path / "features")
    assert torch.equal(vt.load(tmp_path / "features")(x), features(x))


def test_dense_models_are_plain_timm_folders(x, tmp_path):
    dense = dense_vit()
    vt.save(dense, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"
    assert torch.equal(vt.load(tmp_path)(x), dense(x))
    if TIMM_TELLS:
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), dense(x))


def test_ranks_chosen_by_a_rule_and_calibration_need_no_images_again(x, tmp_path):
    model = dense_vit()
    config = vt.TuckerConfig(ranks={"budget": 0.4}, calibration=vt.Calibration(images=8, batch_size=8), backend="eager")
    vt.patch(model, config, calibration=[torch.randn(8, 3, 32, 32)])
    vt.save(model, tmp_path)
    loaded = vt.load(tmp_path)
    assert torch.allclose(loaded(x), model(x), atol=1e-5)  # another backend: rounding of float32
    before, after = (vt.patch_record(m).config for m in (model, loaded))
    assert after.model_dump(mode="json") == {**before.model_dump(mode="json"), "backend": "auto"}


@pytest.mark.skipif(not TIMM_TELLS, reason="this timm has no local-dir: models and saves no arguments")
def test_timms_functions_save_and_load_patched_models(model, x, tmp_path):
    vt.save(model, tmp_path / "ours")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'ours'}", pretrained=True, num_classes=2).eval()
    assert torch.equal(loaded.blocks[2].attn.readout(loaded.blocks[2].attn.mix(torch.ones(1, 4, 48))),
                       model.blocks[2].attn.readout(model.blocks[2].attn.mix(torch.ones(1, 4, 48))))  # fmt: skip
    timm.models.save_for_hf(model, str(tmp_path / "timms"), safe_serialization=True)
    assert torch.equal(vt.load(tmp_path / "timms")(x), model(x))
    again = timm.create_model(f"local-dir:{tmp_path / 'timms'}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))


@pytest.mark.skipif(not TIMM_TELLS, reason="this timm has no local-dir: models")
def test_timm_without_the_package_refuses_and_never_loads_half_a_model(tmp_path, monkeypatch):
    """Under the host's own name, timm would load what fits once the number of classes differs, and train on noise."""
    from timm.models import _registry

    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    vt.patch(model, vt.GQAConfig(num_kv_heads=2))
    vt.save(model, tmp_path)
    monkeypatch.delitem(_registry._model_entrypoints, PATCHED)
    for more in ({}, {"num_classes": 3}):
        with pytest.raises(RuntimeError, match=f"Unknown model.*{PATCHED}"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **more)
    edit(tmp_path, architecture="vit_tiny_patch16_224", model_args__host=None, model_args__patch=None)
    silent = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3)  # what the name protects from
    assert hasattr(silent.blocks[1].attn, "qkv")
    with pytest.raises(vt.CheckpointError, match=r"blocks\.0\.attn\.qkv"):
        vt.load(tmp_path, num_classes=3, verify=False)


def test_unpatched_models_save_as_dense_models(x, tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    before = dict(dense.pretrained_cfg), dict(vars(dense).get("_model_args", {}))
    vt.patch(dense, CONFIG)
    assert dense.pretrained_cfg["architecture"] == dense.default_cfg["architecture"] == PATCHED
    vt.unpatch(dense)
    assert (dict(dense.pretrained_cfg), dict(vars(dense).get("_model_args", {}))) == before
    vt.save(dense, tmp_path)
    assert torch.equal(vt.load(tmp_path)(x), dense(x))


def test_compiled_and_wrapped_models_save_the_same(model, tmp_path):
    vt.save(torch.compile(model), tmp_path / "a")
    vt.save(torch.nn.DataParallel(model), tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() == model.state_dict().keys()


def test_unknown_arguments_of_a_model_are_asked_for(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, mlp_ratio=2)
    model.__dict__.pop("_model_args", None)
    vt.patch(model, CONFIG)
    with pytest.raises(vt.CheckpointError, match="model_args="):
        vt.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    vt.save(model, tmp_path, model_args={**SMALL, "mlp_ratio": 2})
    assert vt.load(tmp_path).blocks[0].mlp.fc1.out_features == 96


def test_adapters_are_to_be_merged_first(model, x, tmp_path):
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "fc1"], r=2))
    randomise(model).eval()
    for saved in (wrapped, model):
        with pytest.raises(vt.CheckpointError) as caught:
            vt.save(saved, tmp_path / "new")
        assert str(caught.value) == (
            "5 modules have adapters (blocks.0.mlp.fc1: a peft.tuners.lora.layer.Linear); merge them first "
            "(model = model.merge_and_unload()), or save them by PEFT"
        )
    assert not (tmp_path / "new").exists()
    y, merged = wrapped(x), wrapped.merge_and_unload()
    vt.save(merged, tmp_path)
    torch.testing.assert_close(vt.load(tmp_path)(x), y)
    torch.nn.utils.parametrizations.weight_norm(merged.blocks[1].attn.proj)
    with pytest.raises(vt.CheckpointError, match=r"^1 module has parametrizations \(blocks\.1\.attn\.proj: a torch"):
        vt.save(merged, tmp_path / "new")


@pytest.mark.slow
def test_a_peft_model_whose_adapters_went_into_a_patch_saves_as_it_is(x, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], r=2))
    randomise(model).eval()
    vt.patch(wrapped, vt.GQAConfig(num_kv_heads=4))
    y = wrapped(x)
    vt.save(wrapped, tmp_path)
    torch.testing.assert_close(vt.load(tmp_path)(x), y)


@pytest.mark.slow
def test_differences_that_no_shape_shows_are_refused(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    with pytest.raises(vt.CheckpointError, match="num_heads is 4, not 3"):
        vt.save(model, tmp_path, model_args={"num_heads": 3})
    model.blocks[1].norm1.eps = 0.5
    with pytest.raises(vt.CheckpointError, match=r"blocks\.1\.norm1\.eps is 0\.5, not 1e-06"):
        vt.save(model, tmp_path)


def test_models_of_no_timm_name_are_refused(tmp_path):
    model = timm.models.VisionTransformer(**SMALL)
    with pytest.raises(vt.CheckpointError, match="does not name its timm model"):
        vt.save(model, tmp_path)
    vt.patch(model, CONFIG)  # patching needs no name
    with pytest.raises(vt.CheckpointError, match="does not name its timm model"):
        vt.save(model, tmp_path)
    vt.unpatch(model)
    assert not hasattr(model, "pretrained_cfg")
    with pytest.raises(vt.CheckpointError, match="2 label names for 5 classes"):
        vt.save(timm.create_model("vit_tiny_patch16_224", **SMALL), tmp_path, label_names=["a", "b"])
    (tmp_path / "file").touch()
    with pytest.raises(vt.CheckpointError, match="is a file"):
        vt.save(timm.create_model("vit_tiny_patch16_224", **SMALL), tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit_tiny_patch16_225"}, "no 'vit_tiny_patch16_225'.*did you mean 'vit_tiny_patch16_224'"),
        ({"architecture": None}, "names no architecture"),
        ({"model_args__host": "vit_tinny_patch16_224"}, "did you mean"),
        ({"model_args__host": "hf-hub:someone/else"}, "has no 'hf-hub:someone/else'"),
        ({"model_args__host": None}, "needs model_args.host and model_args.patch"),
        ({"model_args__patch__method": "tuckre"}, "did you mean 'tucker'"),
        ({"model_args__patch__core": 3}, "patch: core: Extra inputs.*newer vit_tucker"),
        ({"model_args__patch__ranks": [2, 8, 16]}, "stored with .*'ranks': \\[2, 8, 8\\]|size mismatch"),
        ({"model_args__depth": 4}, r"no blocks\.3\.attn"),
        ({"model_args__depth": 2}, "rules|outside|no place"),
        ({"model_args__embed_dim": 96}, "size mismatch"),
        ({"model_args__nonsense": 1}, "model_args.nonsense: no argument of the model vit_tiny_patch16_224"),
        ({"vit_tucker__layers__blocks.1.attn__shared_kv": True}, "was stored with"),
    ],
)
def test_damaged_configs_are_one_clear_line(folder, change, message):
    edit(folder, **change)
    with pytest.raises(vt.CheckpointError, match=message) as caught:
        vt.load(folder, verify=False)
    assert "\n" not in str(caught.value)


def test_missing_and_strange_files_are_one_clear_line(saved_folder, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    with pytest.raises(vt.CheckpointError, match=r"no such folder, and no 'owner/name' of the hub"):
        vt.load(folder)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(vt.CheckpointError, match="runs/typo: no such folder.*hf-hub:runs/typo would be"):
        vt.load("runs/typo")  # without asking the hub
    shutil.copytree(saved_folder, folder)
    with pytest.raises(vt.CheckpointError, match="a file; name its folder"):
        vt.load(folder / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "blocks.1.attn.bias"} | {"more": torch.ones(1)},
        folder / "model.safetensors",
    )
    with pytest.raises(vt.CheckpointError, match="of another model or patch"):
        vt.load(folder, verify=False)
    (folder / "model.safetensors").write_bytes(b"none")
    with pytest.raises(vt.CheckpointError, match="can't be read"):
        vt.load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(
        vt.CheckpointError,
        match=r"pytorch_model\.bin is not read here, since nothing is unpickled: .*safe_serialization=True",
    ):
        vt.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(vt.CheckpointError, match="can't be read as JSON"):
        vt.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(vt.CheckpointError, match="no model"):
        vt.load(folder)


def test_a_patched_folder_is_no_start_for_a_dense_model(folder):
    """Whoever wrote it: ours says so in the header, timm's own in the config beside the weights."""
    from vit_tucker.checkpoint.host_model import create_host
    from vit_tucker.config.schema import ModelConfig

    size = {k: v for k, v in SMALL.items() if k != "num_classes"}
    bare = load_file(folder / "model.safetensors")
    for rewrite in (False, True):
        if rewrite:
            save_file(bare, folder / "model.safetensors")
        start = ModelConfig(name="vit_tiny_patch16_224", checkpoint=str(folder), **size)
        with pytest.raises(vt.CheckpointError, match="patched with tucker, a dense host is needed"):
            create_host(start, num_classes=3)


@pytest.mark.parametrize(("attention", "indices"), [(True, (0, 1)), (False, (1,))])
def test_models_of_features_come_back(tmp_path, attention, indices):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}
    options = {"features_only": True, "out_indices": indices, **sizes}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    if attention:
        vt.patch(model, vt.TuckerConfig(ranks=(2, 8, 8)))
    vt.save(model, tmp_path, model_args=None if hasattr(timm.models, "get_model_args") else options)
    x = torch.randn(2, 3, 32, 32)
    loaded = [vt.load(tmp_path)]
    if attention and hasattr(timm.models, "save_for_hf"):  # timm itself wraps a dense one only after it has loaded it
        loaded.append(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval())
    for again in loaded:
        maps = again(x)
        assert len(maps) == len(indices)
        for found, expected in zip(maps, model(x), strict=True):
            assert torch.equal(found, expected)


class TestVerification:
    """What has changed since a model was saved is refused, by us and by timm's own function; each is another model otherwise."""

    @staticmethod
    def rewrite(folder, change):
        """Changes the tensors of a folder's weights."""
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s["head.bias"].neg_(), "SHA-256 differs"),
            (lambda s: s["pos_embed"].fill_(float("nan")), "SHA-256 differs"),
            (lambda s: s.update({"cls_token": s["cls_token"].half()}), r"'cls_token' was F32 \[1, 1, 48\] and is F16"),
            (lambda s: s.update({"blocks.0.attn.proj.weight": s["blocks.0.attn.proj.weight"].T}), "SHA-256 differs"),
            (lambda s: s.pop("head.bias"), r"'head.bias' was F32 \[5\] and is not there"),
            (lambda s: s.update({"more": torch.ones(2)}), r"'more' was not there and is F32 \[2\]"),
        ],
        ids=["bits", "NaN", "dtype", "transposed", "missing", "more"],
    )
    def test_changed_weights(self, folder, change, message):
        self.rewrite(folder, change)
        for load in (vt.load, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True)):
            if load is vt.load or TIMM_TELLS:
                with pytest.raises(
                    vt.CheckpointError, match=f"is not what was saved.*{message}.*verify=False loads it"
                ):
                    load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_classes": 7, "pretrained_cfg__num_classes": 7, "model_args__num_classes": 7},
            {"model_args__num_heads": 8},
            {"model_args__patch__init": "random"},
            {"vit_tucker__layers": {}},
            {"pretrained_cfg__mean": [0.5, 0.5, 0.4]},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_changed_configs(self, folder, change):
        edit(folder, **change)
        for load in (vt.load, lambda folder: timm.create_model(f"local-dir:{folder}", pretrained=True)):
            if load is vt.load or TIMM_TELLS:
                with pytest.raises(vt.CheckpointError, match="config.json is not what was saved: SHA-256 differs"):
                    load(folder)

    def test_another_number_of_classes_never_means_a_random_head(self, folder):
        edit(folder, num_classes=7, pretrained_cfg__num_classes=7, model_args__num_classes=7)
        with pytest.raises(
            vt.CheckpointError, match=r"head.weight is \(5, 48\) in the weights, \(7, 48\) by config.json"
        ):
            vt.load(folder, verify=False)
        edit(folder, num_classes=5)
        with pytest.raises(vt.CheckpointError, match="one number of classes in model_args.num_classes, num_classes"):
            vt.load(folder, verify=False)

    def test_files_of_other_runs_and_folders_without_digests(self, model, folder, x, tmp_path, caplog):
        vt.save(randomise(copy.deepcopy(model), 1), tmp_path / "b")
        assert not caplog.records
        (folder / "model.safetensors").replace(tmp_path / "b" / "model.safetensors")
        with pytest.raises(vt.CheckpointError, match="b: model.safetensors is not what was saved"):
            vt.load(tmp_path / "b")
        edit(tmp_path / "b", vit_tucker__stored=None)
        assert torch.equal(vt.load(tmp_path / "b")(x), model(x))
        assert "note: " in caplog.text
        assert "has no digests" in caplog.text

    def test_a_save_that_dies_between_its_files(self, model, folder, x, monkeypatch):
        """The model before is still there; one of another description is refused, instead of half of each."""
        replace = os.replace

        def dying(source, target):
            if str(target).endswith(".safetensors"):
                raise KeyboardInterrupt
            replace(source, target)

        other = dense_vit(1)
        vt.patch(other, vt.TuckerConfig(ranks=(2, 8, 8)))
        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            vt.save(randomise(copy.deepcopy(model), 1), folder, model_args=SMALL)
        assert torch.equal(vt.load(folder)(x), model(x))
        with pytest.raises(KeyboardInterrupt):
            vt.save(other, folder)
        with pytest.raises(vt.CheckpointError, match="is not what was saved"):
            vt.load(folder)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("embed_dim", "no model of timm's has such a size"),
            ("depth", "the weights are .* tensors"),
            ("img_size", "no model of timm's has such a size"),
        ],
    )
    def test_sizes_are_refused_before_memory_is_given(self, folder, key, message):
        edit(folder, **{f"model_args__{key}": 10**9})
        with pytest.raises(vt.CheckpointError, match=f"model_args.{key}: 1000000000: {message}"):
            vt.load(folder, verify=False)
        edit(folder, **{f"model_args__{key}": 60_000 if key != "depth" else 6})
        with pytest.raises(vt.CheckpointError):
            vt.load(folder, verify=False)

    def test_index_buffers_point_into_their_table(self, tmp_path):
        """On a GPU an index beyond its table ends the process."""
        sizes = {**SMALL, "embed_dim": 16, "num_heads": 1, "depth": 1}
        made = timm.create_model("eva02_tiny_patch14_224", **sizes)
        vt.patch(made, vt.TuckerConfig(ranks=(1, 8, 8)))
        table = made.blocks[0].attn.head_dim // 2
        vt.save(made, tmp_path, model_args=sizes)
        for wrong in (-1, table, 2**40):
            self.rewrite(tmp_path, lambda state, value=wrong: state["blocks.0.attn.pair_rotations"][1:2].fill_(value))
            with pytest.raises(vt.CheckpointError, match=rf"pair_rotations contains .*, allowed are 0 to {table - 1}"):
                vt.load(tmp_path, verify=False)
        self.rewrite(tmp_path, lambda state: state["blocks.0.attn.pair_rotations"].fill_(table - 1))
        assert vt.load(tmp_path, verify=False).blocks[0].attn.pair_rotations.max() == table - 1
