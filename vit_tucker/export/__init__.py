"""Models as files for other runtimes: ONNX, torch.export, plain timm; each checked against its model before it gets its name."""

from vit_tucker.export.check import ExportOptions, Written
from vit_tucker.export.compare import Comparison
from vit_tucker.export.dense import DenseFolder, dense_model, export_dense, merge_dense
from vit_tucker.export.export import Exported, export_model

__all__ = [
    "Comparison",
    "DenseFolder",
    "ExportOptions",
    "Exported",
    "Written",
    "dense_model",
    "export_dense",
    "export_model",
    "merge_dense",
]
