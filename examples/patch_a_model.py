"""Swap the attention of a timm model, look at what it costs, and put the original back.

python examples/patch_a_model.py
python examples/patch_a_model.py --model vit_base_patch16_224 --pretrained
"""

import argparse
import copy

import timm
import torch

import vit_tucker

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="vit_tiny_patch16_224", help="timm model name")
parser.add_argument("--pretrained", action="store_true", help="timm's weights, from the hub")
args = parser.parse_args()

torch.manual_seed(0)
dense = timm.create_model(args.model, pretrained=args.pretrained).eval()
images = torch.randn(2, *dense.pretrained_cfg["input_size"])
with torch.no_grad():
    expected = dense(images)

# A config says what to put in place of the attention. plan() shows what would happen and touches nothing.
config = vit_tucker.GQAConfig(num_kv_heads=1)
print(vit_tucker.plan(dense, config))

# At full rank a method contains the dense attention: the logits are the same up to rounding.
for method in vit_tucker.list_methods():
    model = copy.deepcopy(dense)
    vit_tucker.patch(model, vit_tucker.full_rank_config(model, method))
    with torch.no_grad():
        error = (model(images) - expected).abs().max() / expected.abs().max()
    print(f"{method} at full rank: logits differ by {error:.0e} of the largest")

# Below it is small and, until it is fine-tuned or calibrated on images, approximate.
heads = dense.blocks[0].attn.num_heads
report = vit_tucker.patch(dense, vit_tucker.TuckerConfig(ranks=(heads, 32, 32)))
print(f"tucker: {report.params_before:,} attention parameters become {report.params_after:,}")

vit_tucker.unpatch(dense)  # the original modules, bit for bit
with torch.no_grad():
    assert torch.equal(dense(images), expected)
print("unpatched: the same logits as before, bit for bit")
