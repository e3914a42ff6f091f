"""Products with Tucker cores: the same results in each order, the operations that each is said to cost, and which is chosen."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vit_tucker.attention import cores
from vit_tucker.attention.cores import choose_order, latent_inputs, latent_outputs, order_macs

C, H, R = 24, 6, (3, 8, 4)


def factors(width: int = C, core: tuple[int, int, int] = R) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U1 (H, r1), C (r1, r2, r3), U2^T (r2, width) and p0 (r2,)."""
    shapes = ((H, core[0]), core, (core[1], width), (core[1],))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("order", ["formed", "folded", "apart"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 5)])
def test_each_order_is_exact_and_costs_what_it_is_said_to(
    order: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "choose_order", lambda *_: order)
    head, core, weight, bias = factors()
    macs = order_macs(shape[0] * shape[1], C, H, R)[order]  # type: ignore[index]
    x, y = torch.randn(*shape, C, dtype=torch.float64), torch.randn(*shape, H * R[2], dtype=torch.float64)
    each = torch.einsum("ij,jbc->ibc", head, core)
    with FlopCounterMode(display=False) as count:
        (q,) = latent_inputs(x, head, core, [weight], [None])
    assert count.get_total_flops() == 2 * macs
    torch.testing.assert_close(q, torch.einsum("bnr,irc->binc", x @ weight.mT, each))
    (q,) = latent_inputs(x, head, core, [weight], [bias])
    torch.testing.assert_close(q, torch.einsum("bnr,irc->binc", x @ weight.mT + bias, each))
    with FlopCounterMode(display=False) as count:
        z = latent_outputs(y, head, core, weight.mT, None)
    assert count.get_total_flops() == 2 * macs
    torch.testing.assert_close(z, torch.einsum("bnic,irc->bnr", y.unflatten(2, (H, -1)), each) @ weight)


def chosen(tokens: tuple[int, int], width: int = C, core: tuple[int, int, int] = R) -> str:
    head, middle, *_ = factors(width, core)
    return choose_order(torch.empty(*tokens, width), width, head, middle)


def test_few_tokens_never_form_all_heads_in_inference() -> None:
    with torch.no_grad():
        assert chosen((1, 1)) == chosen((8, 1)) == chosen((1, 8)) == "apart"
        assert chosen((1, 65)) == "formed"
        assert chosen((1, 1), core=(H, 8, 4)) == "apart"
        assert chosen((1, 1000), core=(3, 24, 4)) == "folded"  # as many query columns as the input has
        assert chosen((1, 1), core=(3, 24, 4)) == "apart"
        assert chosen((64, 1), core=(H, 8, 4)) == "formed"  # each head's core is used 64 times
    assert chosen((1, 1)) == "formed"  # training: the parts would be kept for the backward pass


@pytest.mark.parametrize("tokens", [1, 5])
def test_compiled_steps_choose_by_one_token_and_else_for_many(tokens: int) -> None:
    torch.compiler.reset()
    head, core, weight, _ = factors()
    orders: list[str] = []

    def step(x: Tensor) -> Tensor:
        orders.append(choose_order(x, C, head, core))
        return F.linear(x, weight)

    with torch.no_grad():
        torch.compile(step, backend="eager", fullgraph=True)(torch.randn(1, tokens, C, dtype=torch.float64))
    assert orders == ["apart" if tokens == 1 else "formed"]


def test_each_kind_of_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vit_tucker.attention")
    with torch.no_grad():
        for _ in range(2):
            chosen((1, 1), core=(2, 7, 4))
            chosen((1, 300), core=(2, 7, 4))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "order of products 'apart': few tokens, for which the cores of all heads are not formed "
        "[6 heads, core (2, 7, 4), projection of width 24]",
        "order of products 'formed': the cores of all heads are formed once [6 heads, core (2, 7, 4), projection of width 24]",
    ]
