"""Whether cacheshrink's models are right with a cache and with left padding, at a ratio of 1, where they equal the host.

Three faults show, each by itself. Masks of sdpa are boolean, and are added to the scores: padded prompts are wrong. From
transformers 5.24 on its layers don't see the cache, which is called ``cache`` there. With the cache, positions of past keys are
counted from the cache's length: padded steps are wrong; and they rotate with the base 10,000 where the config has another one in
``rope_parameters``, as transformers 5 does: then steps are wrong without padding too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lm_baselines.caching import last_logits, padding_errors
from lm_baselines.methods import Source
from lm_baselines.moments import dense_entries
from lm_baselines.shrink import cacheshrink, rename_cache
from vit_tucker.show.tables import markdown

COLUMNS = ("model", "attention", "cache_error", "padded_prefill_error", "padded_step_error")


@torch.no_grad()
def row_of(name: str, model: nn.Module, attention: str, tokens: Tensor) -> dict[str, Any]:
    """Returns one row of the table, with largest errors of logits over the largest logit.

    Args:
        name: of the row.
        model: causal language model.
        attention: implementation that it is switched to.
        tokens: (N,) of a sequence.
    """
    model.set_attn_implementation(attention)  # type: ignore[operator]
    whole = model(input_ids=tokens[None], use_cache=False).logits[0, -1]
    step = last_logits(model, tokens[None], 0)[1][0]
    error = ((step - whole).abs().max() / whole.abs().max()).item()
    padded = padding_errors(model, tokens, len(tokens) // 2)
    return dict(zip(COLUMNS, (name, attention, error, *padded), strict=True))


def padding_rows(source: Source, tokens: Tensor) -> list[dict[str, Any]]:
    """Returns the host's row and cacheshrink's, as it is, and with the cache under the name that its layers know.

    Args:
        source: the host; cacheshrink is given all entries and one block, since nothing is lost then.
        tokens: (N,) of a sequence.
    """
    converted = cacheshrink(source.model, source.tokenizer, source.blocks[:1], dense_entries(source.model))
    used = source.model.config._attn_implementation  # type: ignore[union-attr]
    rows = []
    for attention in ("sdpa", "eager"):
        rows.append(row_of("host", source.model, attention, tokens))
        rows.append(row_of("cacheshrink", converted, attention, tokens))
        handles = rename_cache(converted)
        rows.append(row_of("cacheshrink, cache renamed", converted, attention, tokens))
        for handle in handles:
            handle.remove()
    source.model.set_attn_implementation(used)  # type: ignore[operator]
    return rows


def padding_table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a table in Markdown.

    Args:
        rows: see ``padding_rows``.
    """
    header = ("model", "attention", "a step with the cache", "left-padded prompt", "left-padded step")
    return markdown(
        header, [(*(row[c] for c in COLUMNS[:2]), *(f"{row[c]:.1e}" for c in COLUMNS[2:])) for row in rows], 2
    )
