"""The shipped sweeps of CIFAR and ImageNet: each starts, on data of the real format, and costs what its header says."""

from dataclasses import replace

import pytest

from tests.data.test_datasets import write_cifar, write_folder
from vit_tucker.config.find import package_configs
from vit_tucker.config.load import load_config
from vit_tucker.run.run import run
from vit_tucker.sweep.check import describe_cost, plan_cells
from vit_tucker.sweep.plan import load_sweep

PRESETS = sorted(f.stem for f in (package_configs() / "sweeps").glob("fig3_*_vit_*.yaml"))
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_tmp")]


@pytest.mark.parametrize("preset", PRESETS)
def test_two_steps_on_data_of_the_real_format(preset, tmp_path, monkeypatch):
    """Trains with the preset's own host and recipe, but one narrow block, no download, and batches that fit here."""
    root, dataset = tmp_path / "data", preset.split("_")[1]
    if dataset == "imagenet":
        write_folder(root, count=4)
    else:
        write_cifar(root, dataset, monkeypatch, train=range(8))
    small = [
        "set.model.pretrained=false",
        "set.model.depth=1",
        "set.model.embed_dim=192",
        f"set.data.root={root}",
        "set.data.num_workers=0",
    ]
    small += ["set.train.global_batch_size=4", "set.train.epochs=1", "set.train.warmup_epochs=0", "set.train.cpu=true"]
    small += ["set.train.latency_batch_size=null", "set.data.num_samples=8", "set.train.grad_accum_steps=1"]
    job = load_sweep(f"sweeps/{preset}", [*small, "seeds=[4]"]).jobs[-1]
    assert job.name.startswith("tucker")
    config = job.config.model_copy(update={"attention": job.config.attention.unconverted()})
    results = run(config)
    assert results["num_train"] // config.train.global_batch_size == 2
    assert results["patch"]["layers"][0]["method"] == "tucker"
    assert results["params"]["attention"] < results["params"]["dense_attention"] / 5
    assert load_config(str(job.folder)).seed == 4


@pytest.mark.parametrize("preset", ["fig3_imagenet_vit_l32", "fig3_imagenet_vit_g14"])
def test_large_hosts_take_their_smallest_cell_without_weights(preset):
    (smallest,) = {job.name: job for job in load_sweep(f"sweeps/{preset}").jobs[-1:]}.values()
    dense = replace(smallest, name="dense", config=smallest.config.model_copy(update={"attention": None}))
    flops = plan_cells([smallest, dense])
    assert flops[smallest.name] < 0.8 * flops["dense"]


def test_headers_say_what_the_sweeps_cost():
    """Compares the three sweeps of ViT-B/16: one count of operations serves them all, to the three digits shown."""
    flops = None
    for preset in ("fig3_imagenet_vit_b16", "fig3_cifar10_vit_b16", "fig3_cifar100_vit_b16"):
        sweep = load_sweep(f"sweeps/{preset}")
        flops = flops or plan_cells(sweep.jobs)
        line = describe_cost(sweep.jobs, flops)
        assert f"# Expected: {line}\n" in sweep.file.read_text()
        assert f"# Expected: {describe_cost(sweep.jobs[1:], flops)}\n" not in sweep.file.read_text()
    assert flops["mha"] == max(flops.values()) == pytest.approx(35.13e9, rel=1e-3)  # 17.56 GMACs, timm's own figure
    assert len(flops) == len(sweep.names)
    unknown = [replace(job, config=load_config("digits/dense", ["data.dataset=folder"])) for job in sweep.jobs]
    assert describe_cost(unknown, flops).startswith("cost unknown")
