"""The comparison of caches: splits, healing, cells that are there are not computed again, and cacheshrink's left padding."""

import copy
import csv
import json
import runpy
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from lm_baselines.chat import PROMPTS, answers_text, save_answers
from lm_baselines.healing import attention_parameters, heal, rate
from lm_baselines.methods import Source
from lm_baselines.padding import padding_rows
from lm_baselines.text import scored, split_text

from tests.benchmarks.conftest import BENCHMARKS
from vit_tucker.errors import DataError, DivergedError

WORDS = ("the", "cache", "of", "a", "model", "holds", "keys", "and", "values", "for", "each", "token")


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(("<pad>", *WORDS))}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<pad>")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    chosen = torch.randint(len(WORDS), (400,), generator=torch.Generator().manual_seed(0))
    file.write_text(" ".join(WORDS[i] for i in chosen))
    return file


@pytest.fixture(scope="module")
def folder(host, tokenizer, tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    copy.deepcopy(host).float().save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def test_splits_are_in_order_without_overlap(text, tokenizer):
    splits = split_text(text, tokenizer, 100, 8, 3, 5)
    assert [len(part) for part in splits[:4]] == [12, 50 - 12 - 8, 3, 5]
    whole = torch.tensor(tokenizer(text.read_text())["input_ids"])
    assert torch.cat(splits[:4]).flatten().tolist() == whole.tolist()
    with pytest.raises(DataError, match="400 tokens; calibration, training, validation and test need 480"):
        split_text(text, tokenizer, 400, 8, 3, 6)


def test_loss_is_that_of_transformers(host, batches):
    blocks = torch.cat(batches)[:6]
    with torch.no_grad():
        wanted = torch.stack([host(input_ids=block[None], labels=block[None]).loss for block in blocks]).mean()
    assert scored(host, blocks, 4).loss == pytest.approx(wanted.item(), rel=1e-6)


class TestHealing:
    def healed(self, host, blocks, **options):
        model = copy.deepcopy(host)
        losses = []
        given = {"steps": 6, "batch_size": 4, "lr": 3e-3, "seed": 0} | options
        heal(model, blocks, note=lambda step, loss: losses.append(loss), **given)
        return model, losses

    def test_equal_seeds_give_equal_models_and_the_loss_falls(self, host, batches):
        blocks = torch.cat(batches)[:8]
        (one, first), (two, second), (_, other) = (self.healed(host, blocks, seed=seed, steps=8) for seed in (0, 0, 1))
        assert first == second != other
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b)
        assert scored(one, blocks).loss < scored(host, blocks).loss

    def test_only_attention_is_trained_unless_asked(self, host, batches):
        for everything in (False, True):
            model, _ = self.healed(host, torch.cat(batches), steps=1, everything=everything)
            inside = {id(p) for p in attention_parameters(model)}
            changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), host.parameters(), strict=True)]
            attention = [id(p) in inside for p in model.parameters()]
            assert any(changed)
            assert changed == ([True] * len(changed) if everything else attention)

    def test_bf16_is_near_float32_with_parameters_in_their_type(self, host, batches):
        single = copy.deepcopy(host).float()
        (exact, first), (rounded, second) = (
            self.healed(single, torch.cat(batches), bf16=bf16) for bf16 in (False, True)
        )
        assert first != second
        assert second == pytest.approx(first, rel=2**-7)  # bf16 has eight bits
        assert all(p.dtype == torch.float32 for model in (exact, rounded) for p in model.parameters())

    def test_a_teacher_is_at_no_distance_from_itself(self, host, batches):
        _, losses = self.healed(host, torch.cat(batches), steps=1, teacher=host)
        assert losses[0] == pytest.approx(0, abs=1e-9)

    def test_rates_warm_up_and_fall_to_a_tenth(self):
        rates = [rate(step, 200, 1.0) for step in range(201)]
        assert rates[0] == 0.1
        assert max(rates) == rates[9] == rates[10] == 1
        assert rates[200] == pytest.approx(0.1)

    def test_a_loss_that_is_not_finite_ends_it(self, host, batches):
        broken = copy.deepcopy(host)
        with torch.no_grad():
            broken.lm_head.weight.fill_(float("nan"))
        with pytest.raises(DivergedError, match="at step 0 of healing"):
            heal(broken, torch.cat(batches), steps=2, batch_size=2, lr=1e-3, seed=0)


@pytest.fixture
def command(folder, text, monkeypatch, capsys):
    def call(save, *arguments):
        options = ["--length", "8", "--calibration-tokens", "96", "--choice-blocks", "2", "--test-blocks", "4"]
        script = BENCHMARKS / "perplexity_over_cache.py"
        given = [str(folder), "--text", str(text), "--save", str(save), *options, *arguments]
        monkeypatch.setattr(sys, "argv", [str(script), *given])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
        return ended.value.code, capsys.readouterr()

    return call


def test_answers_are_kept_and_shown(host, tokenizer, tmp_path):
    (tmp_path / "cells").mkdir()
    file = tmp_path / "cells" / "dense_32.json"
    cell = {"method": "dense", "entries": 32, "cache_share": 1.0, "stage": "one-shot"}
    save_answers(file, {}, host, tokenizer, cell)
    assert answers_text(tmp_path) == ""  # a tokenizer without a template of chats
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for name, share in (("dense", 1.0), ("Tucker", 0.25)):
        save_answers(
            file.with_name(f"{name}_32.json"), {}, host, chatting, cell | {"method": name, "cache_share": share}
        )
    shown = [line for line in answers_text(tmp_path).splitlines() if line.startswith("|")]
    assert len(shown) == 2 + 2 * len(PROMPTS)
    assert "Tucker, 25.0% of the cache, one-shot" in shown[3]
    asked = chatting(PROMPTS[0], return_tensors="pt").input_ids
    expected = host.generate(asked, max_new_tokens=40, do_sample=False)[0, asked.shape[1] :]
    assert chatting.decode(expected, skip_special_tokens=True).split() == shown[2].split("|")[3].split()


@pytest.mark.slow
def test_our_methods_are_healed_too(command, tmp_path):
    status, said = command(
        tmp_path,
        "--methods",
        "Tucker",
        "MLA",
        "--shares",
        "0.5",
        "--heal",
        "--steps",
        "1",
        "--lrs",
        "1e-3",
        "--seeds",
        "0",
        "--chat",
    )
    assert status == 0, said.err
    cells = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "cells").iterdir()}
    assert {"Tucker_16", "MLA_16", "Tucker_16_healed_lr0.001_seed0", "MLA_16_healed_lr0.001_seed0"} <= cells.keys()
    for name in ("Tucker_16", "MLA_16"):
        assert cells[name]["cached_entries"] <= 16
        assert cells[f"{name}_healed_lr0.001_seed0"]["perplexity"] != cells[name]["perplexity"]
    assert cells["Tucker_16"]["params_share"] <= 1


@pytest.mark.slow
def test_cells_are_computed_once_and_healed_at_the_best_rate(command, tmp_path):
    arguments = [
        "--methods",
        "dense",
        "CARE",
        "MHA2MLA",
        "--shares",
        "0.5",
        "--heal",
        "--steps",
        "2",
        "--lrs",
        "1e-3",
        "1e-2",
    ]
    status, said = command(tmp_path, *arguments, "--seeds", "0", "1")
    assert status == 0, said.err
    cells = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    healed = [name for name in cells if "healed" in name]
    assert len(healed) == 3 * 3  # two rates at the first seed and one at the second, of the dense model too
    with (tmp_path / "results.csv").open() as stream:
        rows = {(row["method"], row["stage"]): row for row in csv.DictReader(stream)}
    assert {method for method, _ in rows} == {"dense", "CARE", "MHA2MLA"}
    for method in ("CARE", "MHA2MLA"):
        assert float(rows[method, "one-shot"]["cached_entries"]) == 16
        assert rows[method, "healed"]["seeds"] == "2"
        cell = json.loads((tmp_path / "cells" / f"{method}_16.json").read_text())
        assert cell["variant"]["calibration_loss"] == min(row["calibration_loss"] for row in cell["variants"])
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    assert "complex basis" in (tmp_path / "results.md").read_text()
    status, said = command(tmp_path, *arguments, "--seeds", "0", "1")
    assert status == 0, said.err
    assert cells == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    status, said = command(tmp_path, "--methods", "dense", "--length", "16")
    assert status == 2
    assert "made with tokens" in said.err or "made with length 8, not 16" in said.err


def test_wrong_arguments(command, tmp_path):
    for arguments, message in ((["--shares", "2"], "between 0 and 1"), (["--text", "nowhere.txt"], "nowhere.txt")):
        status, said = command(tmp_path, *arguments)
        assert status == 2
        assert message in said.err
        assert "Traceback" not in said.err


def test_cacheshrink_takes_positions_from_lengths_and_the_host_does_not(folder):
    """Its steps are right without padding, once it gets the cache; behind left padding they are wrong, as prompts of sdpa are."""
    pytest.importorskip("cacheshrink", exc_type=ImportError)
    source = Source(
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval(),
        transformers.AutoTokenizer.from_pretrained(folder),
        torch.randint(1, len(WORDS), (2, 16)),
    )
    rows = {(row["model"], row["attention"]): row for row in padding_rows(source, torch.arange(1, 13))}
    for attention in ("sdpa", "eager"):
        host, renamed = rows["host", attention], rows["cacheshrink, cache renamed", attention]
        assert max(host[key] for key in ("cache_error", "padded_prefill_error", "padded_step_error")) < 1e-4
        assert renamed["cache_error"] < 1e-4
        assert renamed["padded_step_error"] > 1e-2
    assert (
        rows["cacheshrink", "eager"]["padded_prefill_error"]
        < 1e-4
        < 1e-2
        < rows["cacheshrink", "sdpa"]["padded_prefill_error"]
    )
