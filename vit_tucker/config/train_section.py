"""The train section of a run's config: the recipe, in timm's words."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, WithJsonSchema, field_validator

from vit_tucker.config.data_section import PathText
from vit_tucker.config.registries import PENALTIES, step_options
from vit_tucker.validation.checked import Checked

MAX_BATCH = 2**24
MAX_EPOCHS = 1_000_000
MAX_STEPS = 1_000_000_000
MAX_RATE = 1000
"""Far beyond what anyone trains with: a number above is a slip, and would end in hours of waiting or in no memory."""
Weight = Annotated[float, Field(ge=0, le=1e9)]
StepRuleEntry = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
            ]
        }
    ),
]
"""``name``, and the rule's options; in YAML its name alone too."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class DistillConfig(Checked):
    """Distillation from a dense teacher, by default the host before its attention was replaced."""

    teacher: PathText = Field(
        default="host",
        description="host: the dense model that the run starts from; or a run folder or weights file of that model.",
    )
    kind: Literal["soft", "hard"] = Field(
        default="soft", description="Cross-entropy with the teacher's softened distribution, or with its label."
    )
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Share of the distillation loss; the rest is the labels'."
    )
    temperature: float = Field(default=1.0, gt=0, le=1000, description="Of both softmaxes (soft only).")
    features: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="Weight of the mean squared error between the final tokens of both models.",
    )


class TrainConfig(Checked):
    """The recipe, in timm's words."""

    epochs: int = Field(default=10, ge=1, le=MAX_EPOCHS, description="Passes over the training images.")
    global_batch_size: int = Field(
        default=128,
        ge=1,
        le=MAX_BATCH,
        description="Images, or windows of tokens, per optimizer step, over all processes and accumulation.",
    )
    grad_accum_steps: int = Field(default=1, ge=1, le=MAX_BATCH, description="Micro-batches per optimizer step.")
    eval_batch_size: int | None = Field(
        default=None, ge=1, le=MAX_BATCH, description="Images per process at evaluation; the micro-batch if null."
    )
    eval_interval: int = Field(
        default=1, ge=1, le=MAX_EPOCHS, description="Evaluate every n epochs, and after the last."
    )
    steps_per_epoch: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Optimizer steps that count as an epoch (dataset tokens): what is evaluated and saved after, and what a "
        "warm-up is a share of; a pass over the tokens if null.",
    )

    only: str | tuple[str, ...] | None = Field(
        default=None,
        description="What is trained, with the rest frozen: attention (all self-attention layers), a name or pattern of modules "
        "or parameters, or a list of these, [attention, head]; null: all.",
    )
    opt: str = Field(default="adamw", description="Any optimizer of timm.optim.")
    lr: float = Field(
        default=1e-3, gt=0, le=MAX_RATE, description="Learning rate at its peak, for the global batch as it is."
    )
    weight_decay: float = Field(
        default=0.05, ge=0, le=MAX_RATE, description="Not on biases, norms, position embeddings and tokens."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="For optimizers that have one.")
    opt_betas: tuple[Beta, Beta] | None = Field(default=None, description="Betas of Adam and its kin; timm's if null.")
    opt_eps: float | None = Field(default=None, gt=0, le=1, description="Epsilon of the optimizer; timm's if null.")
    layer_decay: float | None = Field(default=None, gt=0, le=1, description="Layer-wise learning-rate decay.")
    clip_grad: float | None = Field(default=1.0, gt=0, le=1e9, description="Gradient norm; null: no clipping.")

    sched: Literal["cosine", "linear", "step", "constant"] = Field(
        default="cosine", description="Learning-rate schedule, over optimizer steps."
    )
    warmup_epochs: float = Field(
        default=1.0,
        ge=0,
        le=MAX_EPOCHS,
        description="Epochs of linear warm-up; parts of one too. Where train.epochs is overridden by fewer, it keeps its share.",
    )
    warmup_lr: float = Field(
        default=1e-6, ge=0, le=MAX_RATE, description="Learning rate at the first step of the warm-up."
    )
    min_lr: float = Field(default=1e-6, ge=0, le=MAX_RATE, description="Learning rate at the end.")
    decay_epochs: float = Field(default=30.0, gt=0, le=MAX_EPOCHS, description="Step schedule: epochs between decays.")
    decay_rate: float = Field(default=0.1, gt=0, le=1, description="Step schedule: factor of each decay.")

    smoothing: float = Field(default=0.0, ge=0, lt=1, description="Label smoothing.")
    mixup: float = Field(default=0.0, ge=0, le=100, description="Mixup alpha.")
    cutmix: float = Field(default=0.0, ge=0, le=100, description="CutMix alpha.")
    mixup_prob: float = Field(default=1.0, ge=0, le=1, description="Share of batches that are mixed.")
    mixup_switch_prob: float = Field(
        default=0.5, ge=0, le=1, description="Probability of CutMix where both are on; else mixup."
    )
    mixup_off_epoch: int = Field(
        default=0, ge=0, le=MAX_EPOCHS, description="Turn mixup and cutmix off from this epoch on; 0: never."
    )

    model_ema: bool = Field(default=False, description="Keep, and evaluate, a moving average of the weights.")
    model_ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="Its decay per optimizer step.")
    model_ema_warmup: bool = Field(default=True, description="Start with a smaller decay.")

    distill: DistillConfig | None = Field(default=None, description="Distillation from a dense teacher; null: none.")
    penalties: dict[str, Weight] = Field(
        default={},
        description="Weights of penalties of the model that are added to the loss, by the names that plug-ins give them; 0 only "
        "logs.",
    )
    step_rule: StepRuleEntry | None = Field(
        default=None,
        description="How an optimizer step is made: a plug-in's rule by its name, or {name: ..., options}; null: backward, clip, "
        "optimizer step.",
    )

    compile: bool = Field(default=False, description="torch.compile the model; checkpoints are the same as without.")
    grad_checkpointing: bool = Field(
        default=False, description="Recompute the blocks' activations in the backward pass: less memory, more time."
    )
    timeout_minutes: float = Field(
        default=10.0,
        gt=0,
        le=1e6,
        description="How long processes wait for each other before the run ends with an error.",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto",
        description="auto: the precision of accelerate launch, else bf16 on GPUs that have it, else none.",
    )
    cpu: bool = Field(default=False, description="Run on the CPU even if there is a GPU.")
    checkpoint_epochs: int = Field(
        default=1, ge=1, le=MAX_EPOCHS, description="Save every n epochs, and after the last."
    )
    checkpoint_steps: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="Also save every n optimizer steps, in mid-epoch too."
    )
    checkpoint_hist: int = Field(default=2, ge=1, le=MAX_STEPS, description="Resumable checkpoints to keep.")
    trackers: tuple[str, ...] = Field(
        default=(), description="Experiment trackers beside TensorBoard, by Accelerate's names: wandb, mlflow, aim, ..."
    )
    log_ranks: bool = Field(
        default=False,
        description="At each evaluation, also log the effective rank of each mode of each attention layer to TensorBoard.",
    )
    latency_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BATCH,
        description="At the end, measure the model's forward pass against its dense host's, in turns, with batches of so many "
        "images, for results.json; null: don't.",
    )
    log_interval: int = Field(default=50, ge=1, le=MAX_STEPS, description="Optimizer steps between log points.")

    @field_validator("warmup_epochs")
    @classmethod
    def _within_the_training(cls, value: float, info: ValidationInfo) -> float:
        epochs = info.data.get("epochs")
        if epochs is not None and value > epochs:
            raise ValueError(f"{value:g} is more than train.epochs={epochs}")
        return value

    @field_validator("penalties")
    @classmethod
    def _known_penalties(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            PENALTIES.get(name)
        return value

    @field_validator("step_rule", mode="before")
    @classmethod
    def _whole_step_rule(cls, value: Any) -> Any:
        """Fills in all options of a rule, so that configs of the same rule are equal."""
        given = {"name": value} if isinstance(value, str) else value
        if not isinstance(given, dict):
            return given
        if not isinstance(given.get("name"), str):
            raise ValueError("name: missing, the name of a registered rule")
        return {"name": given["name"], **step_options(given).model_dump(mode="json")}

    def logs_after(self, global_step: int) -> bool:
        """Returns whether losses are shown after that many optimizer steps."""
        return global_step % self.log_interval == 0

    def saves_after(self, global_step: int) -> bool:
        """Returns whether a checkpoint is due after that many optimizer steps, wherever in the epoch."""
        return self.checkpoint_steps is not None and global_step % self.checkpoint_steps == 0
