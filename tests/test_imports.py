"""Importing the package brings nothing heavy, and none of its modules changes the process: environment, warnings, plots, logs,
settings, seeds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import vit_tucker
from tests.conftest import process_environment

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import vit_tucker
assert "torch" not in sys.modules and "timm" not in sys.modules, "importing the package imports torch"
from vit_tucker.cli import build_parser
build_parser().format_help()
assert "torch" not in sys.modules, "--help imports torch"
vit_tucker.TuckerConfig
assert "torch._dynamo" not in sys.modules, "methods import torch's compiler, which takes a second"
import timm
assert timm.is_model("vit_tucker_patched"), "timm was imported last, and does not know patched models"
assert "vit_tucker.checkpoint.entry" not in sys.modules

import ast, importlib, json, logging, multiprocessing, os, random, signal, warnings
from pathlib import Path

package, bad = map(Path, sys.argv[1:])
files = sorted(file for file in package.rglob("*.py") if file.name != "__main__.py" and "configs" not in file.parts)
sources = [ast.parse(file.read_text()) for file in files]
others = {alias.name for tree in sources for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
others |= {str(node.module) for tree in sources for node in tree.body if isinstance(node, ast.ImportFrom)}
for name in sorted(others | {"matplotlib", "numpy", "PIL.Image", "PIL.ImageFile", "timm", "torch"}):
    if not name.startswith("vit_tucker"):  # what other libraries do to the process is theirs
        importlib.import_module(name)
import matplotlib, numpy, torch
from PIL import Image, ImageFile

def state():
    styles, cuda = matplotlib.rcParams, torch.backends.cuda
    return {
        "os.environ": dict(os.environ),
        "warnings": [warnings.showwarning, *warnings.filters],
        "matplotlib": {key: dict.__getitem__(styles, key) for key in styles},  # reading "backend" itself would choose one
        "logging": [(log.level, log.handlers[:], log.filters[:], log.propagate) for log in
                    (logging.getLogger(name) for name in ("", "vit_tucker", "torch", "timm", "accelerate"))],
        "torch": [torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
                  torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled,
                  torch._C._get_cublas_allow_tf32(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
                  cuda.math_sdp_enabled(), torch._tensor_str.PRINT_OPTS.precision,
                  torch.multiprocessing.get_sharing_strategy()],
        "seeds": [torch.random.get_rng_state().tolist(), str(numpy.random.get_state()), hash(random.getstate())],
        "numpy": [numpy.geterr(), numpy.get_printoptions()],
        "Pillow": [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES],
        "sys": [sys.path[:], sys.excepthook, sys.displayhook, sys.getrecursionlimit()],
        "processes": [multiprocessing.get_start_method(allow_none=True), signal.getsignal(signal.SIGINT),
                      signal.getsignal(signal.SIGTERM), os.getcwd()],
    }

def changes(import_it):
    before = state()
    import_it()
    after = state()
    return [key for key in before if before[key] != after[key]]

names = [".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__") for file in files]
found = {name: changes(lambda: importlib.import_module(name)) for name in names}
found = {"imported": len(found), **{name: keys for name, keys in found.items() if keys}}
seen = changes(lambda: exec(bad.read_text()))
print(json.dumps([found, seen]))
"""
BAD = """
import logging, os, random, sys, warnings
import matplotlib, numpy, torch
from PIL import Image
os.environ["X"] = "1"
warnings.filterwarnings("ignore", "nothing")
matplotlib.use("svg")
logging.getLogger("vit_tucker").setLevel(10)
torch.set_default_dtype(torch.float64)
torch.manual_seed(7)
numpy.seterr(all="raise")
Image.MAX_IMAGE_PIXELS = None
sys.path.insert(0, "elsewhere")
os.chdir("/")
"""


def test_nothing_heavy_comes_before_it_is_needed_timm_may_come_last_and_no_module_changes_the_process(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    command = [sys.executable, "-c", SCRIPT, str(Path(vit_tucker.__file__).parent), str(tmp_path / "bad.py")]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    changed, seen = json.loads(done.stdout.splitlines()[-1])
    assert changed.pop("imported") > 200
    assert changed == {}
    assert seen == [
        "os.environ",
        "warnings",
        "matplotlib",
        "logging",
        "torch",
        "seeds",
        "numpy",
        "Pillow",
        "sys",
        "processes",
    ]
