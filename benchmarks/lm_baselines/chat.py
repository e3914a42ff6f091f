"""What a model answers before and after a conversion: greedy, by its chat template."""

import json
from pathlib import Path
from typing import Any

import torch

from lm_baselines.cells import write_cell
from vit_tucker.show.tables import markdown, share

PROMPTS = (
    "What is the capital of France?",
    "What does a package manager do?",
    "Write one sentence about the sea.",
    "How do I list the files in a folder on Linux?",
)
NEW_TOKENS = 40


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """Returns what a model answers, NEW_TOKENS tokens at most, in one line.

    Args:
        model: causal language model.
        tokenizer: of it, with a chat template.
        prompt: of the user.
    """
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    text: str = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())


def save_answers(file: Path, settings: dict[str, Any], model: Any, tokenizer: Any, cell: dict[str, Any]) -> None:
    """Writes a model's answers beside its cell, if its tokenizer has a chat template.

    Args:
        file: of the cell; that of the answers begins with "chat_".
        settings: of the cell.
        model, tokenizer: converted, or dense.
        cell: what is known of the model.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return
    known = {key: cell[key] for key in ("method", "entries", "cache_share")}
    rows = [[prompt, answer(model, tokenizer, prompt)] for prompt in PROMPTS]
    write_cell(file.with_name(f"chat_{file.name}"), settings, **known, stage=f"{cell['stage']} answers",
               new_tokens=NEW_TOKENS, rows=rows)  # fmt: skip


def answers_text(folder: Path) -> str:
    """Returns the table of answers, if there are any.

    Args:
        folder: with a folder cells.
    """
    cells = [json.loads(file.read_text()) for file in sorted((folder / "cells").glob("chat_*.json"))]
    if not cells:
        return ""
    cells.sort(key=lambda cell: (-cell["cache_share"], cell["stage"] != "one-shot answers"))
    rows = []
    for number, prompt in enumerate(PROMPTS):
        for cell in cells:
            stage = cell["stage"].removesuffix(" answers")
            form = (
                cell["method"]
                if cell["cache_share"] == 1
                else f"{cell['method']}, {share(cell['cache_share'])} of the cache, {stage}"
            )
            rows.append((prompt, form, cell["rows"][number][1]))
    return f"Answers, greedy, the first {NEW_TOKENS} tokens:\n\n{markdown(('asked', 'model', 'answer'), rows, 3)}\n\n"
