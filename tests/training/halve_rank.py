"""A user's own step rule: it halves the head rank of the first patched layer after some steps."""

from pydantic import Field

import vit_tucker
from vit_tucker.training.step import OrdinaryStep, StepResult
from vit_tucker.validation.checked import Checked


class Options(Checked):
    after: int = Field(default=10, ge=1, description="Steps before.")


@vit_tucker.register_step_rule("halve_rank")
class HalveRank(OrdinaryStep):
    Options = Options

    def step(self, closure, trainer):
        result = super().step(closure, trainer)
        if trainer.progress.global_step + 1 != self.options.after:
            return result
        layer = next(part for part in trainer.bare.modules() if isinstance(part, vit_tucker.AttentionModule))
        head, *others = layer.ranks[0]
        new = layer.resize(ranks=(max(head // 2, 1), *others))
        return StepResult(result.loss, result.norm, new)
