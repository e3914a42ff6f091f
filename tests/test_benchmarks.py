"""The speed benchmarks run at toy sizes, and say what is wrong with their arguments. What they measure is not tested."""

import csv
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import vit_tucker

pytestmark = pytest.mark.slow

ROOT = Path(vit_tucker.__file__).parents[1]
QUICK = ("--turns", "2", "--seconds", "0")


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A script as __main__ in this process, which has imported everything already: what it returned and printed."""

    def call(script, *arguments):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        said = capsys.readouterr()
        return subprocess.CompletedProcess([script], ended.value.code, said.out, said.err)

    return call


def rows_of(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_layers(tmp_path, run_here):
    shape = ("--no-peers", "--shapes", "2x9x24x3", "--ranks", 4, 8, "--precision", "bf16")
    done = run_here("attention.py", *QUICK, *shape, "--backends", "sdpa", "blocked", "triton", "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "attention.csv")
    names = [row["layer"] for row in rows]
    ours = [f"Tucker (3,{rank},{rank}), {backend}" for rank in (4, 8) for backend in ("sdpa", "blocked")]
    assert names == ["dense (timm)", *ours, "MHA, sdpa", "MHA, blocked"]
    assert "Tucker (3,4,4), triton: left out: attention backend 'triton' does not support this call" in done.stdout
    for row in rows:
        for column in ("infer_step_time", "train_step_time", "infer_samples_per_sec", "train_peak_mb", "infer_speedup"):
            assert math.isfinite(float(row[column]))
            assert float(row[column]) > 0
    assert float(rows[0]["promise"]) == float(rows[0]["infer_speedup"]) == 1
    text = (tmp_path / "attention.md").read_text()
    assert "2x9x24x3" in text
    assert "backend blocked: asked for [cpu, bfloat16" in text
    assert (tmp_path / "promise.png").stat().st_size > 1000


def test_widths(tmp_path, run_here):
    done = run_here("widths.py", *QUICK, "--shape", "1x5x24x3", "--widths", 3, 16, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    narrow, fitting = rows_of(tmp_path / "widths.csv")
    assert (narrow["padded"], fitting["padded"]) == ("16", "16")
    assert float(fitting["step_speedup"]) == 1  # the very same call
    assert float(narrow["step_speedup"]) > 0
    assert "| 3 " in (tmp_path / "widths.md").read_text()


@pytest.mark.skipif(not hasattr(timm.layers, "AttentionRope"), reason="this timm has no AttentionRope")
def test_layers_with_rope(tmp_path, run_here):
    """Of ten tokens nine are a grid, and one is a prefix token."""
    quick = (*QUICK, "--shapes", "2x10x24x3", "--ranks", 4)
    done = run_here("attention.py", *quick, "--rope", "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "attention.csv")
    assert [row["layer"].split(",")[0] for row in rows] == ["dense", "Tucker (3", "MHA", "GQA-1", "MLA (4", "GQA-1"]
    assert all("RoPE" in row["layer"] for row in rows)
    assert float(rows[0]["promise"]) == 1


@pytest.mark.skipif(not timm.is_model("test_vit"), reason="this timm has no test_vit")
def test_models(tmp_path, run_here):
    done = run_here("model.py", *QUICK, "--models", "test_vit", "--ranks", 8, "--batch-size", 1, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    dense, tucker = rows_of(tmp_path / "model.csv")
    assert (dense["attention"], tucker["attention"]) == ("dense", "Tucker (2,8,8)")
    assert float(tucker["param_count"]) < float(dense["param_count"])
    share, layer, bound = (float(tucker[f"train_{name}"]) for name in ("attention_share", "layer_speedup", "bound"))
    assert bound == pytest.approx(1 / (1 - share + share / layer), rel=2e-3)  # four digits are written
    assert "Amdahl" in (tmp_path / "model.md").read_text()


@pytest.mark.skipif(not timm.is_model("test_vit"), reason="this timm has no test_vit")
def test_exports(tmp_path, run_here):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    quick = (*QUICK, "--models", "test_vit", "--methods", "--batch-sizes", 1)
    done = run_here("export.py", *quick, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "export.csv")
    kinds = [(row["attention"], row["runtime"], row["precision"]) for row in rows]
    assert kinds == [("dense", "onnxruntime", "fp32"), ("dense", "onnxruntime", "int8"), ("dense", "PyTorch", "fp32")]
    whole, small, _ = rows
    assert float(whole["infer_speedup"]) == 1
    assert float(whole["file_mb"]) > 2 * float(small["file_mb"])
    assert float(whole["logit_error"]) < 1e-4 < float(small["logit_error"]) < 0.1
    assert "onnxruntime" in (tmp_path / "export.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("attention.py", ["--shapes", "2x9x25x3"], "3 heads do not divide 25"),
        ("attention.py", ["--backends", "sdp"], "did you mean 'sdpa'"),
        ("attention.py", ["--rope", "--backends", "sdpa"], "leave --backends out"),
        ("widths.py", ["--widths", "0"], "1 at least"),
        ("model.py", ["--models", "vit_bse_patch16_224"], "no model vit_bse_patch16_224"),
        ("export.py", ["--batch-sizes", "0"], "--batch-sizes: 1 at least"),
        ("int8.py", ["nowhere", "--turns", "2"], "nowhere: no run folder"),
        pytest.param("gpu.py", ["--save", "nowhere"], "no CUDA device", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is one")),
    ],
)  # fmt: skip
def test_wrong_arguments(script, arguments, message, run_here):
    done = run_here(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (ROOT / "nowhere").exists()


def test_decoding(tmp_path, run_here):
    pytest.importorskip("transformers")
    parts = ("--parts", "attention", "layer", "step", "--shapes", "gpt2", "--precisions", "fp32", "--cached", 16)
    done = run_here("decoding.py", *QUICK, *parts, "--batches", 1, "--layers", 1, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "decoding.csv")
    assert {row["part"] for row in rows} == {"attention", "layer", "step"}
    caches = {row["form"]: float(row["cache_mb"]) for row in rows if row["part"] == "step"}
    dense = 2 * 12 * 64 * 16 * 4 / 1e6
    assert caches["dense, transformers"] == pytest.approx(dense, rel=1e-3)
    assert caches["Tucker, r3=64"] == pytest.approx(dense / 12, rel=1e-3)
    assert caches["MLA re-expanding, c=128"] == pytest.approx(dense / 12, rel=1e-3)
    assert "few queries with a past" in (tmp_path / "decoding.md").read_text()
    assert (tmp_path / "decoding.png").stat().st_size > 1000


def test_training_step_of_a_language_model(tmp_path, run_here):
    pytest.importorskip("transformers")
    shape = ("--dims", 256, "--ranks", 8, "--layers", 1, "--tokens", 16)
    done = run_here("lm_training_step.py", *QUICK, *shape, "--save", tmp_path)
    assert done.returncode == 0, done.stderr
    dense, tucker = rows_of(tmp_path / "lm_training_step.csv")
    assert int(dense["attention_params"]) == 256 * 256 * 2 + 2 * 256 * 64
    assert int(tucker["attention_params"]) == 2 * (4 * 4 + 4 * 8 * 8 + 2 * 256 * 8)
    assert float(tucker["speedup"]) > 0
    assert float(tucker["peak_mb"]) > 0
