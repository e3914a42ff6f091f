"""Whole runs of language models: the same engine, with text in the place of images."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

import vit_tucker as vt
from tests.run import text
from tests.run.text import config, write_text
from tests.run.tiny import run, same, weights
from tests.training.rules import StopAt
from vit_tucker.cli.main import main
from vit_tucker.data.token_files import open_tokens
from vit_tucker.errors import CheckpointError, ConfigError, DataError, PatchError
from vit_tucker.inference.perplexity import perplexity

TUCKER = {"attention": {"method": "tucker", "ranks": [3, 8, 4], "init": "random"}}


@pytest.fixture(autouse=True)
def _text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(Path("text"))


def rows(folder: str) -> list[dict[str, str]]:
    with Path(folder, "summary.csv").open() as opened:
        return list(csv.DictReader(opened))


def test_a_run_learns_and_its_checkpoint_is_one_that_transformers_scores_alike():
    results = run(config("output_dir=a", "train.epochs=4"))
    found = rows("a")
    losses = [float(row["eval_loss"]) for row in found]
    assert losses[-1] < losses[0] < 1.02 * math.log(256)
    assert results["best"]["perplexity"] == min(float(row["eval_perplexity"]) for row in found)
    assert results["params"]["attention"] == 2 * 16 * 16 + 2 * 16 * 8
    assert results["cost"]["flops"] > 0
    model, info = AutoModelForCausalLM.from_pretrained("a/checkpoints/best", output_loading_info=True)
    assert not any(info.values())
    tokens = torch.from_numpy(open_tokens(Path("text"), "validation").tokens.astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):  # transformers' own loss, window by window
        window = tokens[None, start : start + 17]
        with torch.no_grad():
            total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    count = len(tokens) - 1
    assert results["best"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert results["best"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert results["best"]["bits_per_byte"] == pytest.approx(total / count / math.log(2), rel=1e-5)  # a token is a byte
    again = run(config("output_dir=a", "train.epochs=4"))
    assert again["evaluation"] == {
        "loss": results["best"]["loss"],
        "perplexity": results["best"]["perplexity"],
        "bits_per_byte": results["best"]["bits_per_byte"],
        "count": count,
    }


@pytest.mark.parametrize("sections", [{}, TUCKER], ids=["dense", "tucker"])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(sections):
    """Stopped after step 7 (epoch 2, step 2), saved at step 6: the same command gives the same weights, bit for bit."""
    extra = ["train.checkpoint_steps=2", "model.model_kwargs={attention_dropout: 0.1}", "train.model_ema=true"]
    sizes = {"model": {"name": "hf:llama", "model_kwargs": {**text.SIZES, "attention_dropout": 0.1}}}
    run(config("output_dir=whole", *extra, **sizes, **sections))
    with pytest.raises(KeyboardInterrupt):
        run(config("output_dir=parts", *extra, **sizes, **sections), step_rule=StopAt(7))
    assert json.loads(Path("parts/checkpoints/last/state.json").read_text())["progress"]["global_step"] == 6
    run(config("output_dir=parts", *extra, **sizes, **sections))
    assert same(weights("whole"), weights("parts"))
    assert same(weights("whole", "best"), weights("parts", "best"))
    assert Path("whole/summary.csv").read_text() == Path("parts/summary.csv").read_text()
    assert "eval_ema_perplexity" in rows("whole")[0]
    assert not same(weights("whole"), weights("whole", "step-00000008"))


def test_accumulation_and_checkpointed_activations_change_nothing_but_rounding():
    run(config("output_dir=a"))
    run(config("output_dir=b", "train.grad_accum_steps=4"))
    run(config("output_dir=c", "train.grad_checkpointing=true"))
    run(config("output_dir=d", "seed=1"))
    assert type(vt.load("c")) is type(vt.load("a"))
    expected, *others, other_seed = ([float(row["train_loss"]) for row in rows(folder)] for folder in "abcd")
    for found in others:
        assert found == pytest.approx(expected, rel=1e-5)
    assert other_seed != pytest.approx(expected, rel=1e-4)


def test_a_run_goes_on_from_another_and_from_a_folder_of_transformers():
    first = run(config("output_dir=a"))
    as_it_starts = run(config("output_dir=b", "model.checkpoint=a"), True)["evaluation"]
    assert as_it_starts["loss"] == pytest.approx(first["last"]["eval_loss"], rel=1e-6)
    pretrained = {"model": {"name": "hf:a/checkpoints/last", "pretrained": True}}
    healed = run(config("output_dir=c", **pretrained), True)["evaluation"]
    assert healed["loss"] == pytest.approx(first["last"]["eval_loss"], rel=1e-6)
    sizes_alone = run(config("output_dir=d", model={"name": "hf:a/checkpoints/last"}), True)["evaluation"]
    assert sizes_alone["loss"] > 1.05 * healed["loss"]


@pytest.mark.parametrize("sections", [{}, TUCKER], ids=["dense", "tucker"])
def test_checkpoints_are_saved_models_and_a_run_goes_on_without_what_it_started_from(sections):
    run(config("output_dir=a", "train.epochs=1"))
    Path("a").rename("host")
    start = {"model": {"name": "hf:host/checkpoints/last", "pretrained": True}, **sections}
    whole = run(config("output_dir=whole", **start))
    with pytest.raises(KeyboardInterrupt):
        run(config("output_dir=parts", **start), step_rule=StopAt(7))
    shutil.rmtree("host")
    parts = run(config("output_dir=parts", **start))
    assert same(weights("whole"), weights("parts"))
    model = vt.load("parts")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert bool(vt.patch_record(model)) == bool(sections)
    tokens = torch.from_numpy(open_tokens(Path("text"), "validation").tokens.astype(np.int64))
    found = perplexity(model, tokens, window=17, stride=16)
    assert found.tokens == len(tokens) - 1
    assert found.loss == pytest.approx(parts["best"]["loss"], rel=1e-5)
    assert whole["best"] == parts["best"]
    if sections:
        with pytest.raises(ValueError, match="vit_tucker.load"):
            AutoModelForCausalLM.from_pretrained("parts/checkpoints/best")


def test_a_gpt2_of_its_own_words_and_tied_weights():
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    gpt2 = {"model": {"name": "hf:gpt2", "model_kwargs": sizes}}
    results = run(config("output_dir=a", "data.block_size=null", **gpt2))
    assert results["data"]["block_size"] == 32
    run(config("output_dir=a", "data.block_size=null", "train.epochs=3", **gpt2), allow_changes=True)
    state = weights("a")
    assert torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])


def test_a_dry_run_and_a_quick_check_keep_nothing(capfd):
    run(config("output_dir=a"), dry_run=True)
    assert "5 per epoch, 10 in all, 10 to do; 8 windows = 1 process(es)" in capfd.readouterr().out
    run(config("output_dir=a"), quick_check=True)
    assert "256 evaluation tokens, a checkpoint" in capfd.readouterr().out
    assert not Path("a").exists()


MISTAKES = {
    "model.name=hf:lama": (ConfigError, r"model.name: hf:lama: no architecture of transformers; did you mean 'llama'"),
    "model.name=vit_tiny_patch16_224": (ConfigError, r"with data.dataset=tokens: tokens are for a language model"),
    "data.dataset=digits": (ConfigError, r"a language model learns from text, data.dataset=tokens"),
    "model.depth=2": (ConfigError, r"model.depth: is timm's; of hf:llama set entries of its transformers config"),
    "model.model_kwargs={hiden_size: 8}": (ConfigError, r"model_kwargs.hiden_size: .*; did you mean 'hidden_size'"),
    "model.model_kwargs={hidden_size: wide}": (ConfigError, r"model.model_kwargs: .*hidden_size"),
    "model.pretrained=true": (ConfigError, r"model.model_kwargs: the pretrained llama brings its own"),
    "data.block_size=65": (ConfigError, r"data.block_size=65: hf:llama has 64 positions"),
    "data.root=nowhere": (DataError, r"nowhere/validation.bin: no such file of tokens"),
    "data.val_split=valid": (DataError, r"valid.bin: no such file of tokens: it has train, validation"),
    "data.hflip=0.1": (ConfigError, r"data.hflip: is for images; data.dataset=tokens has dataset, root"),
    "train.mixup=0.1": (ConfigError, r"train.mixup: is for images"),
    "train.distill={}": (ConfigError, r"train.distill: is for images"),
    "model.checkpoint=nowhere": (CheckpointError, r"model.checkpoint: nowhere: no run folder"),
    "attention={method: tucker, ranks: [9, 8, 8]}": (PatchError, r"attention: "),
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_line_and_nothing_is_written(override):
    kind, message = MISTAKES[override]
    with pytest.raises(kind, match=message) as caught:
        run(config("output_dir=a", override))
    assert "\n" not in str(caught.value)
    assert not Path("a").exists()


def test_text_of_another_tokenizer_is_refused():
    described = json.loads(Path("text/validation.json").read_text())
    Path("text/validation.json").write_text(json.dumps({**described, "vocabulary": 300}))
    sizes = {"model": {"name": "hf:llama", "model_kwargs": {**text.SIZES, "vocab_size": 256}}}
    with pytest.raises(DataError, match=r"vocabulary of 300, and hf:llama knows 256: they are of another tokenizer"):
        run(config("output_dir=a", **sizes))


def test_all_tokens_are_read_where_that_is_asked_for():
    file = Path("text/train.bin")
    file.write_bytes(b"\x01\x00" + file.read_bytes()[2:])
    run(config("output_dir=a", "train.epochs=1"))
    with pytest.raises(DataError, match=r"text/train.bin: has changed since it was written"):
        run(config("output_dir=b", "train.epochs=1", "data.check=true"))


def test_a_run_goes_on_with_its_own_text_wherever_that_lies():
    run(config("output_dir=a"))
    Path("text").rename("elsewhere")
    write_text(Path("other"), 50)
    assert run(config("output_dir=a", "data.root=elsewhere"))["evaluation"]["count"] > 0
    with pytest.raises(DataError, match=r"a: the text of data.val_split, by its SHA-256, was \w+ when the run began"):
        run(config("output_dir=a", "data.root=other"))


def test_steps_of_an_epoch_are_for_text():
    with pytest.raises(ConfigError, match=r"train.steps_per_epoch: is for data.dataset=tokens"):
        run(config("output_dir=a", model={"name": "vit_tiny_patch16_224"}, data={"dataset": "digits"}))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("evaluate a", "a: a language model, which `perplexity` scores; a model of images is needed here"),
        ("bench a", "a: a language model, which `perplexity` scores"),
        ("plan hf:llama --method mha", "model.name: hf:llama is a language model, for `train` on text"),
    ],
)
def test_commands_for_images_refuse_language_models(command, message, capsys):
    run(config("output_dir=a", "train.epochs=1"))
    capsys.readouterr()
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_the_attention_alone_can_be_trained():
    run(config("output_dir=dense"))
    start = {"model": {"name": "hf:dense/checkpoints/last", "pretrained": True}, **TUCKER}
    run(config("output_dir=a", "train.only=attention", **start))
    before, after = weights("dense"), weights("a")
    kept = [name for name in before if ".self_attn." not in name]
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert weights("a").keys() - before.keys() == {name for name in after if ".self_attn." in name} - before.keys()
    assert not same(after, weights("a", "step-00000005"))
