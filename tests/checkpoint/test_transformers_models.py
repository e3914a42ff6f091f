"""Language models into folders and back: the same logits, every entry of the config, and folders that transformers refuses."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vit_tucker as vt
from tests.hosts.decoders import DECODERS, make_decoder, small, tokens, transformers
from vit_tucker.errors import CheckpointError, PatchError

IDS = tokens(2, 20)
CONFIGS = {
    "tucker": small("llama"),
    "mla": vt.MLAConfig(kv_lora_rank=8, q_lora_rank=8),
    "gqa": vt.GQAConfig(num_kv_heads=1),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def entries(model: Any) -> dict[str, Any]:
    """Of a model's config, without those that a constructor leaves out: its class and dtype, and where it was made."""
    return {k: v for k, v in model.config.to_dict().items() if k not in ("architectures", "dtype", "_name_or_path")}


@pytest.fixture(scope="module")
def patched_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with Tucker Attention; tests change copies."""
    model = make_decoder("llama")
    vt.patch(model, CONFIGS["tucker"])
    return vt.save(model, tmp_path_factory.mktemp("patched") / "model")


@pytest.fixture
def folder(patched_folder: Path, tmp_path: Path) -> Path:
    """A copy of the patched model's folder."""
    for file in patched_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


class TestRoundTrip:
    @pytest.mark.parametrize("method", [None, *CONFIGS])
    @pytest.mark.parametrize("name", DECODERS)
    def test_the_same_logits_and_config(self, name, method, tmp_path):
        model = make_decoder(name)
        if method is not None:
            try:
                vt.patch(model, CONFIGS[method])
            except PatchError:
                pytest.skip(f"{method} can't carry {name}")
        loaded = vt.load(vt.save(model, tmp_path))
        assert torch.equal(logits(model), logits(loaded))
        assert entries(model) == entries(loaded)
        assert loaded.dtype == torch.float64
        assert not loaded.training
        assert (vt.patch_record(loaded) is None) == (method is None)
        if method is not None:
            assert vt.config_of(loaded) == vt.config_of(model)

    def test_what_a_model_runs_with_comes_back(self, tmp_path):
        options = {"rope_parameters": LLAMA3, "attn_implementation": "eager", "tie_word_embeddings": True}
        model = make_decoder("llama", torch.bfloat16, **options)
        model.generation_config.temperature = 0.3
        model.generation_config.do_sample = True
        vt.patch(model, CONFIGS["tucker"])
        loaded = vt.load(vt.save(model, tmp_path))
        assert loaded.config._attn_implementation == "eager"
        assert loaded.config.rope_parameters["factor"] == 8.0
        assert loaded.dtype == torch.bfloat16
        assert (loaded.generation_config.temperature, loaded.generation_config.do_sample) == (0.3, True)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(
            loaded.model.rotary_emb.inv_freq, make_decoder("llama", **options).float().model.rotary_emb.inv_freq
        )
        assert vt.load(tmp_path, attn_implementation="sdpa", dtype=torch.float32).dtype == torch.float32

    def test_tied_weights_are_stored_once(self, tmp_path):
        tied, free = (make_decoder("llama", tie_word_embeddings=tie) for tie in (True, False))
        names = [
            set(load_file(vt.save(model, tmp_path / str(i)) / "model.safetensors"))
            for i, model in enumerate((tied, free))
        ]
        assert names[1] - names[0] == {"lm_head.weight"}

    def test_a_loaded_model_is_saved_resized_and_generates(self, folder, tmp_path):
        loaded = vt.load(folder)
        again = vt.load(vt.save(loaded, tmp_path / "again"))
        settings = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(again.generate(IDS, **settings), loaded.generate(IDS, **settings))
        for layer in again.model.layers:
            layer.self_attn.resize(ranks=(4, 12, 8))
        found = vt.load(vt.save(again, tmp_path / "resized"))
        assert torch.equal(logits(found), logits(again))
        assert found.model.layers[1].self_attn.rank_options()["ranks"] == (4, 12, 8)

    def test_a_compiled_model_is_saved_as_what_it_is(self, tmp_path):
        model = make_decoder("llama")
        assert torch.equal(logits(vt.load(vt.save(torch.compile(model), tmp_path))), logits(model))

    def test_a_dense_folder_is_one_of_transformers(self, tmp_path):
        model = make_decoder("qwen2")
        vt.save(model, tmp_path)
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(found), logits(model))

    def test_folders_of_transformers_are_loaded(self, tmp_path):
        model = make_decoder("gpt2")
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(vt.load(tmp_path)), logits(model))

    def test_another_model_in_the_same_folder_replaces_the_first(self, tmp_path):
        model = make_decoder("llama")
        vt.save(model, tmp_path)
        vt.patch(model, CONFIGS["tucker"])
        vt.save(model, tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        assert torch.equal(logits(vt.load(tmp_path)), logits(model))


class TestTransformersRefuses:
    @pytest.mark.parametrize(
        "kind", ["AutoModelForCausalLM", "AutoModel", "LlamaForCausalLM", "LlamaModel", "GPT2LMHeadModel"]
    )
    def test_a_patched_folder(self, patched_folder, kind):
        with pytest.raises(Exception, match=r"patched: load it by vit_tucker\.load\(folder\)"):
            getattr(transformers, kind).from_pretrained(patched_folder)

    def test_a_patched_folder_even_with_a_config_of_the_users(self, patched_folder):
        config = make_decoder("llama").config
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            transformers.LlamaForCausalLM.from_pretrained(patched_folder, config=config)

    def test_saving_a_patched_model_itself(self, tmp_path):
        model = make_decoder("llama")
        vt.patch(model, CONFIGS["tucker"])
        with pytest.raises(PatchError, match=r"use vit_tucker\.save\(model, folder\)"):
            model.save_pretrained(tmp_path)
        vt.unpatch(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))

    def test_without_these_the_attention_would_be_random(self, tmp_path):
        """What the refusals are for: under the usual names transformers loads the folder, with other logits and no error."""
        model = make_decoder("gpt2")
        vt.patch(model, CONFIGS["mla"])
        vt.save(model, tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())["vit_tucker"]
        (tmp_path / "config.json").write_text(json.dumps({**values["host"], "model_type": values["host_type"]}))
        (tmp_path / "patched.safetensors").rename(tmp_path / "model.safetensors")
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(found.transformer.wte.weight, model.transformer.wte.weight)
        assert not torch.allclose(logits(found), logits(model), atol=0.1)


def rewrite(folder: Path, change: Any) -> None:
    """Changes config.json, without its digests."""
    values = json.loads((folder / "config.json").read_text())
    del values["vit_tucker"]["stored"]
    change(values["vit_tucker"])
    (folder / "config.json").write_text(json.dumps(values))


class TestRefusals:
    def test_what_has_changed_since(self, folder):
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"hidden_size": 24', '"hidden_size": 25'))
        with pytest.raises(CheckpointError, match=r"config\.json is not what was saved"):
            vt.load(folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda v: v.update(model_class="LlamaForCausalLN"), "did you mean 'LlamaForCausalLM'"),
            (lambda v: v.update(model_class="os"), "has no model 'os'"),
            (lambda v: v.update(model_class="LlamaConfig"), "has no model 'LlamaConfig'"),
            (lambda v: v.update(host_type="lama"), r"has no model 'LlamaForCausalLM' \(lama\)"),
            (lambda v: v.update(library="jax"), r"library: jax: one of timm, transformers"),
            (lambda v: v.update(extra=1), "extra"),
            (lambda v: v["host"].update(num_attention_heads=5), "can't be built"),
            (lambda v: v["host"].update(num_hidden_layers=3), r"no model\.layers\.2"),
            (lambda v: v["host"].update(num_hidden_layers=1), r"without a place in it: model\.layers\.1"),
            (
                lambda v: v["host"].update(intermediate_size=33),
                r"is \(32, 24\), not \(33, 24\)|is \(24, 32\), not \(24, 33\)",
            ),
            (lambda v: v["patch"].update(ranks=[4, 12, 8]), "of another model or patch|other options"),
            (lambda v: v["patch"].update(method="tucer"), "did you mean 'tucker'"),
            (lambda v: v["layers"]["model.layers.0.self_attn"].update(ranks=[4, 12, 8]), "was stored with"),
            (lambda v: v.update(attn_implementation="flash_attention_9"), "can't be built"),
        ],
    )
    def test_other_contents_are_one_line(self, folder, change, message):
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=message) as caught:
            vt.load(folder)
        assert len(str(caught.value).splitlines()) == 1

    def test_weights_of_integers(self, folder):
        state = load_file(folder / "patched.safetensors")
        state["model.norm.weight"] = torch.ones(24, dtype=torch.int8)
        save_file(state, folder / "patched.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight is int8: a quantised checkpoint"):
            vt.load(folder, verify=False)

    def test_a_push_by_timms_function(self):
        with pytest.raises(CheckpointError, match=r"for models of timm: write LlamaForCausalLM by vit_tucker\.save"):
            vt.push_to_hub(make_decoder("llama"), "me/x")

    def test_overrides_of_timm(self, folder):
        with pytest.raises(CheckpointError, match="num_classes: dtype or attn_implementation"):
            vt.load(folder, num_classes=3)
        with pytest.raises(CheckpointError, match=r"a torch\.dtype, not 'float32'"):
            vt.load(folder, dtype="float32")

    def test_options_of_the_other_library(self, make_vit, tmp_path):
        with pytest.raises(CheckpointError, match="label_names: for models of timm, not for LlamaForCausalLM"):
            vt.save(make_decoder("llama"), tmp_path / "a", label_names=["x"])
        with pytest.raises(CheckpointError, match="tokenizer: for language models"):
            vt.save(make_vit(), tmp_path / "a", tokenizer=object())
        with pytest.raises(CheckpointError, match="it has no save_pretrained"):
            vt.save(make_decoder("llama"), tmp_path / "a", tokenizer=object())
        assert not (tmp_path / "a").exists()

    def test_a_model_that_its_config_does_not_build(self, tmp_path):
        model = make_decoder("llama")
        model.lm_head = torch.nn.Linear(24, 61, bias=True).double()
        with pytest.raises(CheckpointError, match=r"transformers builds another model by the config.*lm_head\.bias"):
            vt.save(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()

    def test_classes_of_users_own(self, tmp_path):
        class Own(transformers.LlamaForCausalLM):
            pass

        with pytest.raises(CheckpointError, match="no class of transformers itself"):
            vt.save(Own(make_decoder("llama").config), tmp_path / "a")


def test_a_folder_of_an_older_version_is_loaded_with_a_note(folder, caplog):
    rewrite(folder, lambda values: values.update(version="0.0.1"))
    with caplog.at_level(logging.WARNING):
        vt.load(folder)
    assert "has no digests" in caplog.text


def test_ranks_that_a_cache_budget_chose_come_back(tmp_path):
    model = make_decoder("llama", torch.float32)
    vt.patch(model, vt.TuckerConfig(ranks={"cache": 0.5, "multiple_of": 2}), calibration=tokens(8, 16).split(4))
    loaded = vt.load(vt.save(model, tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.model.layers[1].self_attn.rank_options() == model.model.layers[1].self_attn.rank_options()
