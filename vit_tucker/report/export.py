"""Formats what an export wrote and how it compares with PyTorch."""

from collections.abc import Mapping
from typing import Any

from vit_tucker.show.tables import markdown

HEADER = (
    "file",
    "compared on",
    "images",
    "max abs error",
    "of largest logit",
    "same top-1",
    "PyTorch's top-1",
    "top-1",
)
IN_FLOAT32 = "float32: attention's own products, softmax, norms, convolutions"
WEIGHTS = {
    7: "weights of 7 bits, exact on every CPU",
    8: "weights of 8 bits: on x86 CPUs without VNNI sums of these saturate, --reduce-range writes a file for them",
}


def export_text(values: Mapping[str, Any]) -> str:
    """Returns the outcome of the export command, from what it prints as JSON.

    Args:
        values: file, parameter_bytes, stages (label, bytes, random, real), int8_products, weight_bits, layers (name, pre_error,
            post_error).
    """
    stages, layers = values["stages"], values["layers"]
    size = f"{stages[-1]['bytes'] / 1e6:.2f} MB ({values['parameter_bytes'] / 1e6:.2f} MB of parameters in float32)"
    kinds = (("noise", "random"), ("images", "real"))
    rows = [_row(stage["label"], what, stage[key]) for stage in stages for what, key in kinds if stage[key] is not None]
    lines = [f"{values['file']}: {size}", "", markdown(HEADER, rows, text_columns=2), ""]
    if values.get("int8_products") is not None:
        before = f"the float32 file had {stages[0]['bytes'] / 1e6:.2f} MB"
        lines.append(f"int8: {values['int8_products']} products of tokens with weights; {IN_FLOAT32}; {before}")
        lines.append(WEIGHTS[values["weight_bits"]])
    cut = [layer for layer in layers if layer["pre_error"] or layer["post_error"]]
    if layers and not cut:
        lines.append(f"plain attention in {len(layers)} layers, equal to the model's")
    for layer in cut:
        errors = f"{layer['pre_error']:.1e} of the scores' weights, {layer['post_error']:.1e} of the outputs'"
        lines.append(f"{layer['name']}: cut to plain attention, which loses {errors}")
    if stages[-1]["real"] is None:
        lines.append("compared on noise only: --data names images")
    return "\n".join(lines).rstrip()


def _row(label: str, what: str, part: Mapping[str, Any]) -> list[str]:
    errors = [f"{part[name]:.1e}" for name in ("max_abs_error", "relative_error")]
    shares = [part[name] for name in ("agreement", "accuracy_model", "accuracy_file")]
    return [label, what, str(part["images"]), *errors, *("" if x is None else f"{100 * x:.2f}%" for x in shares)]
