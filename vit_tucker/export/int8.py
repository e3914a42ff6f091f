"""Dynamic int8 quantisation of ONNX files: weights of linear layers in 8 bits, their inputs in 8 bits as they come.

What is quantised: products of tokens with weights (MatMul, Gemm). What stays float32: attention's own products QK^T and PV,
whose factors are both activations; softmax, norms, biases, position embeddings and convolutions. Measured: the error of the
logits and the speed-up over float32 of a ViT-S with random weights (4 blocks, batch 4, one thread with AVX512-VNNI), dense and
Tucker (6, 32, 32); top-1 on the digits' test set of a trained Tucker (8, 16, 16), 99.17% in float32:

    one scale per weight matrix      0.125  2.35x    0.037  2.31x    98.61%
    one scale per output channel     0.029  2.33x    0.030  2.29x    99.17%
    the same in 7 bits               0.044  2.33x    0.044  2.28x    98.89%
    8 bits, convolutions too         0.031  2.01x    0.030  1.87x    99.17%

So there is one scale per output channel, and convolutions are left out: onnxruntime's ConvInteger is slower than its float32 one.
Weights of 7 bits (``reduce_range``) are for x86 CPUs without VNNI, on which sums of 8-bit products can saturate.
Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

from pathlib import Path

from vit_tucker.errors import ExportError
from vit_tucker.export.capture import first_line
from vit_tucker.export.onnx_file import external_file, quiet

QUANTISED = ("MatMul", "Gemm")


def quantise(file: Path, out: Path, *, reduce_range: bool = False) -> int:
    """Write the int8 file of an ONNX file. Metadata is kept.

    Args:
        file: float32, with its weights inside.
        out: to write; another file.
        reduce_range: weights of 7 bits.

    Returns:
        How many products are in int8.

    Raises:
        ExportError: onnxruntime can't quantise it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if external_file(file).exists():
        raise ExportError("int8 takes models whose float32 weights fit into one file, 2 GB at most")
    folded = out.with_name(out.name + ".folded")
    try:
        with quiet():  # products of constants and transposed weights become weights, so that they are quantised too
            quant_pre_process(file, folded, skip_symbolic_shape=True, skip_onnx_shape=True)
            quantize_dynamic(
                folded, out, op_types_to_quantize=list(QUANTISED), per_channel=True, reduce_range=reduce_range,
                weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
    except Exception as error:
        raise ExportError(f"onnxruntime can't quantise this model: {first_line(error)}") from None
    finally:
        folded.unlink(missing_ok=True)
    proto, source = onnx.load(str(out)), onnx.load(str(file), load_external_data=False)
    onnx.helper.set_model_props(
        proto, {p.key: p.value for p in source.metadata_props} | {"quantisation": "int8 dynamic"}
    )
    out.write_bytes(proto.SerializeToString())
    return sum(node.op_type == "MatMulInteger" for node in proto.graph.node)
