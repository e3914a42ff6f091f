"""A tiny LLaMA with grouped heads, its calibration tokens and moments, for the baselines of benchmarks/."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import vit_tucker

BENCHMARKS = Path(vit_tucker.__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))


@pytest.fixture(scope="session")
def host():
    """Six query heads, two key heads of eight columns, in float64."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, num_attention_heads=6, num_key_value_heads=2, head_dim=8, num_hidden_layers=2,
        intermediate_size=32, vocab_size=97, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="session")
def batches():
    return list(torch.randint(97, (8, 4, 16), generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="session")
def moments(host, batches):
    from lm_baselines.moments import layer_moments

    return layer_moments(host, batches)


@pytest.fixture
def copied(host):
    return copy.deepcopy(host)
