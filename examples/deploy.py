"""A saved model in another process: rebuilt from its folder, exported to ONNX, run without torch; both count the same digits.

pip install 'vit_tucker[onnx]'  (in a clone: ./run.sh setup onnx, then .venv/bin/python in place of python)
python examples/finetune.py --out runs/example
python examples/deploy.py runs/example
"""

import argparse
import json

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_data_config

import vit_tucker
from vit_tucker.export import export_model

try:
    import onnxruntime
except ImportError:
    raise SystemExit("error: onnxruntime is missing: pip install 'vit_tucker[onnx]', or ./run.sh setup onnx") from None

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="of vit_tucker.save, a run folder, or owner/name on the hub")
parser.add_argument("--onnx", help="file to write; model.onnx in the folder if left out")
args = parser.parse_args()

# The folder says everything: the timm model, the patch and its ranks, how images are prepared, the classes' names.
model = vit_tucker.load(args.folder)
print(f"{args.folder}: {vit_tucker.patch_record(model).report.layers[0].options} in each layer")

# The images as a timm user prepares them, from the model's own pretrained_cfg.
transform = create_transform(**resolve_data_config({}, model=model))
digits = load_digits()
pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
_, pixels, _, labels = train_test_split(pixels, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
images = torch.stack([transform(Image.fromarray(image)) for image in pixels])

with torch.inference_mode():
    in_torch = model(images).argmax(1).numpy()

file = args.onnx or f"{args.folder}/model.onnx"
written = export_model(model, file)
print(
    f"{file}: {written.stages[0].bytes:,} bytes; logits differ by {written.stages[0].random.relative_error:.0e} of the largest"
)

session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
names = json.loads(session.get_modelmeta().custom_metadata_map["label_names"])
(logits,) = session.run(["logits"], {"image": images.numpy()})
in_onnx = logits.argmax(1)

assert (in_onnx == in_torch).all(), "onnxruntime and torch disagree"
print(f"top-1 on {len(labels)} test images: {100 * (in_torch == labels).mean():.2f}% in torch and in onnxruntime")
print(f"the first ones: {', '.join(names[i] for i in in_onnx[:10])}")
