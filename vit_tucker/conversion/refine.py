"""Layer-by-layer refinement: a few Adam steps that fit a converted layer's output to its host's, without labels.

The steps are taken in whitened coordinates, where a factor's entries all move the output about equally, and relative to each
factor's size; without that they spoil what a closed form has already fitted. A held-out eighth of the sequences decides: the best
state seen on it is kept, so the result is never worse there than the start.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vit_tucker.attention.call import Call
from vit_tucker.attention.module import AttentionModule
from vit_tucker.attention.moments import LayerCall
from vit_tucker.tensor.metric import Root

SEQUENCES = 16
TOKENS = 3200
"""A step takes so many sequences, or tokens, at most."""
CHECK_EVERY = 10


def step_size(call: LayerCall) -> int:
    """Returns how many sequences of a call a step takes."""
    return min(SEQUENCES, max(1, TOKENS // call.x.shape[1]))


def joined(calls: Iterable[LayerCall]) -> list[LayerCall]:
    """Returns calls with neighbours of few sequences joined, where they are of one length and share mask and rotations.

    Steps and the held-out part are drawn from one call each, so a call of one sequence would be either of them.
    """
    groups: list[list[LayerCall]] = []
    for call in calls:
        last = groups[-1] if groups else []
        if last and sum(len(part.x) for part in last) < SEQUENCES and can_join(last[0], call):
            last.append(call)
        else:
            groups.append([call])
    return [group[0] if len(group) == 1 else _concatenated(group) for group in groups]


def _concatenated(calls: list[LayerCall]) -> LayerCall:
    x, y, probe = (torch.cat(parts) for parts in zip(*((call.x, call.y, call.probe) for call in calls), strict=True))
    return replace(calls[0], x=x, y=y, probe=probe)


def can_join(one: LayerCall, other: LayerCall) -> bool:
    """Returns whether two calls differ in their tokens alone."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))

    def shared(call: LayerCall) -> bool:
        return all(part is None or part.ndim < 4 or len(part) == 1 for part in (call.attn_mask, call.rope))

    return (
        one.x.shape[1:] == other.x.shape[1:] and one.is_causal == other.is_causal and one.valid is None
        and other.valid is None and shared(one) and shared(other)
        and same(one.attn_mask, other.attn_mask) and same(one.rope, other.rope)
    )  # fmt: skip


class Whitened(nn.Module):
    """Parametrisation of a Linear's weight (out, in) by V = root weight, or by V = weight root.

    Args:
        metric: root of the metric of the output, or of the input.
        output: which of the two.
        dtype: of the weight.
    """

    def __init__(self, metric: Root, output: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.root, self.inverse = (part.to(dtype) for part in metric)
        self.output = output

    def forward(self, v: Tensor) -> Tensor:
        """Maps V to a weight.

        Args:
            v: (rows, columns) of the weight's shape.
        """
        return self.inverse @ v if self.output else v @ self.inverse

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Maps a weight to V.

        Args:
            weight: (rows, columns).
        """
        return self.root @ weight if self.output else weight @ self.root


def refine(
    layer: AttentionModule,
    calls: list[LayerCall],
    in_root: Root,
    out_root: Root,
    *,
    steps: int,
    lr: float,
    seed: int,
    after_step: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Fits a layer's output to the host's on given calls, in place.

    Args:
        layer: converted, in eval mode; any dtype, refined in float32 (float64 if it is).
        calls: inputs and outputs of the host, weights of the tokens as the norm of the probes.
        in_root: root of the tokens' second moment (C, C).
        out_root: root of the output metric (O, O): the error is measured in it.
        steps: of Adam, with a cosine schedule and a short warm-up.
        lr: relative to the root mean square of each parameter; cut to a quarter, from the best state, whenever a check finds
            no gain.
        seed: of the choice of sequences.
        after_step: called after each step.

    Returns:
        Relative squared error on the held-out sequences before and after.
    """
    dtype = torch.float64 if next(layer.parameters()).dtype == torch.float64 else torch.float32
    work = copy.deepcopy(layer).to(dtype).requires_grad_(True)
    for linear in work.input_projections():
        parametrize.register_parametrization(linear, "weight", Whitened(in_root, False, dtype))
    for linear in work.output_projections():
        parametrize.register_parametrization(linear, "weight", Whitened(out_root, True, dtype))
    metric = out_root.root.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    held = [slice(0, max(1, call.x.shape[0] // 8)) for call in calls]
    parameters = [p for p in work.parameters() if p.square().mean() > 0]
    sizes = [p.detach().square().mean().sqrt().item() for p in parameters]
    solver = torch.optim.Adam([{"params": [p]} for p in parameters], betas=(0.9, 0.99))
    unseen = [call.part(part) for call, part in zip(calls, held, strict=True)]
    norm = max(sum(_loss(None, call, metric).item() for call in unseen), 1e-300)

    @torch.no_grad()
    def held_out() -> float:
        return sum(_loss(work, call, metric).item() for call in unseen) / norm

    first = best = held_out()
    best_state = copy.deepcopy(work.state_dict())
    for step in range(steps):
        factor = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, size in zip(solver.param_groups, sizes, strict=True):
            group["lr"] = lr * factor * size
        number = int(torch.randint(len(calls), (), generator=generator))
        call, start = calls[number], held[number].stop if calls[number].x.shape[0] > 1 else 0
        part = start + torch.randperm(call.x.shape[0] - start, generator=generator)[: step_size(call)]
        with torch.enable_grad():
            loss = _loss(work, call.part(part), metric) / norm
            solver.zero_grad()
            loss.backward()
        solver.step()
        after_step()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            now = held_out()
            if now < best:
                best, best_state = now, copy.deepcopy(work.state_dict())
            else:  # the steps are too large for what is left to gain
                work.load_state_dict(best_state)
                solver.state.clear()
                lr /= 4
    work.load_state_dict(best_state)
    for linear in [*work.input_projections(), *work.output_projections()]:
        parametrize.remove_parametrizations(linear, "weight")
    if best < first:
        layer.load_state_dict(work.state_dict())
    return first, best


def _loss(layer: AttentionModule | None, call: LayerCall, metric: Tensor) -> Tensor:
    """Returns the weighted squared error on a call in the output metric; without a layer the variance of the targets."""
    y = call.y.to(metric.dtype)
    if layer is None:
        difference = y - y.mean((0, 1))
    else:
        given = Call(call.x.to(metric.dtype), call.attn_mask, call.is_causal, call.rope)
        difference = layer.run(given) - y
    return ((difference @ metric).square().sum(-1) * call.token_weights().to(metric.dtype)).mean()
