"""Weights of 8 bits where the CPU's sums are exact, of 7 where they saturate."""

import numpy as np
import pytest

from vit_tucker.report.export import export_text

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from vit_tucker.export.int8 import products_saturate, quantise, runtime_product  # noqa: E402


def exact(images, weights):
    """What VNNI and ARM's dot product compute."""
    return images.astype(np.int32) @ weights.astype(np.int32)


def saturating(images, weights):
    """What VPMADDUBSW of x86 without VNNI computes: pairs of products are added in 16 bits."""
    products = images.astype(np.int32)[:, :, None] * weights.astype(np.int32)[None]
    pairs = products[:, ::2] + products[:, 1::2]
    return pairs.clip(-(2**15), 2**15 - 1).sum(1)


def test_saturation_is_detected():
    assert products_saturate(saturating)
    assert not products_saturate(exact)
    assert products_saturate(lambda images, weights: exact(images, weights) - (len(images) > 1)), "of many rows only"


def test_the_product_is_this_machines():
    images, weights = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(-10, 10, dtype=np.int8).reshape(4, 5)
    np.testing.assert_array_equal(runtime_product(images, weights), exact(images, weights))
    assert products_saturate() == products_saturate(runtime_product)


@pytest.mark.parametrize(("reduce_range", "bits"), [(False, 8), (True, 7)])
def test_reduced_weights_can_not_saturate(reduce_range, bits, tmp_path):
    """The weights of a file, all of them large, against the largest activations."""
    weights = np.random.default_rng(0).choice([-1.0, 1.0, 0.9], (64, 64)).astype(np.float32)
    node = onnx.helper.make_node("MatMul", ["image", "weights"], ["logits"])
    shape = ("n", 64)
    ends = (onnx.helper.make_tensor_value_info(name, 1, shape) for name in ("image", "logits"))
    graph = onnx.helper.make_graph(
        [node], "g", *([end] for end in ends), [onnx.numpy_helper.from_array(weights, "weights")]
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8),
        tmp_path / "a.onnx",
    )
    assert quantise(tmp_path / "a.onnx", tmp_path / "b.onnx", reduce_range=reduce_range) == 1
    proto = onnx.load(tmp_path / "b.onnx")
    (stored,) = (
        onnx.numpy_helper.to_array(t)
        for t in proto.graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and t.dims == [64, 64]
    )
    images = np.full((2, 64), 255, np.uint8)
    assert np.abs(stored.astype(int)).max() == {8: 127, 7: 64}[bits]
    assert np.array_equal(saturating(images, stored), exact(images, stored)) == reduce_range
    assert {p.key: p.value for p in proto.metadata_props}["weight_bits"] == str(bits)


@pytest.mark.parametrize(
    ("bits", "said"), [(7, "7 bits, exact on every CPU"), (8, "without VNNI sums of these saturate")]
)
def test_the_report_names_the_cpus_for_a_file(bits, said):
    comparison = dict.fromkeys(("max_abs_error", "relative_error", "agreement"), 0.0) | {"images": 1}
    stage = {
        "label": "int8",
        "bytes": 1,
        "random": {**comparison, "accuracy_model": None, "accuracy_file": None},
        "real": None,
    }
    values = {
        "file": "m.onnx",
        "parameter_bytes": 1,
        "stages": [stage],
        "int8_products": 1,
        "weight_bits": bits,
        "layers": [],
    }
    assert said in export_text(values)
