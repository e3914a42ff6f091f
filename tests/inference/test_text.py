"""Perplexity of stored models on text files, by the command and by its function; the command's refusals in one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import vit_tucker as vt
from tests.hosts.decoders import make_decoder, small, transformers
from vit_tucker.checkpoint.load import load_causal_lm
from vit_tucker.cli import main
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.inference.perplexity import perplexity
from vit_tucker.inference.text import encode, perplexity_of_text, read_text

TEXT = "the café was naïve: 😀 b c\n" * 9


def byte_tokenizer(bos: bool = False) -> Any:
    """A fast tokenizer of the 256 bytes and a token that begins a text, 256."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": 256}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a patched model and a tokenizer."""
    model = make_decoder("llama", torch.float32, vocab_size=257)
    vt.patch(model, small("llama"))
    return vt.save(model, tmp_path_factory.mktemp("text") / "model", tokenizer=byte_tokenizer())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


class TestTokens:
    def test_bytes_of_tokens_add_up_with_any_characters(self):
        for whole in (TEXT, "😀", "a"):
            ids, sizes = encode(whole, byte_tokenizer())
            assert sum(sizes) == len(whole.encode()) == len(ids)
        assert encode("", byte_tokenizer())[1] == []

    def test_a_text_is_read_up_to_the_tokens_that_are_asked_for(self, text):
        found = read_text(text, byte_tokenizer(), 10)
        assert len(found.ids) == len(found.token_bytes) == 10
        assert (found.bos, found.begins_with_bos) == (256, False)
        assert read_text(text, byte_tokenizer(bos=True), 10).begins_with_bos
        assert found.ids == read_text(text, byte_tokenizer(bos=True), 10).ids

    def test_tokenizers_without_offsets_give_no_bytes(self, text):
        class Slow:
            is_fast, bos_token_id = False, None

            def __call__(self, text, **options):
                return {"input_ids": [ord(c) % 61 for c in text]}

        found = read_text(text, Slow())
        assert found.token_bytes is None
        assert not found.begins_with_bos


class TestFunction:
    def test_it_is_that_of_the_model_on_the_tokens(self, stored, text):
        model, ids = vt.load(stored), byte_tokenizer()(TEXT)["input_ids"]
        found = perplexity_of_text(stored, text, window=32, stride=16)
        assert found.nll == pytest.approx(perplexity(model, ids, window=32, stride=16).nll, rel=1e-6)
        assert found.text_bytes == len(TEXT.encode()) - 1
        in_memory = perplexity_of_text(model, text, window=32, stride=16, tokenizer=byte_tokenizer())
        assert in_memory == found

    def test_a_token_begins_windows_where_the_tokenizer_begins_texts_with_it(self, stored, text):
        plain = perplexity_of_text(stored, text, window=32)
        begun = perplexity_of_text(stored, text, window=32, tokenizer=byte_tokenizer(bos=True))
        assert begun.tokens == len(TEXT.encode()) > plain.tokens
        asked = perplexity_of_text(stored, text, window=32, bos=True)
        assert asked == begun
        assert perplexity_of_text(stored, text, window=32, tokenizer=byte_tokenizer(bos=True), bos=False) == plain

    def test_bytes_need_no_tokenizer(self, stored, text):
        found = perplexity_of_text(stored, text, window=32, tokenizer="bytes")
        assert found.bits_per_byte == pytest.approx(found.loss / math.log(2))
        with pytest.raises(ConfigError, match="no token that begins a text"):
            perplexity_of_text(stored, text, tokenizer="bytes", bos=True)

    def test_a_model_in_memory_needs_a_tokenizer(self, text):
        with pytest.raises(ConfigError, match="needed for a model in memory"):
            perplexity_of_text(make_decoder("llama"), text)


def test_a_causal_model_is_loaded_in_a_dtype_and_a_timm_model_refused(stored, make_vit, tmp_path):
    assert load_causal_lm(stored, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no language model, but vit_tiny_patch16_224 of timm"):
        load_causal_lm(vt.save(make_vit(), tmp_path / "vit"))


class TestCommand:
    def test_people_and_machines(self, stored, text, capfd):
        command = ["perplexity", str(stored), "--text", str(text), "--window", "32", "--device", "cpu"]
        assert main(command) == 0
        shown = capfd.readouterr()
        assert shown.out.startswith(f"{stored} on {text}: perplexity ")
        assert "windows of 32 tokens every 32" in shown.out
        assert main([*command, "--json", "--stride", "16", "--tokens", "50", "--dtype", "float64"]) == 0
        values = json.loads(capfd.readouterr().out)
        expected = perplexity_of_text(stored, text, window=32, stride=16, tokens=50, dtype=torch.float64)
        assert values == {"model": str(stored), "text": str(text), **expected.to_dict()}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--text", "none.txt"], "none.txt: no such text file"),
            (["--window", "1000"], "window 1000: the model has 256 positions"),
            (["--stride", "300"], "stride 300: from 1 to 256"),
            (["--tokenizer", "none/none/none"], "no such folder"),
            (["--dtype", "float8"], "invalid choice: 'float8'"),
            (["--tokens", "1"], "1 of them; two at least"),
        ],
    )
    def test_refusals_are_one_line(self, stored, text, options, message, capfd):
        assert main(["perplexity", str(stored), "--text", str(text), "--device", "cpu", *options]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert message in err
        assert len(err.strip().splitlines()) == 1

    def test_a_binary_file_is_no_text(self, stored, tmp_path, capfd):
        (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
        assert main(["perplexity", str(stored), "--text", str(tmp_path / "a.bin"), "--device", "cpu"]) == 2
        assert "no UTF-8 text" in capfd.readouterr().err

    def test_a_folder_without_a_tokenizer_asks_for_one(self, text, tmp_path, capfd):
        vt.save(make_decoder("llama"), tmp_path / "model")
        assert main(["perplexity", str(tmp_path / "model"), "--text", str(text), "--device", "cpu"]) == 2
        assert "name one by --tokenizer" in capfd.readouterr().err
