"""The Triton kernels against the formula in float64.

``test_triton_tucker`` runs this file in a process whose Triton interprets, and in one with a GPU where there is one.

In bfloat16 and float16 the error may be twice that of the same formula in plain torch in that dtype. In float32 it may be 2e-6:
sums of some hundred terms, each with a unit round-off of 6e-8; times the sharpness, as the error of a score grows with the score.
Each case has twins that must fail: the formula with one entry of each core changed, and without the mask or the rotation.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from vit_tucker.attention.rope import rotate
from vit_tucker.attention.triton_tucker import available, tucker_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
if reason := available(DEVICE):
    pytest.skip(reason, allow_module_level=True)

from vit_tucker.attention.triton_tucker import launch, tiles  # noqa: E402 - needs Triton
from vit_tucker.attention.triton_tucker.op import backward_op, forward_op  # noqa: E402

FLOAT32_ERROR = 2e-6
NAMES = ("z", "dp", "dk", "dv", "dpre", "dpost")


@dataclass(frozen=True)
class Case:
    """ranks r2, r3, r2t, r3t; boolean, additive: shape of the mask; angles: shape of the angles; sharpness: of the weights."""

    ranks: tuple[int, int, int, int] = (16, 24, 12, 16)
    B: int = 1
    N: int = 21
    H: int = 2
    boolean: tuple[int, ...] | None = None
    additive: tuple[int, ...] | None = None
    is_causal: bool = False
    angles: tuple[int, ...] | None = None
    sharpness: float = 1.0


CASES = {
    "rank 8": Case((8, 8, 8, 8), B=2, N=5),
    "odd ranks": Case((33, 12, 24, 33), N=64, H=1),
    "many heads": Case((12, 16, 33, 24), N=5, H=5),
    "rank 64": Case((64, 64, 64, 64), N=64, H=1),
    "rank 128": Case((128, 128, 128, 128), N=5, H=1),
    "unequal ranks": Case((16, 128, 24, 64), N=5),
    "rank 1": Case((1, 2, 3, 1), N=5),
    "many tokens": Case((16, 16, 16, 16), N=100, H=1),
    "boolean mask": Case(B=2, H=1, boolean=(2, 1, 21, 21)),
    "boolean mask per head": Case(boolean=(2, 21, 21)),
    "additive mask": Case(B=2, additive=(21, 21)),
    "additive mask per head": Case(additive=(1, 2, 21, 21)),
    "additive mask of keys": Case(B=2, H=1, additive=(2, 1, 1, 21)),
    "mask over blocks": Case(N=40, additive=(1, 2, 40, 40)),
    "causal": Case(N=70, H=1, is_causal=True),
    "causal before a mask": Case(H=1, additive=(21, 21), is_causal=True),
    "rotated": Case(B=2, H=1, angles=(21, 12)),
    "rotated per image": Case(B=2, H=1, angles=(2, 21, 12)),
    "rotated and masked": Case(B=2, angles=(21, 12), boolean=(2, 1, 21, 21)),
    "rotated and causal": Case(N=40, H=1, angles=(40, 12), is_causal=True),
    "sharp": Case((16, 16, 16, 16), N=40, H=1, sharpness=16),
    "sharp, rotated": Case((16, 16, 16, 16), N=40, H=1, sharpness=8, angles=(40, 8)),
    "rotated, rank 128": Case((128, 128, 128, 128), N=5, H=1, angles=(5, 64)),
}


class Example:
    """Random inputs of a case, rounded to a dtype, and what the formula gives for them."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        (r2, r3, r2t, r3t), B, N, H = case.ranks, case.B, case.N, case.H
        shapes = ((B, N, r2), (B, N, r3), (B, N, r3t), (H, r2, r3), (H, r2t, r3t), (B, N, r2t))
        scales = (1, 1, 1, case.sharpness * r2**-0.5, r3t**-0.5, 1)
        tensors = [torch.randn(s, generator=g) * f for s, f in zip(shapes, scales, strict=True)]
        *self.inputs, self.dz = [t.to(DEVICE, dtype) for t in tensors]
        self.case, self.dtype, self.scale = case, dtype, r3**-0.5
        self.mask, self.angles = None, None
        if case.boolean:
            self.mask = (torch.rand(case.boolean, generator=g) > 0.4) | torch.eye(N, dtype=torch.bool)
        if case.additive:
            self.mask = torch.randn(case.additive, generator=g) * 2
        if case.angles:
            angle = torch.rand(case.angles, generator=g) * 6
            angle[..., 0, :] = 0  # a class token
            self.angles = (angle.sin().to(DEVICE), angle.cos().to(DEVICE))
        if self.mask is not None:
            self.mask = self.mask.to(DEVICE)

    def ours(self, mask: Tensor | None = None) -> list[Tensor]:
        """z and the five gradients."""
        inputs = [t.clone().requires_grad_() for t in self.inputs]
        mask = self.mask if mask is None else mask
        options = {"attn_mask": mask, "is_causal": self.case.is_causal, "angles": self.angles}
        z = tucker_attention(*inputs, scale=self.scale, **options)
        return [z.detach(), *torch.autograd.grad(z, inputs, self.dz)]

    def formula(self, dtype: torch.dtype, case: Case | None = None, entry: float = 0.0) -> list[Tensor]:
        """The same by plain torch, for the case's mask and angles; ``entry`` is added to an entry of each core."""
        case = case or self.case
        inputs = [t.to(dtype, copy=True) for t in self.inputs]
        for core in inputs[3:]:
            core[-1, 0, 0] += entry
        p, k, v, pre, post = (t.requires_grad_() for t in inputs)
        q = torch.einsum("bna,har->bhnr", p, pre)
        if case.angles and self.angles:
            sin, cos = (a if a.ndim == 2 else a.unsqueeze(1) for a in self.angles)
            q = rotate(q, sin, cos) if dtype != torch.float64 else rotate(q, sin.double(), cos.double())
        scores = q @ k.unsqueeze(1).mT * self.scale
        if case.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        elif case.boolean:
            scores = scores.masked_fill(~self.mask, float("-inf"))
        elif case.additive:
            scores = scores + self.mask.to(dtype)
        z = torch.einsum("bhnr,har->bna", scores.softmax(-1) @ v.unsqueeze(1), post)
        return [z.detach(), *torch.autograd.grad(z, (p, k, v, pre, post), self.dz.to(dtype))]


def errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative, in the Frobenius norm."""
    return [float((r.double() - e).norm() / e.norm()) for r, e in zip(results, exact, strict=True)]


def allowed(example: Example, exact: list[Tensor]) -> list[float]:
    """See the module."""
    if example.dtype == torch.float32:
        return [FLOAT32_ERROR * example.case.sharpness] * len(exact)
    return [2 * e for e in errors(example.formula(example.dtype), exact)]


def check(example: Example, results: list[Tensor]) -> None:
    """Results near the formula, far from that of the twins."""
    exact = example.formula(torch.float64)
    bounds = allowed(example, exact)
    found = errors(results, exact)
    if path := os.environ.get("TRITON_TUCKER_ERRORS"):
        with open(path, "a") as file:
            print(example.dtype, *(f / b for f, b in zip(found, bounds, strict=True)), file=file)
    for name, error, bound in zip(NAMES, found, bounds, strict=True):
        assert error <= bound, (name, error, bound)
    twins = [example.formula(torch.float64, entry=4.0)]
    case = example.case
    for without in ({"angles": None}, {"boolean": None, "additive": None, "is_causal": False}):
        if replace(case, **without) != case:
            twins.append(example.formula(torch.float64, replace(case, **without)))
    for twin in twins:
        for name, error, bound in zip(NAMES, errors(results, twin), bounds, strict=True):
            assert error > 3 * bound, ("twin", name, error, bound)


DTYPES = (torch.bfloat16, torch.float32)
PAIRS = [
    (name, dtype)
    for number, name in enumerate(CASES)
    for other, dtype in enumerate(DTYPES)
    if not INTERPRETED or (number + other) % 2 == 0
]
"""All cases in both dtypes on a GPU; in the interpreter, which takes a second for each, the dtypes take turns."""


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=str)
def test_matches_the_formula(name, dtype):
    example = Example(CASES[name], dtype)
    results = example.ours()
    assert [r.dtype for r in results] == [dtype] * 6
    assert [r.shape for r in results[1:]] == [t.shape for t in example.inputs]
    check(example, results)


def test_float16():
    example = Example(CASES["rotated and masked"], torch.float16)
    check(example, example.ours())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_token(dtype):
    """Its weight is 1 whatever the scores: z, dv and dpost by the formula, nothing for p, k and pre."""
    example = Example(Case(N=1, H=3), dtype)
    z, dp, dk, dv, dpre, dpost = example.ours()
    exact = example.formula(torch.float64)
    bounds = allowed(example, exact)
    for at, result in ((0, z), (3, dv), (5, dpost)):
        assert errors([result], [exact[at]])[0] <= bounds[at]
    for result in (dp, dk, dpre):
        assert result.abs().max() < 1e-5
    assert errors([z], [example.formula(torch.float64, entry=4.0)[0]])[0] > 3 * bounds[0]


def test_heads_and_images_in_parts(monkeypatch):
    example = Example(Case(B=2, angles=(2, 21, 12), boolean=(2, 2, 21, 21)), torch.bfloat16)
    split: list[int] = []
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 100)
    monkeypatch.setattr(launch, "CHUNK_BYTES", 1)
    parts = launch.parts
    monkeypatch.setattr(launch, "parts", lambda *args: split.append(parts(*args)) or split[-1])
    results = example.ours()
    assert split == [example.case.H] * (1 + example.case.B)  # forward, and the keys of each image
    check(example, results)
    again = example.ours()
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


def test_slices_of_one_projection_are_read_in_place(monkeypatch):
    example = Example(CASES["rotated"], torch.bfloat16)
    expected = example.ours()
    joint = torch.cat(example.inputs[:3], -1)
    seen = []
    of = launch.Inputs.of
    monkeypatch.setattr(launch.Inputs, "of", lambda *args: seen.append(of(*args)) or seen[-1])
    options = {"scale": example.scale, "angles": example.angles}
    leaf = joint.clone().requires_grad_()
    p, k, v = leaf.split([16, 24, 16], -1)
    z = tucker_attention(p, k, v, *example.inputs[3:], **options)
    (gradient,) = torch.autograd.grad(z, leaf, example.dz)
    assert seen[0].k.data_ptr() == leaf.data_ptr() + 16 * leaf.element_size()
    assert torch.equal(z, expected[0])
    assert torch.equal(gradient, torch.cat(expected[1:4], -1))


def test_any_strides():
    example = Example(CASES["rank 8"], torch.float32)
    expected = example.ours()
    leaves = [t.mT.contiguous().requires_grad_() for t in example.inputs]
    z = tucker_attention(*(t.mT for t in leaves), scale=example.scale)
    assert torch.equal(z, expected[0])
    for gradient, plain in zip(torch.autograd.grad(z, leaves, example.dz), expected[1:], strict=True):
        assert torch.equal(gradient.mT, plain)
    example.dz = torch.ones(())[None, None, None].to(DEVICE).expand_as(z)  # the gradient of a sum
    check(example, example.ours())


@pytest.mark.parametrize(("kind", "angles"), [("boolean", (21, 12)), ("additive", None)])
def test_rows_with_everything_masked_give_zeros(kind, angles):
    example = Example(Case(B=2, H=1, boolean=(2, 1, 21, 21), angles=angles), torch.float32)
    example.mask[0, 0, 3] = False
    rows = torch.ones(2, 21, 1).to(DEVICE)
    rows[0, 3] = 0
    mask = (
        example.mask
        if kind == "boolean"
        else torch.zeros_like(example.mask, dtype=torch.float32).masked_fill(~example.mask, float("-inf"))
    )
    results = example.ours(mask)
    assert not results[0][0, 3].any()
    assert not results[1][0, 3].any()
    example.mask[0, 0, 3, 0] = True  # the formula has no value for such a row: without its gradient it says nothing
    example.dz = example.dz * rows
    exact = example.formula(torch.float64)
    results[0][0, 3] = exact[0][0, 3].float()
    assert max(errors(results, exact)) < FLOAT32_ERROR


def test_gradients_reach_what_wants_them():
    example = Example(CASES["rank 8"], torch.float32)
    expected = example.ours()
    p, k, v, pre, post = example.inputs
    k = k.clone().requires_grad_()
    (dk,) = torch.autograd.grad(tucker_attention(p, k, v, pre, post, scale=example.scale), k, example.dz)
    assert torch.equal(dk, expected[2])


def test_no_images():
    example = Example(replace(CASES["rank 8"], B=0), torch.bfloat16)
    z, *gradients = example.ours()
    assert z.shape == (0, 5, 8)
    assert not any(g.any() for g in gradients)


def test_values_that_are_the_keys():
    example = Example(Case((8, 8, 8, 8), N=5, H=1), torch.float32)
    example.inputs[2] = example.inputs[1]
    exact = example.formula(torch.float64)
    p, k, _, pre, post = example.inputs
    k = k.clone().requires_grad_()
    (dk,) = torch.autograd.grad(tucker_attention(p, k, k, pre, post, scale=example.scale), k, example.dz)
    assert errors([dk], [exact[2] + exact[3]])[0] < FLOAT32_ERROR
    assert errors([dk], [exact[2]])[0] > 1e-2


def test_compiles_in_one_graph():
    example = Example(Case((8, 8, 8, 8), N=5, H=1, boolean=(5, 5), angles=(5, 4)), torch.float32)
    expected = example.ours()
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def call(p, k, v, pre, post):
        options = {"attn_mask": example.mask, "angles": example.angles}
        return tucker_attention(p * 1, k, v, pre, post, scale=example.scale, **options)

    inputs = [t.clone().requires_grad_() for t in example.inputs]
    z = torch.compile(call, backend=keep, fullgraph=True, dynamic=True)(*inputs)
    results = [z.detach(), *torch.autograd.grad(z, inputs, example.dz)]
    assert sum("triton_tucker_attention" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 1
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_operator_is_registered_well():
    example = Example(Case((8, 8, 8, 8), N=5, H=1, boolean=(5, 5), angles=(5, 4)), torch.float32)
    rest = (example.mask, *example.angles, example.scale, False)
    torch.library.opcheck(forward_op, (*(t.requires_grad_() for t in example.inputs), *rest))
    with torch.no_grad():
        lse = forward_op(*example.inputs, *rest)[1]
        inputs = [t.detach() for t in example.inputs]
        torch.library.opcheck(backward_op, (example.dz, lse, *inputs, *rest))


def test_second_derivative_is_refused():
    example = Example(CASES["rank 8"], torch.float32)
    inputs = [t.requires_grad_() for t in example.inputs]
    z = tucker_attention(*inputs, scale=example.scale)
    (dp,) = torch.autograd.grad(z.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dp.sum().backward()
