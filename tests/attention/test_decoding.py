"""Attention of some tokens with a past, against plain products in float64."""

import pytest
import torch
from torch import Tensor

from vit_tucker.analysis.interleaved import peak_bytes
from vit_tucker.attention.backends import Choices, eager, recorded_choices
from vit_tucker.attention.decoding import attend_past

B, H, D = 2, 6, 16
MASKS = ("none", "boolean", "additive", "heads", "blind")


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    k, v = (x.double().repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


def make_mask(kind: str, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    mask = torch.rand(B, H if kind == "heads" else 1, queries, keys) > 0.4
    if kind == "none":
        return None
    if kind == "blind":  # left padding: the first token of the second text sees nothing
        mask[1, :, 0] = False
        return mask
    mask[..., 0] = True
    return torch.where(mask, 0.0, float("-inf")).to(dtype) if kind == "additive" else mask


def make_heads(
    queries: int, keys: int, groups: int, value_width: int = D, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = ((B, H, queries, D), (B, groups, keys, D), (B, groups, keys, value_width))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 33), (2, 33), (8, 8), (8, 70)])
@pytest.mark.parametrize("value_width", [D, 24])
def test_few_queries_against_many_keys(kind: str, groups: int, queries: int, keys: int, value_width: int) -> None:
    q, k, v = make_heads(queries, keys, groups, value_width)
    mask = make_mask(kind, queries, keys)
    y = attend_past(q, k, v, attn_mask=mask, is_causal=False, scale=0.3)
    torch.testing.assert_close(y, reference(q, k, v, mask, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, H])
@pytest.mark.parametrize(("queries", "keys"), [(1, 9), (5, 5), (5, 9)])
def test_a_decoder_without_a_mask_attends_to_earlier_tokens_or_one_token_to_all(
    groups: int, queries: int, keys: int
) -> None:
    """The keys beyond the queries are those of an empty static cache."""
    q, k, v = make_heads(queries, keys, groups)
    order = torch.ones(queries, keys, dtype=torch.bool).tril() if queries > 1 else None
    y = attend_past(q, k, v, attn_mask=None, is_causal=True, scale=0.3)
    torch.testing.assert_close(y, reference(q, k, v, order, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("threads", "batch"), [(2, 1), (5, 1), (5, B)])
def test_stacks_of_heads_for_many_threads(kind: str, threads: int, batch: int) -> None:
    """One text alone is one task for torch's kernel: its heads are divided, so that all threads have one."""
    q, k, v = (x[:batch] for x in make_heads(3, 40, 1))
    mask = make_mask(kind, 3, 40)
    mask = None if mask is None else mask[:batch]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = attend_past(q, k, v, attn_mask=mask, is_causal=False, scale=0.3)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(y, reference(q, k, v, mask, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 40), (3, 40), (H, 1, 40), (1, 1, 1, 40), (B, H, 1, 40), (B, 1, 3, 40)])
def test_masks_of_any_shape_that_broadcasts(shape: tuple[int, ...]) -> None:
    q, k, v = make_heads(3, 40, 2)
    mask = torch.rand(shape) > 0.3
    y = attend_past(q, k, v, attn_mask=mask, is_causal=True, scale=0.3)
    torch.testing.assert_close(y, reference(q, k, v, mask, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_width", [D, 24])
def test_precision(dtype: torch.dtype, value_width: int) -> None:
    q, k, v = make_heads(1, 300, 1, value_width, dtype)
    mask = make_mask("blind", 1, 300)
    y = attend_past(q, k, v, attn_mask=mask, is_causal=False, scale=0.3)
    assert y.dtype == dtype
    expected = reference(q, k, v, mask, 0.3)
    assert (y - expected).norm() < (1e-6 if dtype == torch.float32 else 2e-2) * expected.norm()
    assert not y[1, :, 0].any()


def test_gradients_of_few_queries() -> None:
    """Chunked training and prompts of few tokens: keys and values of the past are trained too."""
    mask = make_mask("boolean", 2, 9)
    own = [x.requires_grad_() for x in make_heads(2, 9, 1)]
    other = [x.detach().clone().requires_grad_() for x in own]
    attend_past(*own, attn_mask=mask, is_causal=False, scale=0.3).square().sum().backward()
    reference(*other, mask, 0.3).square().sum().backward()
    for x, y in zip(own, other, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("value_width", [D, 24])
def test_a_step_compiles_as_one_graph_for_any_length_and_mask(value_width: int) -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v, mask: attend_past(q, k, v, attn_mask=mask, is_causal=True, scale=0.3),
        backend="eager",
        fullgraph=True,
    )
    for keys in (9, 33, 64):
        q, k, v = make_heads(1, keys, 1, value_width)
        for kind in ("blind", "none"):
            mask = make_mask(kind, 1, keys)
            y = compiled(q, k, v, mask)
            torch.testing.assert_close(y, reference(q, k, v, mask, 0.3), rtol=0, atol=1e-12)


def recorded(*heads: Tensor, mask: Tensor | None = None) -> Choices:
    with recorded_choices() as choices:
        attend_past(*heads, attn_mask=mask, is_causal=True, scale=0.3)
    return choices


def test_the_form_is_reported_with_its_reason() -> None:
    (line,) = recorded(*make_heads(1, 9, 1), mask=make_mask("boolean", 1, 9)).lines()
    assert line.startswith("sdpa: the past is read once, for stacked heads")
    assert "few queries with a past" in line
    (line,) = recorded(*make_heads(1, 9, 1, 24)).lines()
    assert line.startswith("eager: torch's kernel would need the past padded")
    (line,) = recorded(*make_heads(9, 9, 1)).lines()
    assert "past" not in line


@pytest.mark.parametrize("value_width", [64, 40])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_no_copy_of_the_past_is_made(value_width: int, kind: str) -> None:
    q, k, v = torch.randn(B, H, 1, 64), torch.randn(B, 1, 2000, 64), torch.randn(B, 1, 2000, value_width)
    mask = make_mask(kind, 1, 2000, torch.float32)
    kept = [x for x in (q, k, v, mask) if x is not None]
    peak = peak_bytes(lambda: recorded(q, k, v, mask=mask), kept, torch.device("cpu"))
    assert peak < v.nbytes / 2
    assert peak_bytes(lambda: recorded(q, k.clone(), v, mask=mask), kept, q.device) > k.nbytes  # the twin that copies


@pytest.mark.parametrize("kind", [*MASKS, "causal"])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_long_prompts_by_plain_products_are_computed_in_parts(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = make_heads(9, 9, 1, 24)
    mask = None if kind == "causal" else make_mask(kind, 9, 9)
    order = torch.ones(9, 9, dtype=torch.bool).tril() if kind == "causal" else mask
    monkeypatch.setattr(eager, "LEAST_ROWS", rows)
    monkeypatch.setattr(eager, "CACHE_BYTES", 0)
    with torch.no_grad():
        y = eager.attend(q, k, v, mask, kind == "causal", 0.3, 0.0)
    torch.testing.assert_close(y, reference(q, k, v, order, 0.3), rtol=0, atol=1e-12)


def test_the_scores_of_a_long_prompt_are_bounded() -> None:
    q, k, v = torch.randn(1, 8, 2048, 16), torch.randn(1, 1, 2048, 16), torch.randn(1, 1, 2048, 16)
    with torch.no_grad():
        peak = peak_bytes(lambda: eager.attend(q, k, v, None, True, 0.3, 0.0), [q, k, v], torch.device("cpu"))
    with torch.enable_grad():
        whole = peak_bytes(lambda: eager.attend(q, k, v, None, True, 0.3, 0.0), [q, k, v], torch.device("cpu"))
    assert peak < whole / 4
