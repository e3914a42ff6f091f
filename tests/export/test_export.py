"""Exported files against their models: every method, kinds of hosts, numbers and sizes of images, and what must be refused."""

import copy
import json
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vit_tucker as vt
from tests.patching.test_families import FAMILIES, small_model
from tests.patching.trios import small_config
from tests.reference import randomise
from vit_tucker.errors import ExportError, MismatchError
from vit_tucker.export import compare as compare_module
from vit_tucker.export.capture import capture, served
from vit_tucker.export.check import ExportOptions
from vit_tucker.export.export import export_model
from vit_tucker.export.metadata import file_metadata
from vit_tucker.export.torch_file import METADATA
from vit_tucker.hosts.images import input_shape

pytestmark = pytest.mark.slow

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4, "num_classes": 7}
PT2 = ExportOptions("torch_export")


def small(config: vt.AttentionConfig | None = None, **options) -> nn.Module:
    """A ViT with weights that are not at their start, patched."""
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **options})
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "label_names": ["a", "b"],
    }
    model = randomise(model).eval()
    if config is not None:
        vt.patch(model, config)
    return model


TUCKER = vt.TuckerConfig(ranks=(3, 9, 8))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """1e-4 of the largest logit, as the export itself asks; see its TOLERANCE."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def tensor_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


def opened(file: Path) -> tuple[nn.Module, dict[str, str]]:
    """Returns the program in a .pt2 file, and its metadata."""
    extra = {METADATA: ""}
    program = torch.export.load(file, extra_files=extra)
    return program.module(), json.loads(extra[METADATA])


def test_onnx_with_rope_in_latent_and_in_heads(tmp_path):
    """Tucker Attention and GQA in one model. The file is its weights and a small graph, and tells nothing of this machine."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from vit_tucker.export.onnx_file import onnx_runner

    dense = small_model("vit_small_patch16_rope_mixed_224")
    model, other = copy.deepcopy(dense), copy.deepcopy(dense)
    vt.patch(model, vt.TuckerConfig(ranks=(3, 12, 12), layers=0))
    vt.patch(other, vt.GQAConfig(num_kv_heads=2, layers=1))
    model.blocks[1].attn = other.blocks[1].attn
    model = model.float()
    exported = export_model(model, tmp_path / "model.onnx")
    images = torch.randn(7, 3, 32, 32)
    expected = model(images)
    assert_close(onnx_runner(exported.path, threads=1)(images), expected)
    assert (dense(images.double()) - expected).abs().max() > 1e-2 * expected.abs().max(), "the host would pass"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert exported.stages[0].bytes == exported.path.stat().st_size
    assert exported.stages[0].bytes < tensor_bytes(model) + 60_000  # 150 bytes for each of 400 nodes
    content = exported.path.read_bytes()
    for path in (Path(vt.__file__).parent, Path(timm.__file__).parent, Path(torch.__file__).parent):
        assert str(path).encode() not in content


def test_low_rank_linear_layers(tmp_path):
    """In ONNX and as a torch.export program, beside Tucker Attention; the host's own Linears would give something else."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from vit_tucker.export.onnx_file import onnx_runner

    model = small(TUCKER)
    images, before = torch.randn(3, 3, 32, 32), model(torch.ones(1, 3, 32, 32))
    vt.patch(model, vt.LowRankLinearConfig(rank=6, layers="blocks.*.mlp.*"))
    assert (model(torch.ones(1, 3, 32, 32)) - before).abs().max() > 1e-2 * before.abs().max()
    exported = export_model(model, tmp_path / "model.onnx")
    assert_close(onnx_runner(exported.path, threads=1)(images), model(images))
    program, _ = opened(export_model(model, tmp_path / "model.pt2", PT2).path)
    assert_close(program(images), model(images))


@pytest.fixture(scope="module")
def any_size(tmp_path_factory):
    """A model of any image size, and its file."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = small(TUCKER, dynamic_img_size=True)
    model.pos_embed.data *= 8
    file = tmp_path_factory.mktemp("any") / "deep" / "model.onnx"
    return model, export_model(model, file, ExportOptions(dynamic_img_size=True, opset=18)).path


def test_onnx_metadata(any_size):
    import onnx

    proto = onnx.load(str(any_size[1]))
    onnx.checker.check_model(proto, full_check=True)
    assert proto.opset_import[0].version == 18
    (image,), (logits,) = proto.graph.input, proto.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 3, "height", "width"]
    assert [d.dim_param or d.dim_value for d in logits.type.tensor_type.shape.dim] == ["batch", 7]
    told = {p.key: p.value for p in proto.metadata_props}
    assert told["architecture"] == "vit_tiny_patch16_224"
    values = {name: json.loads(told[name]) for name in ("mean", "std", "input_size", "label_names", "num_classes")}
    assert values == {
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 32, 32], "label_names": ["a", "b"], "num_classes": 7
    }  # fmt: skip
    assert told["image_range"] == "(pixel / 255 - mean) / std"
    attention = json.loads(told["attention"])
    assert attention["method"] == "tucker"
    assert attention["ranks"] == [3, 9, 8]
    assert attention["modules"] == {"blocks.0.attn": "TuckerAttention"}


def test_onnx_of_any_image_size(any_size):
    """Position embeddings are resampled in the graph, as timm does."""
    from vit_tucker.export.onnx_file import onnx_runner

    model, run = any_size[0], onnx_runner(any_size[1], threads=1)
    elsewhere = copy.deepcopy(model)
    elsewhere.pos_embed[:, 1:] = 0
    for size in ((32, 32), (64, 24), (16, 88)):
        x = torch.randn(2, 3, *size)
        assert_close(run(x), model(x))
        assert (run(x) - elsewhere(x)).abs().max() > 1e-3 * model(x).abs().max(), "positions play no part"


def every_method(name: str) -> nn.Module:
    """A host in float64 and training mode, with a method in each of its blocks."""
    methods = vt.list_methods()
    dense = small_model(name, depth=len(methods))
    model = copy.deepcopy(dense).train()
    for number, method in enumerate(methods):
        other = copy.deepcopy(dense)
        vt.patch(other, small_config(dense, method).model_copy(update={"layers": number}))
        model.blocks[number].attn = randomise(other.blocks[number].attn, number)
    return model


def test_torch_export_of_every_method(tmp_path):
    """With position biases; and the model stays as it is."""
    model = every_method("beit_base_patch16_224")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exported = export_model(model, tmp_path / "model.pt2", PT2)
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float64 for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    run, told = opened(exported.path)
    images = torch.randn(5, *input_shape(model))
    assert_close(run(images), model.float().eval()(images))
    assert told["architecture"] == model.pretrained_cfg["architecture"]
    with zipfile.ZipFile(exported.path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert str(Path(vt.__file__).parent).encode() not in content
    assert str(Path(torch.__file__).parent).encode() not in content


def test_normalisation_inside(tmp_path):
    """Real images come normalised and are taken back to [0, 1]; the file normalises them itself."""
    model = Tiny()
    options = ExportOptions("torch_export", with_preprocessing=True)
    x = torch.rand(3, 3, 8, 8)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    normalised = (x - mean) / std
    labels = model(normalised).argmax(1)
    exported = export_model(model, tmp_path / "m.pt2", options, batches=[(normalised, labels)])
    (stage,) = exported.stages
    assert (stage.real.images, stage.real.correct_model, stage.real.correct_file) == (3, 3, 3)
    run, told = opened(exported.path)
    assert_close(run(x), model(normalised))
    assert (run(normalised) - model(normalised)).abs().max() > 1e-2
    assert told["image_range"] == "[0, 1]; normalised inside"
    model.pretrained_cfg = {}
    with pytest.raises(ExportError, match="no mean and std"):
        export_model(model, tmp_path / "n.pt2", options)


def test_weights_beyond_two_gigabytes_lie_beside_the_file(tmp_path, monkeypatch):
    """With a limit that the tiniest model exceeds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from vit_tucker.export import onnx_file
    from vit_tucker.export.int8 import quantise

    monkeypatch.setattr(onnx_file, "EXTERNAL_BYTES", 0)
    model = Tiny(64)
    exported = export_model(model, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert exported.stages[0].bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    x = torch.randn(2, 3, 8, 8)
    assert_close(onnx_file.onnx_runner(tmp_path / "m.onnx")(x), model(x))
    with pytest.raises(ExportError, match="int8 supports models whose float32 weights fit into one file"):
        quantise(tmp_path / "m.onnx", tmp_path / "n.onnx")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_differs_is_not_left(tmp_path):
    file = tmp_path / "m.pt2"
    file.write_text("the file before")
    model = Tiny()
    wrong = copy.deepcopy(model)
    wrong.head.bias[0] += 0.01
    with pytest.raises(
        MismatchError, match=r"on random images the file's outputs are off by \d\.\de-0[23] of the largest"
    ):
        export_model(model, file, PT2, reference=wrong)
    with pytest.raises(ExportError, match="the images to compare on are 3x40x40, the model accepts 3x8x8"):
        export_model(model, file, PT2, batches=[(torch.randn(2, 3, 40, 40), None)])
    with pytest.raises(ExportError, match="no images to compare on"):
        export_model(model, file, PT2, batches=[])
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert file.read_text() == "the file before"


class Tiny(nn.Module):
    """Recorded in no time."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 2, 2), nn.Linear(width, 7)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).mean((2, 3)))


class Branching(nn.Module):
    """Looks at its values: no recorder follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: small(), {"format": "onx"}, "unknown format 'onx': one of onnx, torch_export; did you mean 'onnx'"),
        (lambda: small(), {"format": "torch_export", "int8": True}, "int8 is an option of onnx"),
        (lambda: small(), {"format": "torch_export", "opset": 18}, "opset is an option of onnx"),
        (lambda: small(), {"opset": 17}, "opset 17: torch's exporter writes 18 and later"),
        (lambda: small(), {"format": "torch_export", "reduce_range": True}, "reduce_range is an option of int8"),
        (lambda: small(), {"format": "torch_export", "dynamic_img_size": True},
         r"VisionTransformer accepts images of 32x32 only \(Input height .*; make the model with dynamic_img_size=True"),
        (lambda: small_model("davit_tiny"), {"format": "torch_export", "dynamic_img_size": True},
         r"this DaVit attends in windows \(stages\..*\): torch can't record their padding for all sizes"),
        (Branching, {"format": "torch_export"}, "torch.export can't record this Branching for any number of images: "),
    ],
)  # fmt: skip
def test_impossible_exports_are_refused(model, options, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_model(model(), tmp_path / "sub" / "m", ExportOptions(**options))
    assert not list(tmp_path.iterdir())


def test_missing_packages(monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match=r"ONNX needs onnx, onnxscript, onnxruntime: pip install 'vit_tucker\[onnx\]'"
    ):
        export_model(small(), tmp_path / "m.onnx")


def test_models_built_at_another_size_are_recorded_at_theirs():
    """Their patch embeddings name no size; timm's own one, which pretrained_cfg has, does not run."""
    for name in ("tnt_s_patch16_224", "coatnet_nano_rw_224", "volo.VOLO", "visformer_tiny"):
        model, size = small_model(name).float(), FAMILIES[name]["img_size"]
        assert json.loads(file_metadata(model, False, "0")["input_size"]) == [3, size, size]
        with pytest.raises((RuntimeError, AssertionError)):
            model(torch.randn(1, 3, 224, 224))
    images = torch.randn(
        3, 3, size, size
    )  # for the last one alone: the recorder knows no more of a model than this size
    assert_close(capture(served(model, False)).module()(images), model(images))


def test_comparisons():
    result = compare_module.Comparison()
    expected = torch.tensor([[1.0, 2.0, -4.0], [3.0, 0.0, 1.0]])
    got = expected + torch.tensor([[1.5, 0.0, 0.0], [0.0, 0.0, 0.25]])
    result.add(expected, got, torch.tensor([1, -1]))
    assert (result.images, result.agreement, result.max_abs_error, result.relative_error) == (2, 0.5, 1.5, 1.5 / 4)
    assert (result.labelled, result.accuracy_model, result.accuracy_file) == (1, 1.0, 0.0)
    result.add(expected, torch.full_like(expected, float("nan")))
    with pytest.raises(MismatchError, match="off by inf"):
        compare_module.require(result, 1.0, "noise")
    with pytest.raises(MismatchError, match=r"the file returns outputs \(2, 2\), the model \(2, 3\)"):
        result.add(expected, got[:, :2])

    def broken(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such\nkernel")

    with pytest.raises(MismatchError, match=r"does not run on images \(2, 3\): no such kernel"):
        compare_module.compare(lambda x: x, {"file": broken}, [(expected, None)])


def test_the_example_names_what_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = Path(__file__).parents[2] / "examples" / "deploy.py"
    with pytest.raises(SystemExit, match=r"^error: onnxruntime is missing: pip install 'vit_tucker\[onnx\]'"):
        runpy.run_path(str(file))
