"""The shipped configs of language models start, with tiny sizes, and healing after a conversion pays."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.run.text import config, write_text
from tests.run.tiny import run
from vit_tucker.config.load import load_config

LLAMA = "hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 2"
GPT2 = "n_embd: 16, n_layer: 1, n_head: 4"
SIZES = {
    "lm/gpt2_small_text": GPT2,
    "lm/llama_small_text": LLAMA,
    "lm/gpt2_openwebtext": f"{GPT2}, vocab_size: 256",
    "lm/llama3_openwebtext2": f"{LLAMA}, head_dim: 4, vocab_size: 256",
}
TUCKER = "attention={method: tucker, ranks: [4, 8, 4], init: random}"


@pytest.fixture(autouse=True)
def _text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))


def start(name: str, *overrides: str) -> str:
    """What a quick check reports of a preset with a text and sizes of ours."""
    tiny = ["data.root=text", "data.block_size=16", "output_dir=a", "train.cpu=true", "train.compile=false"]
    tiny += ["train.global_batch_size=32", "train.grad_accum_steps=4"]
    given = load_config(name, [*tiny, *overrides])
    return run(given, quick_check=True)["quick_check"]


@pytest.mark.parametrize("extra", [(), (TUCKER,)], ids=["dense", "tucker"])
@pytest.mark.parametrize("name", SIZES)
def test_they_start(name, extra):
    assert "all works: 2 steps" in start(name, f"model.model_kwargs={{{SIZES[name]}}}", *extra)


def test_a_converted_model_is_healed():
    run(config("output_dir=dense", "train.epochs=20", "train.warmup_epochs=1"))
    ranks = "attention.ranks=[4, 8, 4]"
    preset = ["model.name=hf:dense/checkpoints/last", ranks, "attention.calibration.images=16", "train.cpu=true"]
    preset += ["data.root=text", "data.block_size=16", "train.lr=3e-3", "train.steps_per_epoch=10"]
    given = load_config("lm/smollm2_heal", [*preset, "output_dir=healed"])
    dense = run(config("output_dir=dense", "train.epochs=20", "train.warmup_epochs=1"))["evaluation"]["loss"]
    converted = run(given, True)["evaluation"]["loss"]
    healed = run(given)["last"]["eval_loss"]
    assert dense < converted
    assert healed < 0.5 * (dense + converted)
