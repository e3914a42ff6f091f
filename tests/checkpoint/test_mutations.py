"""A damaged folder ends in one line, or is the model that was saved: whatever a byte, an entry or a file has become.

``VIT_TUCKER_EXAMPLES=3000 pytest tests/checkpoint/test_mutations.py`` looks at more of them.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import vit_tucker as vt
from tests.checkpoint.mutations import damage_model, rewrite_json, rewrite_tensors, rewrite_text
from tests.reference import randomise
from vit_tucker.errors import CheckpointError
from vit_tucker.hosts.images import input_shape
from vit_tucker.storage.checkpoints import damage, fingerprint
from vit_tucker.training.optimizer_state import load_optimizer
from vit_tucker.training.progress import Progress
from vit_tucker.training.saved_state import read_progress
from vit_tucker.training.state import flatten, load_checkpoint, save_checkpoint
from vit_tucker.training.step import OrdinaryStep, restore_rule

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("VIT_TUCKER_EXAMPLES", "0"))
SIZES = {"img_size": 16, "patch_size": 8, "depth": 1, "num_heads": 2, "num_classes": 3}
SETTINGS = {
    "deadline": None,
    "derandomize": not EXAMPLES,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
IMAGE = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)


def plain_vit(**more) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **SIZES, embed_dim=16, **more)


def rope_vit() -> nn.Module:
    return timm.create_model("eva02_tiny_patch14_224", **SIZES, embed_dim=32)


CASES = {
    "dense": (plain_vit, None),
    "tucker": (plain_vit, vt.TuckerConfig(ranks=(2, 8, 8))),
    "calibrated": (
        plain_vit,
        vt.TuckerConfig(ranks={"budget": 0.7}, calibration=vt.Calibration(images=4, batch_size=4)),
    ),
    "gqa": (plain_vit, vt.GQAConfig(num_kv_heads=1)),
    "mla": (plain_vit, vt.get_method("mla")(q_lora_rank=8, kv_lora_rank=8)),
    "mha": (plain_vit, vt.get_method("mha")()),
    "rope-tucker": (rope_vit, vt.TuckerConfig(ranks=(2, 8, 8))),
    "rope-mla": (rope_vit, vt.get_method("mla")(q_lora_rank=8, kv_lora_rank=8)),
}


@cache
def saved(case: str) -> tuple[Path, torch.Tensor]:
    """A folder of a saved model, and its output."""
    make, config = CASES[case]
    model = randomise(make()).eval()
    if config is not None:
        images = [torch.randn(4, 3, 16, 16)] if config.calibration is not None else None
        vt.patch(model, config, calibration=images)
    folder = Path(mkdtemp())
    vt.save(model, folder / case, model_args={**SIZES, "embed_dim": model.embed_dim})
    with torch.no_grad():
        return folder / case, vt.load(folder / case)(IMAGE)


@pytest.fixture(scope="module", autouse=True)
def removed_at_the_end():
    yield
    for case in CASES:
        shutil.rmtree(saved(case)[0].parent)
    saved.cache_clear()
    shutil.rmtree(start().parent)
    start.cache_clear()


def damaged(case: str, place: Path, data: st.DataObject, told: bool = True) -> str:
    """Copies a saved folder and changes one thing about it, which it returns."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved(case)[0], place)
    if not told:
        config = json.loads((place / "config.json").read_text())
        del config["vit_tucker"]["stored"]
        (place / "config.json").write_text(json.dumps(config))
    return damage_model(place, lambda options: data.draw(st.sampled_from(list(options))))


def loaded(folder: Path, **options) -> nn.Module | None:
    """The model of a folder; None if it was refused in one line."""
    try:
        return vt.load(folder, **options)
    except CheckpointError as error:
        is_one_line(error)
        return None


def is_one_line(error: CheckpointError) -> None:
    """What is said of a fault can be printed in one line of a terminal."""
    assert str(error).isprintable()
    assert len(str(error)) < 1500


@settings(max_examples=EXAMPLES or 60, **SETTINGS)
@given(data=st.data(), case=st.sampled_from(list(CASES)))
def test_a_damaged_folder_is_refused_in_one_line_or_is_the_saved_model(tmp_path_factory, data, case):
    folder = tmp_path_factory.getbasetemp() / "verified"
    what = damaged(case, folder, data)
    if (model := loaded(folder)) is not None:
        with torch.no_grad():
            assert torch.equal(model(IMAGE), saved(case)[1]), what


@settings(max_examples=EXAMPLES or 40, **SETTINGS)
@given(data=st.data(), case=st.sampled_from(list(CASES)), told=st.booleans())
def test_without_verification_it_is_refused_in_one_line_or_runs(tmp_path_factory, data, case, told):
    """Edited on purpose (``verify=False``), or written before digests were: then it is another model, but a whole one."""
    folder = tmp_path_factory.getbasetemp() / "trusted"
    what = damaged(case, folder, data, told=told)
    model = loaded(folder, verify=not told)
    if model is not None and input_shape(model)[1] <= 64:
        with torch.no_grad():
            assert model(torch.zeros(1, *input_shape(model))).shape[0] == 1, what


def test_without_verification_some_mutations_load(tmp_path):
    """The twin: without verification some of them load, as another model."""
    others = 0
    for seed in range(10):
        folder = tmp_path / str(seed)
        shutil.copytree(saved("rope-mla")[0], folder)
        order = torch.randint(0, 1 << 30, (64,), generator=torch.Generator().manual_seed(seed)).tolist()
        rewrite_tensors(folder / "model.safetensors", lambda options, order=order: options[order.pop() % len(options)])
        assert loaded(folder) is None
        others += loaded(folder, verify=False) is not None
    assert others > 2


PROGRESS = Progress(
    epoch=1,
    step=1,
    global_step=3,
    loss_sum=0.5,
    seconds=1.0,
    rows=[{"epoch": 1, "train_loss": 1.0, "eval_loss": 1.0, "eval_top1": 5.0, "eval_top5": 9.0, "lr": 0.1}],
    best={"epoch": 1, "top1": 5.0, "top5": 9.0, "loss": 1.0},
    steps_per_epoch=2,
)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of two parameters after one step."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


class RememberingStep(OrdinaryStep):
    """A rule with a state."""

    def state_dict(self):
        return {"seen": torch.ones(2), "when": (1, None)}

    def load_state_dict(self, state):
        if not isinstance(state["seen"], torch.Tensor) or len(state["when"]) != 2:
            raise ValueError("of another rule")


@cache
def start() -> Path:
    """A checkpoint of a run."""
    model, optimizer = trained()
    tensors: dict[str, torch.Tensor] = {}
    state = flatten(optimizer.state_dict(), "optimizer", tensors)
    weights = {"model": model.state_dict(), "ema": model.state_dict()}
    config = {"architecture": "linear", "vit_tucker": {}}
    rule = flatten({"name": "remembering", "state": RememberingStep().state_dict()}, "step_rule", tensors)
    return save_checkpoint(Path(mkdtemp()), weights, (state, tensors), vars(PROGRESS), {}, 1, config, rule)


@settings(max_examples=EXAMPLES or 100, **SETTINGS)
@given(data=st.data())
def test_a_damaged_state_is_refused_in_one_line_or_goes_on_the_same(tmp_path_factory, data):
    """With a manifest that knows of it, as after an edit on purpose; without it any change is damage."""
    folder = tmp_path_factory.getbasetemp() / "state" / start().name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start(), folder)
    file, intact = folder / "state.json", json.loads((start() / "state.json").read_text())

    def pick(options):
        return data.draw(st.sampled_from(list(options)))

    kind = pick(["progress", "progress", "optimizer", "optimizer", "step_rule", "all", "text"])
    what = rewrite_text(file, pick) if kind == "text" else rewrite_json(file, pick, () if kind == "all" else (kind,))
    if file.read_bytes() != (start() / "state.json").read_bytes():
        assert damage(folder) == "state.json is not what was written (SHA-256)" or "bytes of" in str(damage(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, file.name: fingerprint(file)}))
    assert damage(folder) is None
    model, optimizer = trained()
    try:
        values, state, rule = load_checkpoint(folder, model, None)
        progress, _ = read_progress(values, folder)
        load_optimizer(optimizer, state)
        restore_rule(RememberingStep(), {"name": "remembering"}, rule)
    except CheckpointError as error:
        is_one_line(error)
        return
    assert (progress.epoch, progress.step, progress.global_step) == (1, 1, 3), what
    assert all(row.keys() >= intact["progress"]["rows"][0].keys() for row in progress.rows)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_weights_of_a_checkpoint_are_those_that_were_written_together(tmp_path):
    """Each of these would restart from other weights, or from an average that begins anew."""
    for number, (name, damage_it, message) in enumerate(
        [
            ("ema.safetensors", lambda f: f.unlink(), "ema.safetensors is missing: config.json lists it"),
            (
                "model.safetensors",
                lambda f: f.write_bytes(f.read_bytes()[:-1] + b"x"),
                "is not the file that config.json lists",
            ),
            ("more.safetensors", lambda f: f.write_bytes(b"x"), "more.safetensors was not written with the others"),
            ("config.json", lambda f: f.write_text("{"), "config.json: can't be read as JSON"),
        ]
    ):
        folder = tmp_path / str(number) / start().name
        shutil.copytree(start(), folder)
        assert damage(folder) is None
        damage_it(folder / name)
        written = json.loads((folder / "manifest.json").read_text())
        written = {file: fingerprint(folder / file) for file in written if (folder / file).is_file()}
        (folder / "manifest.json").write_text(json.dumps(written))
        assert message in str(damage(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": 0}, "global_step is 0, in the folder step-00000003"),
        ({"step": 0}, "1 epochs of 2 steps and 0 steps are not the 3 of global_step"),
        ({"rows": []}, "0 rows for 1 epochs"),
        ({"epoch": True}, "progress: epoch: Input should be a valid integer, not True"),
        ({"best": {"epoch": 9, "top1": 1.0, "top5": 1.0, "loss": 1.0}}, "the best epoch is 9, after 1 epochs"),
        ({"seconds": "1"}, "progress: seconds: Input should be a valid number, not '1'"),
        ({"epochs": 1}, "progress: epochs: unknown key; did you mean 'epoch'"),
    ],
)
def test_progress_that_contradicts_itself_is_refused(changes, message):
    assert read_progress(vars(PROGRESS), start())[0] == PROGRESS
    with pytest.raises(CheckpointError, match=message):
        read_progress({**vars(PROGRESS), **changes}, start())
