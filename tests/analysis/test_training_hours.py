"""The expected hours of a training, by hand, and of the presets as the docs have them."""

from pathlib import Path

import pytest

from vit_tucker.analysis.training_hours import MFU, PEAK, TrainingHours, count_multiplied

pytest.importorskip("transformers")

from vit_tucker.checkpoint.language_host import load_language_model
from vit_tucker.config.load import load_config
from vit_tucker.config.schema import ModelConfig
from vit_tucker.hosts.structure import without_weights

PAGE = Path(__file__).parents[2] / "docs" / "train_language_models.md"


def test_hours_by_hand():
    cost = TrainingHours(parameters=1000, tokens=10**9)
    assert cost.operations == 6 * 10**12
    assert cost.hours(peak=1e9, mfu=0.5) == pytest.approx(6e12 / 5e8 / 3600)
    assert cost.hours() == pytest.approx(cost.hours(PEAK, MFU))


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_are_only_looked_up_multiply_nothing(tied):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "tie_word_embeddings": tied}
    model = load_language_model(ModelConfig(name="hf:gpt2", model_kwargs=sizes), vocabulary=100)
    block = 2 * 16 + (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)
    assert count_multiplied(model) == block + 16 + 100 * 8
    assert sum(p.numel() for p in model.parameters()) == block + 16 + (100 + 16) * 8 + (0 if tied else 100 * 8)


PRESETS = {
    "lm/gpt2_openwebtext": (124_439_808 + 47 * 768, 600_000, 491_520),  # OpenAI's GPT-2 with 47 more tokens
    "lm/llama3_openwebtext2": (1_235_814_400, 100_000, 524_288),  # Meta's Llama-3.2-1B
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_sizes_and_the_docs_their_hours(name):
    parameters, steps, tokens = PRESETS[name]
    config = load_config(name)
    model = without_weights(lambda: load_language_model(config.model))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == parameters
    recipe = config.train
    assert recipe.epochs * recipe.steps_per_epoch == steps
    assert recipe.global_batch_size * config.data.block_size == tokens
    cost = TrainingHours(count_multiplied(model), steps * tokens)
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:] == [
        f"{cost.parameters / 1e6:,.0f} M",
        f"{steps:,} x {tokens:,}",
        f"{cost.operations:.2g}",
        f"{cost.hours():,.0f}",
    ]
