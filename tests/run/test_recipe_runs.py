"""Whole runs with what a recipe can ask for: a teacher, compilation, recomputed activations, trackers; and the plan of a run."""

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import tracking
from safetensors import safe_open
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.api_pb2 import (
    ColParams,
    HParamInfo,
    ListSessionGroupsRequest,
    MetricName,
    SessionGroup,
    Status,
)
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from timm.models import _manipulate

import vit_tucker as vt
from tests.run.tiny import config, run, same, trained, weights
from tests.training.rules import StopAt
from vit_tucker.cli import train_main
from vit_tucker.config.load import load_config
from vit_tucker.run.run import run as run_shown
from vit_tucker.training.task import ImageTask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]
LOW = "attention={method: tucker, ranks: [2, 4, 4]}"


@pytest.fixture
def dense():
    trained(config("output_dir=dense", base="digits/dense"))
    return "model.checkpoint=dense"


def test_a_patched_model_learns_from_its_dense_host(dense):
    """Stopped, and continued without the dense run: the run keeps its teacher, and its weights are not those without one."""
    distill = ["train.distill={alpha: 0.9, temperature: 2.0, features: 0.1}", dense, LOW]
    given = config("output_dir=a", *distill, "train.checkpoint_steps=2", base="digits/dense")
    whole = run(given)
    run(config("output_dir=c", dense, LOW, base="digits/dense"))
    parts = given.model_copy(update={"output_dir": "b"})
    with pytest.raises(KeyboardInterrupt):
        run(parts, step_rule=StopAt(3))
    shutil.rmtree("dense")
    assert run(parts)["last"] == whole["last"]
    assert same(weights("a"), weights("b"))
    assert not any("teacher" in key for key in weights("a"))
    assert not same(weights("a"), weights("c"))


def test_attention_alone_is_trained(dense, capsys):
    """The rest keeps the weights that it came with; a classifier that is new and not named has its line in the log."""
    with pytest.raises(vt.ConfigError, match="train.only: 'atention' .* did you mean 'attention'"):
        run(config("output_dir=a", dense, LOW, "train.only=atention"), dry_run=True)
    assert not Path("a").exists()
    run(config("output_dir=a", dense, LOW, "train.only=attention", "train.layer_decay=0.9", "train.epochs=1"))
    start, end = weights("dense"), weights("a")
    assert {name for name in end if name not in start or not torch.equal(start[name], end[name])} == {
        name for name in end if ".attn." in name
    }
    said = "".join(capsys.readouterr())
    assert "train.only: 628 of 6,398 parameters are trained" in said
    assert "stay as initialised" not in said
    run(config("output_dir=b", dense, LOW, "train.only=attention", "model.num_classes=11"), dry_run=True)
    assert "train.only: head.weight, head.bias did not come from the weights and stay" in "".join(capsys.readouterr())


def test_checkpointing_behind_frozen_layers():
    """Gradients arrive, or are refused where timm's checkpointing loses them."""
    given = config(
        "output_dir=a", LOW, "train.only=[attention,head]", "train.grad_checkpointing=true", "train.epochs=1"
    )
    if _manipulate.checkpoint is torch.utils.checkpoint.checkpoint:
        with pytest.raises(vt.ConfigError, match="train.only: timm .* loses gradients behind frozen layers"):
            run(given, dry_run=True)
        return
    run(given)
    plain = given.model_copy(
        update={"output_dir": "b", "train": given.train.model_copy(update={"grad_checkpointing": False})}
    )
    run(plain)
    for name, value in weights("a").items():
        torch.testing.assert_close(value, weights("b")[name])


def test_a_teacher_needs_weights(dense):
    with pytest.raises(
        vt.ConfigError, match=r"train.distill.teacher: the host starts without trained weights; set model"
    ):
        run(config("output_dir=a", "train.distill={}", LOW, base="digits/dense"))
    with pytest.raises(vt.CheckpointError, match=r"train.distill.teacher: nowhere: no such file or run folder"):
        run(config("output_dir=a", "train.distill={teacher: nowhere}", LOW, base="digits/dense"))
    assert not Path("a").exists()
    assert run(config("output_dir=a", "train.distill={teacher: dense}", LOW, base="digits/dense"))["last"]["epoch"] == 2


def test_recomputed_activations_change_nothing():
    kept = run(config("output_dir=a", "model.depth=2", "model.drop_path_rate=0.1"))
    recomputed = run(
        config("output_dir=b", "model.depth=2", "model.drop_path_rate=0.1", "train.grad_checkpointing=true")
    )
    assert recomputed["last"]["train_loss"] == pytest.approx(
        kept["last"]["train_loss"], rel=1e-6
    )  # float32, same operations
    model = torch.nn.Linear(1, 1)
    with pytest.raises(vt.ConfigError, match="train.grad_checkpointing: timm's other_model has none"):
        ImageTask((3, 8, 8), name="other_model").recompute(model)


def test_compiled_runs_have_plain_checkpoints(monkeypatch):
    """With a backend that compiles nothing, to save the minute; benchmarks compile for real."""
    compiled = []
    real = torch.nn.Module.compile

    def compile_eagerly(self, **options):
        compiled.append(self)
        real(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    trained(config("output_dir=a"))
    assert not compiled
    run(config("output_dir=b", "train.compile=true", "train.model_ema=true", "train.epochs=1"))
    assert len(compiled) == 1
    assert weights("a").keys() == weights("b").keys() == weights("b", "best").keys()
    run(load_config("b"))  # evaluated
    run(config("output_dir=b", "train.model_ema=true"), allow_changes=True)  # continued without


class Notebook(tracking.GeneralTracker):
    name, requires_logging_directory = "mlflow", False  # the oldest Accelerate takes no other names
    pages: ClassVar[list] = []

    def __init__(self, project, **options):
        super().__init__()

    @property
    def tracker(self):
        return self.pages

    def store_init_configuration(self, values):
        self.pages.append(("config", values))

    def log(self, values, step=None, **options):
        self.pages.append((step, values))

    def finish(self):
        self.pages.append(("finished", {}))


def test_trackers_get_what_tensorboard_gets(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Notebook)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.TENSORBOARD, tracking.LoggerType.MLFLOW])
    monkeypatch.setattr(Notebook, "pages", [])
    results = run_shown(config("output_dir=a", "train.trackers=[mlflow, tensorboard]", "train.log_interval=3"))
    pages = Notebook.pages
    assert pages[0][0] == "config"
    assert pages[0][1]["train.lr"] == 2e-3
    losses = [values["train/loss"] for step, values in pages if "train/loss" in values]
    assert len(losses) == 10
    assert [v["eval/top1"] for _, v in pages if "eval/top1" in v][-1] == results["last"]["eval_top1"]
    assert pages[-1][0] == "finished"
    with pytest.raises(vt.ConfigError, match="train.trackers: 'wandbb' is none of .*did you mean 'wandb'"):
        run(config("output_dir=b", "train.trackers=[wandbb]"))


def test_tensorboard_shows_the_run():
    run_shown(config("output_dir=a", "train.layer_decay=0.5", "train.clip_grad=null", "train.log_interval=3"))
    events = EventAccumulator("a", size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert {"train/grad_norm", "train/data_wait_share", "train/memory_gb"} <= set(tags["scalars"])
    norms = events.Scalars("train/grad_norm")
    assert [e.step for e in norms] == [3, 5, 6, 9, 10]  # where losses are logged
    assert all(0 < e.value < 100 for e in norms)
    rates = {tag: events.Scalars(tag)[0].value for tag in tags["scalars"] if tag.startswith("lr/")}
    block = next(v for k, v in rates.items() if "blocks.0 decayed" in k)
    head = next(v for k, v in rates.items() if k.endswith("head decayed"))
    assert block == pytest.approx(head * 0.5)
    assert [image.step for image in events.Images("eval/predictions")] == [5, 10]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "layer_decay: 0.5" in text


def hparams_table(folder: str) -> tuple[dict[str, HParamInfo], set[str], list[SessionGroup]]:
    """What TensorBoard's own backend shows in the HParams tab for a folder of runs: columns, results, rows."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(folder)
    multiplexer.Reload()
    shown = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, folder)))
    request = RequestContext()
    metadata = shown.hparams_metadata(request, "")
    experiment = shown.experiment_from_metadata(request, "", True, metadata, [])
    columns = [ColParams(metric=MetricName(tag="best/top1"), include_in_result=True)]
    columns += [ColParams(hparam=column.name, include_in_result=True) for column in experiment.hparam_infos]
    asked = ListSessionGroupsRequest(col_params=columns, slice_size=99, allowed_statuses=Status.values())
    rows = Handler(request, shown, "", asked).run().session_groups
    return {c.name: c for c in experiment.hparam_infos}, {m.name.tag for m in experiment.metric_infos}, list(rows)


def test_tensorboard_has_a_table_of_the_runs_of_a_sweep():
    """One row for each run, also for one that went on; the columns that differ; their results."""
    results = {
        "x/tucker/seed0": run_shown(config("output_dir=x/tucker/seed0", "train.epochs=1")),
        "x/gqa/seed1": run_shown(
            config("output_dir=x/gqa/seed1", "train.epochs=1", "seed=1", "train.lr=1e-3", base="digits/gqa2")
        ),
    }
    given = config("output_dir=x/dense/seed0", "train.epochs=1", "train.checkpoint_steps=2", base="digits/dense")
    with pytest.raises(KeyboardInterrupt):
        run_shown(given, step_rule=StopAt(3))
    results["x/dense/seed0"] = run_shown(given)
    columns, metrics, rows = hparams_table("x")
    assert {"best/top1", "eval/top1", "eval/loss", "params/attention", "train/loss"} <= metrics
    assert {name for name, column in columns.items() if column.differs} >= {"method", "seed", "train.lr"}
    assert not columns["train.epochs"].differs
    assert not {"output_dir", "data.root", "train.checkpoint_steps", "attention.method"} & set(columns)
    found = {row.sessions[0].name: row for row in rows}
    assert len(rows) == len(found) == 3
    for folder, result in results.items():
        row = found[folder.removeprefix("x/")]
        best = next(metric.value for metric in row.metric_values if metric.name.tag == "best/top1")
        assert best == pytest.approx(result["best"]["top1"], rel=1e-6)  # float32
        assert row.hparams["method"].string_value == folder.split("/")[1]
    tucker = found["tucker/seed0"].hparams
    assert tucker["attention.ranks"].string_value == "[3, 8, 8]"
    assert (tucker["train.lr"].number_value, tucker["seed"].number_value) == (2e-3, 0)
    assert sorted(path.name for path in Path("x/tucker/seed0").iterdir() if path.is_dir()) == ["checkpoints"]


def test_the_plan_of_a_run_writes_nothing(capsys):
    arguments = [
        "--cfg",
        "digits/tucker_r16",
        "--dry-run",
        "train.layer_decay=0.7",
        "output_dir=a",
        "train.grad_accum_steps=2",
    ]
    assert train_main(arguments) == 0
    said = capsys.readouterr().out
    assert "blocks.0-3.attn  tucker" in said
    assert "blocks.3                     10      77,952          0.05       0.7" in said
    assert "steps: 44 per epoch, 1,320 in all, 1,320 to do; 32 images = 1 process(es) x 2 micro-batch(es) x 16" in said
    assert "memory: about" in said
    assert "dry run: nothing was trained or written" in said
    assert not Path("a").exists()
    trained(config("output_dir=a", "train.epochs=1"))
    before = {f: f.read_bytes() for f in Path("a").rglob("*") if f.is_file()}
    run(config("output_dir=a", "train.epochs=1"), dry_run=True)
    assert "5 in all, 0 to do" in capsys.readouterr().out
    assert {f: f.read_bytes() for f in Path("a").rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "3a"])
def test_a_whole_recipe_is_exact_over_a_stop(policy):
    """What DeiT and DeiT III train with, all at once on RGB images: it learns, and a stop in it changes nothing."""
    recipe = [
        "model.in_chans=3",
        "model.drop_path_rate=0.1",
        f"data.aa={policy}",
        "data.color_jitter=0.3",
        "data.reprob=0.25",
    ]
    recipe += [
        "data.aug_repeats=2",
        "train.mixup=0.8",
        "train.cutmix=1.0",
        "train.smoothing=0.1",
        "train.layer_decay=0.8",
    ]
    recipe += ["train.model_ema=true", "train.sched=linear", "train.grad_accum_steps=2", "train.checkpoint_steps=2"]
    recipe += ["data.num_samples=96", "train.global_batch_size=32", "train.log_interval=3", "data.num_workers=1"]
    whole = run(config("output_dir=a", *recipe))  # 3 steps per epoch
    assert whole["last"]["train_loss"] < 2.5
    with pytest.raises(KeyboardInterrupt):
        run(config("output_dir=b", *recipe), step_rule=StopAt(5))
    run(config("output_dir=b", *recipe))
    assert same(weights("a"), weights("b"))
    assert Path("a/summary.csv").read_text() == Path("b/summary.csv").read_text()
    if policy == "3a":  # twin: the comparison sees one augmentation less
        run(config("output_dir=c", *recipe, "data.reprob=0"))
        assert not same(weights("a"), weights("c"))


def test_checkpoints_by_epochs_and_the_last_k():
    run(config("output_dir=a", "train.epochs=5", "train.checkpoint_epochs=2", "train.checkpoint_hist=2"))
    assert sorted(p.name for p in Path("a/checkpoints").glob("step-*")) == ["step-00000020", "step-00000025"]
    with safe_open("a/checkpoints/best/model.safetensors", framework="pt") as opened:
        best = json.loads(opened.metadata()["best"])
    assert best == json.loads(Path("a/results.json").read_text())["best"]
