"""Tiny runs of language models on a made-up text: bytes as tokens, a LLaMA of one block and 16 columns."""

from pathlib import Path

import yaml

from vit_tucker.config.load import load_config
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.tokenize import BYTES, tokenize

WORDS = ("core", "factor", "rank", "head", "query", "key", "value", "token", "layer", "model")
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY = {
    "model": {"name": "hf:llama", "model_kwargs": SIZES},
    "data": {"dataset": "tokens", "root": "text", "block_size": 16},
    "train": {
        "epochs": 2,
        "steps_per_epoch": 5,
        "global_batch_size": 8,
        "lr": 0.01,
        "min_lr": 0.001,
        "warmup_epochs": 0.4,
        "weight_decay": 0.1,
        "opt_betas": [0.9, 0.95],
        "eval_batch_size": 16,
        "cpu": True,
    },
}


def write_text(folder: Path, sentences: int = 100) -> None:
    """Makes the files of tokens of a text with some order in it."""
    lines = [" ".join(WORDS[(i * i + j) % 10] for j in range(i % 7 + 2)) + ".\n" for i in range(sentences)]
    file = folder.with_suffix(".txt")
    file.write_text("".join(lines))
    tokenize([file], BYTES, folder, validation=0.11)


def config(*overrides: str, **sections: object) -> RunConfig:
    """A tiny run, whose text lies in the folder ``text``."""
    Path("tiny.yaml").write_text(yaml.safe_dump({**TINY, **sections}))
    return load_config("tiny.yaml", overrides)
