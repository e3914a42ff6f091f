"""Plain products block by block."""

import pytest
import torch

from tests.attention.backends.test_backends import formula, run, tensors
from vit_tucker.attention.backends import blocked as blocked_backend
from vit_tucker.attention.backends import blocked_products as blocked


class TestBlocked:
    @pytest.mark.parametrize("room", [1, 300, 1000, 1 << 20])
    @pytest.mark.parametrize("kv_heads", [1, 4])
    @pytest.mark.parametrize("keep", [False, True])
    def test_any_size_of_blocks_gives_the_same(self, room, kv_heads, keep, monkeypatch):
        """From single rows of one image to all images at once; with the maps kept or computed again."""
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        monkeypatch.setattr(blocked, "BLOCK_BYTES", room)
        monkeypatch.setattr(blocked_backend, "room_for_maps", lambda *_: keep)
        results = []
        for compute in (formula, lambda *args: run("blocked", *args)):
            inputs = [t.requires_grad_() for t in tensors(kv_heads, batch=3)]
            y = compute(*inputs)
            (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            results.append([y, *(t.grad for t in inputs)])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(results[0][1], 1.001 * results[1][1])

    def test_blocks_cover_each_row_once_and_fit(self, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        q, k = torch.empty(5, 100, 8), torch.empty(5, 10, 8)
        for room in (1, 400, 3999, 4000, 9000, 1 << 20):
            monkeypatch.setattr(blocked, "BLOCK_BYTES", room)
            count = torch.zeros(5, 100)
            for images, rows, (scores, maps) in blocked.blocks(q, k, 2):
                count[images, rows] += 1
                assert scores.shape == maps.shape == (*count[images, rows].shape, 10)
                assert scores.numel() * 4 <= max(room, 40)
            assert torch.equal(count, torch.ones_like(count)), room

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_error_is_at_most_twice_the_references(self, dtype):
        """flash-attention's rule, for the output and all gradients; the reference is the formula in the same dtype."""
        errors = []
        for compute in (formula, lambda *args: run("blocked", *args)):
            exact = [t.requires_grad_() for t in tensors(tokens=65, widths=(32, 32))]
            low = [t.detach().to(dtype).requires_grad_() for t in exact]
            results = []
            for inputs, function in ((exact, formula), (low, compute)):
                y = function(*inputs)
                y.square().sum().backward()
                results.append([y, *(t.grad for t in inputs)])
            errors.append([(a - b).abs().max().item() for a, b in zip(*results, strict=True)])
        for reference, ours in zip(*errors, strict=True):
            assert 0 < ours <= 2 * reference

    @pytest.mark.parametrize("tokens", [7, 40])
    def test_keeps_maps_where_that_is_no_more_than_dense_attention_keeps(self, tokens):
        """4 H D numbers per token, here 4 * 4 / 0.3^2 = 178; maps alone are 4 N. Plain products keep maps whatever they take."""
        kept = {}
        for name in ("blocked", "eager"):
            sizes = kept[name] = []
            inputs = [t.requires_grad_() for t in tensors(tokens=tokens, widths=(8, 8))]
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
            ):
                run(name, *inputs)
        maps = 2 * 4 * tokens * tokens
        assert (maps in kept["blocked"]) == (tokens == 7)
        assert maps in kept["eager"]

    def test_is_one_operation_to_the_compiler(self):
        torch._dynamo.reset()
        q, k, v = (t[:, 0].contiguous() for t in tensors(4))
        for dynamic in (False, True):
            compiled = torch.compile(blocked.blocked_attention, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            torch.testing.assert_close(
                compiled(q, k, v, 0.3, False)[0], formula(q[:, None], k[:, None], v[:, None])[:, 0]
            )
        inputs = tuple(t.requires_grad_() for t in (q, k, v))
        torch.library.opcheck(blocked.blocked_attention, (*inputs, 0.3, True))
