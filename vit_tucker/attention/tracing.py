"""Detects whether a call of a layer is recorded (compiled, exported, traced or transformed) and not only computed.

Functions under ``torch.fx.wrap`` are leaves of fx graphs where they are looked up in their own module: code that torch.fx may
trace calls ``masks.cast_mask``, not a ``cast_mask`` that it has imported.
"""

import torch

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7
_is_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def own_only() -> bool:
    """Returns whether the call must use torch's own operations only.

    That is so where it is recorded for another runtime, or transformed by torch.func.
    """
    if torch.compiler.is_compiling():  # in torch.export as well
        return _is_exporting() or torch.onnx.is_in_onnx_export() or _is_transformed()
    return torch.jit.is_tracing() or _is_transformed()


def is_traced() -> bool:
    """Returns whether the call is recorded in any way."""
    return torch.compiler.is_compiling() or own_only()
