"""A training loop of your own: train a dense ViT on digits, convert its attention, fine-tune, save.

The digits are scikit-learn's, 1,797 images of 8x8 pixels, so nothing is downloaded; a minute on two cores.

python examples/finetune.py --out runs/example
accelerate launch examples/finetune.py --out runs/example
"""

import argparse

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import vit_tucker

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", default="runs/example", help="folder of the saved model")
parser.add_argument("--epochs", type=int, default=12, help="of the dense model; half as many of fine-tuning")
args = parser.parse_args()

torch.manual_seed(0)
accelerator = Accelerator()
MEAN, STD = 0.3055, 0.3760  # of the training images, in [0, 1]


def loaders():
    """Training and test images, normalised."""
    digits = load_digits()
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - MEAN) / STD
    labels = torch.tensor(digits.target)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = TensorDataset(split[0], split[2]), TensorDataset(split[1], split[3])
    return DataLoader(train, 32, shuffle=True, drop_last=True), DataLoader(test, 360)


def fit(model, epochs, lr):
    """AdamW with a cosine; returns the unwrapped model."""
    train_loader, _ = loaders()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train_loader))
    model.train()
    for _ in range(epochs):
        for images, labels in train_loader:
            accelerator.backward(F.cross_entropy(model(images), labels))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return accelerator.unwrap_model(model)


@torch.no_grad()
def top1(model):
    """Percent of the test images."""
    images, labels = next(iter(loaders()[1]))
    device = accelerator.device
    return 100 * (model.eval()(images.to(device)).argmax(1) == labels.to(device)).float().mean().item()


sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4, "in_chans": 1, "num_classes": 10}
sizes |= {"class_token": False, "global_pool": "avg"}
model = fit(timm.create_model("vit_tiny_patch16_224", **sizes), args.epochs, lr=2e-3)
accelerator.print(f"dense: {top1(model):.1f}% of the test images")

# Convert before the model goes into prepare() again: the optimizer must see the new parameters. The images say what each layer
# uses, so that the conversion keeps it.
config = vit_tucker.TuckerConfig(ranks=(4, 16, 16))
report = vit_tucker.patch(model, config, calibration=loaders()[0], keep_originals=False)
accelerator.print(f"attention parameters: {report.params_before:,} -> {report.params_after:,}")
accelerator.print(f"converted: {top1(model):.1f}%")
model = fit(model, max(1, args.epochs // 2), lr=1e-3)
accelerator.print(f"fine-tuned: {top1(model):.1f}%")

if accelerator.is_main_process:
    data = {"mean": (MEAN,), "std": (STD,), "crop_pct": 1.0}
    vit_tucker.save(model, args.out, label_names=list("0123456789"), data=data)
    print(f"saved in {args.out}: vit_tucker.load({args.out!r}) rebuilds it")
