"""Dense language models from folders and names: what is refused in one line, and that nothing of a folder is run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hosts.decoders import make_decoder, tokens
from vit_tucker.checkpoint.causal_lm import load_dense_causal_lm, load_tokenizer
from vit_tucker.checkpoint.load import load
from vit_tucker.errors import CheckpointError
from vit_tucker.hosts.transformers_library import import_transformers, quiet_transformers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as transformers writes it."""
    with quiet_transformers(progress=False):
        make_decoder("llama", torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **entries: object) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **entries}))


def test_a_folder_is_loaded_quietly_in_its_dtype_or_another(folder, capfd):
    model = load_dense_causal_lm(folder)
    assert (model.dtype, model.training) == (torch.float32, False)
    assert torch.equal(model(tokens(1, 9)).logits, make_decoder("llama", torch.float32)(tokens(1, 9)).logits)
    found = load_dense_causal_lm(folder, dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert (found.dtype, found.config._attn_implementation) == (torch.bfloat16, "eager")
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_refused_instead_of_random(folder):
    file = folder / "model.safetensors"
    state = load_file(file)
    weight = state.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"incomplete: no model\.layers\.1\.self_attn\.q_proj\.weight"):
        load_dense_causal_lm(folder)
    save_file({**state, "model.layers.1.self_attn.q_proj.weight": weight[:1].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        load_dense_causal_lm(folder)


def test_tensors_without_a_place_are_noted(folder, caplog):
    file = folder / "model.safetensors"
    save_file({**load_file(file), "other.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    load_dense_causal_lm(folder)
    assert "other.weight has no place in the model" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "can't be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), r"no file named model\.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda f: rewrite(f, model_type="lama"), "can't be loaded"),
        (lambda f: rewrite(f, model_type="vit"), "can't be loaded"),
        (lambda f: (f / "config.json").unlink(), r"neither config\.json nor a \.gguf file"),
    ],
)
def test_damaged_folders_are_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_dense_causal_lm(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_code_in_a_folder_is_never_run(folder):
    mark = folder / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\nclass OwnConfig: pass\n")
    rewrite(folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"})
    values = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    for open_it in (load_dense_causal_lm, load, load_tokenizer):
        with pytest.raises(CheckpointError, match="code of its own, which is not run"):
            open_it(folder)
    assert not mark.exists()


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_dense_causal_lm(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./none", "no such folder, and no 'owner/name' of the hub"),
        ("a/b/c", "no such folder"),
        ("nobody/nothing", "nobody/nothing: no such folder: not in the hub's cache"),
        ("hf-hub:nobody/nothing@main", "not in the hub's cache"),
    ],
)
def test_names_of_nothing_are_one_line(name, message):
    with pytest.raises(CheckpointError, match=message):
        load_dense_causal_lm(name)


def test_gguf_files_are_named_one_by_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 \.gguf files; name one of them: a\.gguf, b\.gguf"):
        load_dense_causal_lm(tmp_path)
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_dense_causal_lm(tmp_path / "a.gguf")
    (tmp_path / "c.bin").touch()
    with pytest.raises(CheckpointError, match=r"a file; name its folder, or a \.gguf file"):
        load_dense_causal_lm(tmp_path / "c.bin")


class TestWithoutTransformers:
    def test_the_extra_is_named(self, folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        for open_it in (load_dense_causal_lm, load, load_tokenizer):
            with pytest.raises(CheckpointError, match=r"need transformers.*pip install 'vit_tucker\[hf\]'"):
                open_it(folder)

    @pytest.mark.parametrize("version", ["4.57.1", "5.9.0"])
    def test_an_old_one_is_refused(self, monkeypatch, version):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(CheckpointError, match=rf"transformers 5\.10 or newer, not {version}: pip install"):
            import_transformers("gpt2", CheckpointError)
        monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.10rc1")
        assert import_transformers("gpt2", CheckpointError) is sys.modules["transformers"]
