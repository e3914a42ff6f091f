"""Step rules that bring a fault into a run, through the seam that users have."""

import math
from collections.abc import Callable

import torch

from vit_tucker.training.step import Closure, OrdinaryStep, Stepping, StepResult


class StopAt(OrdinaryStep):
    """Ends a run when so many steps are finished, without a chance to save."""

    def __init__(self, at: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.error = at, error or KeyboardInterrupt()

    def step(self, closure: Closure, trainer: Stepping) -> StepResult:
        if trainer.progress.global_step == self.at:
            raise self.error
        return super().step(closure, trainer)


class RuinGradients(OrdinaryStep):
    """From the step on, the loss is finite and its gradient is not."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def step(self, closure: Closure, trainer: Stepping) -> StepResult:
        def ruined():
            loss = closure()
            if trainer.progress.global_step >= self.at:
                next(trainer.bare.parameters()).grad.fill_(math.nan)
            return loss

        return super().step(ruined, trainer)


class AfterStep(OrdinaryStep):
    """Does something to the trainer after each step."""

    def __init__(self, act: Callable[[Stepping, StepResult], None]) -> None:
        super().__init__()
        self.act = act

    def step(self, closure: Closure, trainer: Stepping) -> StepResult:
        result = super().step(closure, trainer)
        self.act(trainer, result)
        return result


def with_scale(scale: float) -> Callable[[Stepping, StepResult], None]:
    """Gives a CPU run a loss scale, as fp16 on a GPU has, which is only asked for its state."""

    def act(trainer: Stepping, result: StepResult) -> None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    return act


def plugin(body: str) -> str:
    """Text of a plug-in whose step rule 'faulty' does something before each step."""
    return f"""
import os, signal, time
import vit_tucker
from vit_tucker.training.step import OrdinaryStep

@vit_tucker.register_step_rule("faulty")
class Faulty(OrdinaryStep):
    def step(self, closure, trainer):
        {body}
        return super().step(closure, trainer)
"""
