"""Dynamic int8 quantisation of ONNX files: weights of linear layers in 8 bits, their inputs in 8 bits as they come.

What is quantised: products of tokens with weights (MatMul, Gemm). What stays float32: attention's own products QK^T and PV,
whose factors are both activations; softmax, norms, biases, position embeddings and convolutions. There is one scale per output
channel, so that one large channel does not take the others' digits; onnxruntime's ConvInteger is slower than its float32 one, so
convolutions are left out. ``benchmarks/int8.py`` compares the ways to quantise, benchmarks/results/int8 has what it found.
Weights of 7 bits (``reduce_range``) are for x86 CPUs without VNNI. These add two products of an 8-bit activation (0 to 255) and a
weight in 16 bits, where 2 * 255 * 127 saturates and 2 * 255 * 64 does not; with VNNI, on ARM and in onnxruntime's plain code the
sums are exact. ``products_saturate`` finds which of these runs here, by the product itself: flags of the CPU have other names on
every system, and say nothing of the kernels that onnxruntime was built with.
Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_tucker.errors import ExportError
from vit_tucker.export.capture import first_line
from vit_tucker.export.onnx_file import OLDEST_OPSET, external_file, onnx_session, quiet

QUANTISED = ("MatMul", "Gemm")
Product = Callable[[Any, Any], Any]
"""Maps uint8 (rows, depth) and int8 (depth, columns) to int32 (rows, columns)."""


def products_saturate(product: Product | None = None) -> bool:
    """Returns whether sums of 8-bit products are wrong on this machine.

    Args:
        product: of integer matrices; onnxruntime's on the CPU if None.
    """
    weights = np.full((64, 64), 127, np.int8)
    weights[:, ::2] = -128
    for rows in (1, 8):  # a single one may have a kernel of its own
        images = np.full((rows, 64), 255, np.uint8)
        got = (product or runtime_product)(images, weights)
        if not np.array_equal(got, images.astype(np.int64) @ weights.astype(np.int64)):
            return True
    return False


def runtime_product(images: Any, weights: Any) -> Any:
    """Returns what onnxruntime's MatMulInteger makes of two matrices, see ``Product``."""
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node("MatMulInteger", ["images", "weights"], ["sums"])
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, list(images.shape))
    made = helper.make_tensor_value_info("sums", TensorProto.INT32, [len(images), weights.shape[1]])
    graph = helper.make_graph([node], "product", [given], [made], [numpy_helper.from_array(weights, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OLDEST_OPSET)], ir_version=8)
    (sums,) = onnx_session(model.SerializeToString(), threads=1).run(None, {"images": images})
    return sums


def quantise(
    file: Path,
    out: Path,
    *,
    reduce_range: bool = False,
    per_channel: bool = True,
    operators: Sequence[str] = QUANTISED,
) -> int:
    """Writes the int8 file of an ONNX file, with its metadata.

    Args:
        file: float32, with its weights inside.
        out: to write; another file.
        reduce_range: weights of 7 bits.
        per_channel: a scale for each output channel, not one for each weight matrix.
        operators: of ONNX, that are quantised.

    Returns:
        How many products are in int8.

    Raises:
        ExportError: onnxruntime can't quantise it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if external_file(file).exists():
        raise ExportError("int8 supports models whose float32 weights fit into one file, 2 GB at most")
    folded = out.with_name(out.name + ".folded")
    try:
        with quiet():  # products of constants and transposed weights become weights, so that they are quantised too
            quant_pre_process(file, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
            quantize_dynamic(
                folded, out, op_types_to_quantize=list(operators), per_channel=per_channel, reduce_range=reduce_range,
                weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"onnxruntime can't quantise this model: {first_line(error)}") from None
    finally:
        folded.unlink(missing_ok=True)
    proto, source = onnx.load(str(out)), onnx.load(str(file), load_external_data=False)
    metadata = {entry.key: entry.value for entry in source.metadata_props}
    metadata |= {"quantisation": "int8 dynamic", "weight_bits": "7" if reduce_range else "8"}
    onnx.helper.set_model_props(proto, metadata)
    out.write_bytes(proto.SerializeToString())
    return sum(node.op_type == "MatMulInteger" for node in proto.graph.node)
