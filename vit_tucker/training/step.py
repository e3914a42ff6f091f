"""Defines how one optimizer step is made, which a plug-in may change: ``train.step_rule`` in the YAML."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from vit_tucker.config.registries import STEP_RULES, step_options
from vit_tucker.config.schema import TrainConfig
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.storage.weights import whole
from vit_tucker.training.objective import Loss
from vit_tucker.training.progress import Progress
from vit_tucker.validation.checked import Checked

Closure = Callable[[], Loss]
"""Adds the gradient of this step's whole batch, reduced over processes, to the parameters' ``grad``; gives this process's loss.
Called again it repeats exactly that, with the same images and random numbers."""


class Stepping(Protocol):
    """Lists what a rule may use of the trainer.

    Attributes:
        accelerator: device, processes, precision.
        model: as it trains; ``bare`` is the same without wrappers.
        optimizer: Accelerate's wrapper of timm's, with ``param_groups``, ``state``, ``step`` and ``zero_grad``.
        config: the recipe.
        progress: where the run stands: ``progress.global_step`` steps are finished.
        seed: of the run.
        log_due: whether the norm of this step's gradient is to be logged.
    """

    accelerator: Accelerator
    model: nn.Module
    bare: nn.Module
    optimizer: Any
    config: TrainConfig
    progress: Progress
    seed: int
    log_due: bool


@dataclass(frozen=True)
class StepResult:
    """Reports what a step rule has done.

    Attributes:
        loss: what the closure returned.
        norm: of all processes' gradient, (); None if it was not measured.
        reshaped: new parameters by those whose place they took in the model. The trainer replaces them in the optimizer, EMA and
            DDP;
            all processes must reshape alike.
        carried: entries of the optimizer's state by new parameter; those that are missing start without.
    """

    loss: Loss
    norm: Tensor | None = None
    reshaped: Mapping[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    carried: Mapping[nn.Parameter, dict[str, Any]] = field(default_factory=dict)


class StepRule(Protocol):
    """Defines how an optimizer step is made; its state is part of each checkpoint."""

    def step(self, closure: Closure, trainer: Stepping) -> StepResult:
        """Makes one step, and leaves no gradients behind.

        Args:
            closure: computes loss and gradients anew each time it is called.
            trainer: model and optimizer.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns what a run that goes on needs: JSON values, tuples, dtypes and tensors, nested."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; tensors are on the CPU.

        Args:
            state: as it was saved.

        Raises:
            ValueError: it is of another rule; a KeyError counts likewise.
        """


class NoOptions(Checked):
    """Validates the options of a rule that has none."""


class OrdinaryStep:
    """Makes a step of backward, clip and optimizer; the rule of runs that name none, and a base for others.

    Attributes:
        Options: the rule's options in the YAML, a ``vit_tucker.validation.checked.Checked``.
        options: an instance of it.
    """

    Options: ClassVar[type[Checked]] = NoOptions

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    def step(self, closure: Closure, trainer: Stepping) -> StepResult:
        """Makes one step, and leaves no gradients behind; arguments as of ``StepRule.step``."""
        loss = closure()
        norm = clip_gradient(trainer)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return StepResult(loss, norm)

    def state_dict(self) -> dict[str, Any]:
        """Returns nothing: all that goes on is in the optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for any ``state``, which must be that of another rule."""
        if state:
            raise ValueError(f"it has {', '.join(map(str, state))}, which this rule does not have")


def clip_gradient(trainer: Stepping) -> Tensor | None:
    """Clips the gradient of all parameters as the recipe asks for.

    Returns:
        Its norm before, scalar; None where it is neither clipped by it nor due to be logged.
    """
    norm = None
    if trainer.config.clip_grad is not None:
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.config.clip_grad)
    elif trainer.log_due:
        trainer.accelerator.unscale_gradients()
        norm = get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    return None if norm is None else whole(norm)


_Rule = TypeVar("_Rule", bound=type[Any])


def register_step_rule(name: str) -> Callable[[_Rule], _Rule]:
    """Makes a class available as ``train.step_rule: name``, or ``{name: ..., options}``, as a decorator.

    Args:
        name: letters, digits and _.

    Returns:
        The decorator; it gives the class back as it is. The class follows ``StepRule``, is made from its options, and names their
        model as ``Options``; deriving from ``OrdinaryStep`` gives all of that.

    Raises:
        ConfigError: another class has that name, or the class lacks something.
    """

    def register(rule: _Rule) -> _Rule:
        missing = [part for part in ("step", "state_dict", "load_state_dict", "Options") if not hasattr(rule, part)]
        if missing:
            raise ConfigError(f"step rule '{name}': {rule.__name__} has no {missing[0]}; derive it from OrdinaryStep")
        if not (isinstance(rule.Options, type) and issubclass(rule.Options, Checked)):
            raise ConfigError(f"step rule '{name}': {rule.__name__}.Options must derive from Checked")
        STEP_RULES.add(name, rule)
        return rule

    return register


def create_step_rule(given: dict[str, Any] | None) -> StepRule:
    """Creates the rule that a config's ``train.step_rule`` names from its options; the ordinary one if None."""
    if given is None:
        return OrdinaryStep()
    rule: StepRule = STEP_RULES.get(given["name"])(step_options(given))
    return rule


def restore_rule(rule: StepRule, given: dict[str, Any] | None, saved: Mapping[str, Any] | None) -> bool:
    """Restores the state of the same rule from a checkpoint.

    Args:
        rule, given: the run's, see ``create_step_rule``.
        saved: name and state, as the checkpoint has them.

    Returns:
        Whether there was one; a rule that the run did not have before starts anew.

    Raises:
        CheckpointError: the state does not fit.
    """
    if given is None or saved is None or saved["name"] != given["name"]:
        return False
    try:
        rule.load_state_dict(saved["state"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(
            f"the checkpoint's state of the step rule {given['name']} does not fit: {reason}"
        ) from None
    return True
