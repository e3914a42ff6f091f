"""To the hub and back in a new process, through timm's own functions, against a stand-in on this machine."""

import json
import subprocess
import sys

import pytest
from timm.models._hub import has_hf_hub

from tests.checkpoint.stand_in_hub import stand_in_hub
from tests.conftest import process_environment

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys, timm, torch, vit_tucker as vt
torch.manual_seed(0)
sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=2)
model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
vt.patch(model, vt.TuckerConfig(ranks=(2, 8, 8)))
x = torch.randn(2, 3, 32, 32)
address = vt.push_to_hub(model, "me/tucker", label_names=["cat", "dog"], token="hf_x", commit_message="mine")
facts = {"address": str(address)}
by_name, by_prefix = vt.load("me/tucker"), vt.load("hf-hub:me/tucker@main")
by_timm = timm.create_model("hf-hub:me/tucker", pretrained=True).eval()
facts["errors"] = [(m(x) - model(x)).abs().max().item() for m in (by_name, by_prefix, by_timm)]
facts["labels"] = list(by_timm.pretrained_cfg["label_names"])
facts["head"] = list(timm.create_model("hf-hub:me/tucker", pretrained=True, num_classes=5)(x).shape)
timm.models.push_to_hf_hub(model, "me/bin", token="hf_x", safe_serialization=False)
facts["bin"] = (timm.create_model("hf-hub:me/bin", pretrained=True).eval()(x) - model(x)).abs().max().item()
vt.unpatch(model)
vt.push_to_hub(model, "me/dense", token="hf_x")
facts["dense"] = (vt.load("me/dense")(x) - model(x)).abs().max().item()
for place in ("me/none", "me/pickled"):
    try:
        vt.load(place)
    except vt.CheckpointError as error:
        facts[place] = str(error)
print(json.dumps(facts))
"""


@pytest.mark.skipif(not has_hf_hub(), reason="this timm can't use the installed huggingface_hub")
def test_a_pushed_model_comes_back(tmp_path):
    with stand_in_hub() as hub:
        hub.repos["me/pickled"] = {
            "config.json": b'{"architecture": "vit_tiny_patch16_224"}',
            "pytorch_model.bin": b"x",
        }
        environment = process_environment(
            HF_ENDPOINT=hub.address,
            HF_HOME=str(tmp_path),
            HF_HUB_OFFLINE="0",
            OMP_NUM_THREADS="1",
            HF_HUB_DISABLE_XET="1",
        )
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["errors"] == [0, 0, 0]
    assert facts["dense"] == facts["bin"] == 0
    assert {"pytorch_model.bin"} == {name for name in hub.repos["me/bin"] if name.startswith(("pytorch", "model."))}
    assert facts["labels"] == ["cat", "dog"]
    assert facts["head"] == [2, 5]
    assert sorted(hub.repos["me/tucker"]) == ["README.md", "config.json", "model.safetensors"]  # nothing pickled
    card = hub.repos["me/tucker"]["README.md"].decode()
    assert "vit_tiny_patch16_224" in card
    assert 'vit_tucker.load("hf-hub:me/tucker")' in card
    assert json.loads(hub.repos["me/tucker"]["config.json"])["vit_tucker"]["method"] == "tucker"
    assert "vit_tucker.load" not in hub.repos["me/dense"]["README.md"].decode()
    assert "config.json can't be downloaded: RepositoryNotFoundError" in facts["me/none"]
    assert "model.safetensors can't be downloaded" in facts["me/pickled"]
    assert not any("me/pickled" in request and "pytorch_model.bin" in request for request in hub.requests)
