"""Costs of language models: parameters of known models, caches by formula, operations that add up, and refusals."""

import pytest
import torch

from vit_tucker.cli import main
from vit_tucker.errors import ConfigError, VitTuckerError
from vit_tucker.run.costs import costs

pytest.importorskip("transformers")
TUCKER, GQA = "tucker ranks=[8,64,64]", "gqa num_kv_heads=2"
LLAMA_1B = (
    "model.model_kwargs={hidden_size: 2048, num_attention_heads: 32, num_key_value_heads: 8, num_hidden_layers: 16, "
    "intermediate_size: 8192, vocab_size: 128256, tie_word_embeddings: true}"
)


def test_gpt2_has_its_published_size_and_the_papers_cache():
    name, (dense, tucker, gqa) = costs("hf:gpt2", [TUCKER, GQA], precision="bf16")
    assert (name, dense.label, dense.params, dense.per) == ("hf:gpt2", "dense", 124_439_808, "1,024 tokens")
    assert (dense.kv_bytes, tucker.kv_bytes, gqa.kv_bytes) == (37_748_736, 3_145_728, 6_291_456)  # Table 2
    assert dense.params - tucker.params == dense.attention_params - tucker.attention_params > 0
    assert dense.flops - tucker.flops == dense.attention_flops - tucker.attention_flops > 0
    assert dense.activation_bytes is dense.latency is None


def test_llama_counts_its_key_value_heads_as_they_are():
    _, (dense,) = costs("hf:llama", overrides=[LLAMA_1B])
    assert dense.params == 1_235_814_400  # as its model card has it
    assert dense.attention_params == 16 * (2 * 2048**2 + 2 * 2048 * 512)
    assert dense.kv_bytes == 16 * 2 * 8 * 64 * 2048 * 4


def test_what_can_not_be_counted_or_measured_is_said():
    with pytest.raises(ConfigError, match="latency of language models is not measured here"):
        costs("hf:gpt2", device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"chosen from weights; add model\.pretrained=true"):
        costs("hf:gpt2", ["tucker ranks={cache: 0.5}"])
    with pytest.raises(VitTuckerError, match="tucker ranks=.*can't carry"):
        costs("hf:qwen3", [TUCKER], overrides=["model.model_kwargs={num_hidden_layers: 1}"])


def test_the_command_names_the_length_and_leaves_out_what_it_has_not(capsys):
    assert main(["cost", "hf:gpt2", "--method", GQA]) == 0
    shown = capsys.readouterr().out
    assert "- per 1,024 tokens; FLOPs" in shown
    assert "activations:" not in shown
