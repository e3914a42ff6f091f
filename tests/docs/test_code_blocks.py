"""Code in README.md and docs/ does what it says: Python runs on tiny models, commands and files are checked by their parsers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from docs.hooks import ROOT
from tests.docs.blocks import Block, check_page, code_blocks
from vit_tucker.attention import registry

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SIZES = {"img_size": 32, "patch_size": 16, "depth": 3}
WIDTHS = {"base": 72, "small": 48, "tiny": 48}
"""embed_dim of each size of ViT here; heads and everything else are as in the real one."""


def small_create_model(create_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """timm.create_model with ViTs of a few channels on images of 32 pixels, without weights to download."""

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        size = name.split("_")[1] if name.startswith("vit_") else None
        if size not in WIDTHS:
            return create_model(name, **options)
        own = pretrained and "state_dict" in options.get("pretrained_cfg_overlay", {})  # not timm's, but some at hand
        model = create_model(name, pretrained=own, **{**SIZES, "embed_dim": WIDTHS[size], **options})
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
        return model

    return create


@pytest.fixture
def reader(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a reader has: a folder, models, images in a loader; methods registered by a page are forgotten afterwards."""
    monkeypatch.setattr(timm, "create_model", small_create_model(timm.create_model))
    monkeypatch.setattr(registry.METHODS, "entries", dict(registry.METHODS.entries))
    torch.manual_seed(0)
    return {"__name__": "page", "loader": [(torch.randn(8, 3, 32, 32), torch.zeros(8)) for _ in range(2)]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks(page, reader):
    check_page(list(code_blocks(page.relative_to(ROOT), page.read_text())), reader)


def test_there_are_blocks_of_each_kind():
    found = [block for page in PAGES for block in code_blocks(page, page.read_text()) if block.skipped is None]
    assert {"python", "bash", "yaml"} <= {block.language for block in found}


def test_blocks_are_found_with_lines_indents_and_markers():
    text = "a\n\n<!-- not run: a sketch -->\n\n```python\nx\n```\n\n- b\n\n    ```bash\n    ls\n      -l\n    ```\n"
    first, second = code_blocks(Path("p.md"), text)
    assert first == Block(Path("p.md"), 6, "python", "x\n", "a sketch")
    assert second == Block(Path("p.md"), 12, "bash", "ls\n  -l\n")


def test_blocks_that_are_only_shown_must_be_python_too(reader):
    check_page([Block(Path("p.md"), 1, "python", "missing.name\n", "a sketch")], reader)
    with pytest.raises(SyntaxError):
        check_page([Block(Path("p.md"), 1, "python", "def f(:\n", "a sketch")], reader)


@pytest.mark.parametrize(
    ("language", "text", "reason"),
    [
        ("python", "import vit_tucker\nvit_tucker.patsh\n", "patsh"),
        ("python", "import vit_tucker\nvit_tucker.TuckerConfig(rank=(8, 16, 16))\n", "ranks"),
        ("bash", "./run.sh trian --cfg digits/dense\n", "no command 'trian'"),
        ("bash", "rm -r runs\n", "unknown command"),
        ("bash", "./run.sh train --cfg digits/dens\n", "no such config"),
        ("bash", "./run.sh train --cfg digits/dense train.epoch=3\n", "did you mean 'epochs'?"),
        ("bash", "./run.sh train --cfg digits/dense --dryrun\n", "unrecognized arguments: --dryrun"),
        ("bash", "./run.sh sweep --cfg sweeps/fig3_digits --jobs none\n", "argument --jobs"),
        ("bash", "./run.sh train\n", "--cfg"),
        ("bash", "./run.sh train vit_tiny_patch16_224 --method mha\n", "name a data set"),
        ("bash", "./run.sh train vit_tinny_patch16_224 data.dataset=digits\n", "timm has no model"),
        ("bash", "vit-tucker predict runs/a\n", "IMAGE"),
        ("bash", "vit-tucker plan vit_basic_patch16_224 --method mha\n", "timm has no model"),
        ("bash", "python -m vit_tucker plann --cfg digits/gqa2\n", "no command 'plann'"),
        ("bash", "python -m vit_tucker cost vit_basic --table 4\n", "invalid choice: 4"),
        ("bash", "python -m vit_tucker cost vit_basic_patch16_224\n", "timm has no model"),
        ("bash", 'python -m vit_tucker cost vit_base_patch16_224 --method "tucker rank=[8,16,16]"\n', "ranks"),
        (
            "bash",
            "accelerate launch --config_file none.yaml experiments/train_vit.py --cfg digits/dense\n",
            "none.yaml",
        ),
        ("bash", "accelerate launch experiments/train.py --cfg digits/dense\n", "experiments/train.py: no such file"),
        ("bash", "sbatch experiments/slurm/train.sbatch --cfg digits/none\n", "no such config"),
        ("bash", "python benchmarks/none.py\n", "benchmarks/none.py: no such file"),
        ("bash", "pip install 'vit_tucker[nothing]'\n", "no extra 'nothing'"),
        ("yaml", "train: {learning_rate: 1.0}\n", "unknown key"),
        ("yaml", "base: digits/base.yaml\nattention: {method: tucker, ranks: [8, 16]}\n", "too few entries"),
        ("yaml", "base: digits/base.yaml\ncells: [{name: a, attention: null, sets: {}}]\n", "did you mean 'set'?"),
        ("pyhton", "1\n", "unknown language"),
    ],
)
def test_wrong_blocks_fail(reader, language, text, reason):
    with pytest.raises(Exception, match=".*") as failure:
        check_page([Block(Path("p.md"), 1, language, text)], reader)
    assert reason in str(failure.value)
