"""The YAML schema of a run, as frozen pydantic models. Reading, merging and error lines are in load.py and source.py.

Names are timm's wherever timm has one. Every field's description ends up in the JSON schema, and so in the user's editor.
"""

from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, InstanceOf, WithJsonSchema, create_model, field_validator, model_validator

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.registry import get_method, list_methods
from vit_tucker.config.data_section import DataConfig, FolderName, PathText
from vit_tucker.config.registries import PENALTIES, step_options
from vit_tucker.linear.base import LINEAR_METHODS, LinearConfig
from vit_tucker.validation.checked import MAX_INTEGER, Checked

MAX_WIDTH = 2**16
MAX_CLASSES = 10_000_000
MAX_BATCH = 2**24
MAX_EPOCHS = 1_000_000
MAX_STEPS = 1_000_000_000
MAX_RATE = 1000
"""Far beyond what anyone trains with: a number above is a slip, and would end in hours of waiting or in no memory."""
Size = Annotated[int, Field(ge=1, le=2**14)]
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


class ModelConfig(Checked):
    """The timm model. Keys that are null are not passed to timm, so that the model's own defaults hold."""

    name: str = Field(description="timm model name; also hf-hub:owner/name and local-dir:path.")
    pretrained: bool = Field(default=False, description="Load timm's pretrained weights.")
    checkpoint: PathText | None = Field(
        default=None,
        description="Weights of the dense host: a run folder (its last epoch), a folder or file of timm, Hugging Face, "
        "torchvision, OpenCLIP, MAE, DINO, BEiT, Lightning or DeepSpeed, or a JAX .npz; see docs/formats.md.",
    )
    img_size: Size | tuple[Size, Size] | None = Field(default=None, description="Image size in pixels.")
    patch_size: Size | None = Field(default=None, description="Patch size in pixels.")
    in_chans: int | None = Field(
        default=None, ge=1, le=MAX_WIDTH, description="Image channels; the data set's own if null and not pretrained."
    )
    num_classes: int | None = Field(
        default=None,
        ge=0,
        le=MAX_CLASSES,
        description="Number of classes; the data set's if null. 0: no classifier, for conversion only.",
    )
    embed_dim: int | None = Field(default=None, ge=1, le=MAX_WIDTH, description="Width of the tokens.")
    depth: int | None = Field(default=None, ge=1, le=1024, description="Number of blocks.")
    num_heads: int | None = Field(
        default=None, ge=1, le=MAX_WIDTH, description="Attention heads; they divide embed_dim."
    )
    mlp_ratio: float | None = Field(
        default=None, gt=0, le=64, description="Width of the MLP's hidden layer, as a multiple of embed_dim."
    )
    qkv_bias: bool | None = Field(default=None, description="Biases of queries, keys and values.")
    qk_norm: bool | None = Field(default=None, description="Norms of each head's queries and keys.")
    init_values: float | None = Field(default=None, ge=0, le=1000, description="LayerScale start value.")
    class_token: bool | None = Field(default=None, description="A class token in front of the patches.")
    reg_tokens: int | None = Field(default=None, ge=0, le=MAX_WIDTH, description="Number of register tokens.")
    global_pool: str | None = Field(default=None, description="token, avg, avgmax, max, map, or '' for none.")
    dynamic_img_size: bool | None = Field(default=None, description="Take images of any size, embeddings resampled.")
    drop_rate: float | None = Field(default=None, ge=0, lt=1, description="Dropout of the classifier.")
    proj_drop_rate: float | None = Field(
        default=None, ge=0, lt=1, description="Dropout of the outputs of attention and MLP."
    )
    attn_drop_rate: float | None = Field(default=None, ge=0, lt=1, description="Dropout of the attention weights.")
    drop_path_rate: float | None = Field(default=None, ge=0, lt=1, description="Stochastic depth.")
    model_kwargs: dict[str, Any] = Field(default={}, description="Any other argument of timm.create_model.")

    @property
    def is_trained(self) -> bool:
        """Returns whether the model starts from weights and not from timm's initialisation."""
        return self.pretrained or self.checkpoint is not None

    def untrained(self) -> "ModelConfig":
        """Returns the same model with timm's initialisation."""
        return self.model_copy(update={"pretrained": False, "checkpoint": None})

    def timm_kwargs(self) -> dict[str, Any]:
        """Returns the arguments of timm.create_model beyond name, pretrained and checkpoint."""
        own = {"name", "pretrained", "checkpoint", "model_kwargs"}
        given = {k: v for k in type(self).model_fields if k not in own and (v := getattr(self, k)) is not None}
        return {**given, **self.model_kwargs}


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
        default=128, ge=1, le=MAX_BATCH, description="Images per optimizer step, over all processes and accumulation."
    )
    grad_accum_steps: int = Field(default=1, ge=1, le=MAX_BATCH, description="Micro-batches per optimizer step.")
    eval_batch_size: int | None = Field(
        default=None, ge=1, le=MAX_BATCH, description="Images per process at evaluation; the micro-batch if null."
    )
    eval_interval: int = Field(
        default=1, ge=1, le=MAX_EPOCHS, description="Evaluate every n epochs, and after the last."
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
        default=1.0, ge=0, le=MAX_EPOCHS, description="Epochs of linear warm-up; parts of one too."
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
        default="auto", description="auto: what accelerate launch was told, else bf16 on GPUs that have it, else none."
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


class RunConfig(Checked):
    """One run: everything that decides its result."""

    name: FolderName | None = Field(
        default=None,
        description="Name in tables and in the default output_dir, without '..'; the file's name if null.",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_INTEGER, description="Of initialisation, data order, augmentation and dropout."
    )
    output_dir: PathText | None = Field(default=None, description="Run folder; runs/<name>-<seed> if null.")
    plugins: tuple[str, ...] = Field(
        default=(),
        description="Python modules or .py files to import first, for attention methods and timm models of yours. Those that a "
        "config in a run folder names run only with -p FILE or --trust-plugins.",
    )
    model: ModelConfig = Field(description="The timm model.")
    attention: InstanceOf[AttentionConfig] | None = Field(
        default=None, description="Attention to patch in; null keeps the dense host."
    )
    linear: InstanceOf[LinearConfig] | None = Field(
        default=None, description="What takes the place of linear layers outside of attention; null keeps them."
    )
    data: DataConfig = Field(default=DataConfig(), description="Data set and transforms.")
    train: TrainConfig = Field(default=TrainConfig(), description="The recipe.")

    @model_validator(mode="after")
    def _mixup_needs_even_batches(self) -> "RunConfig":
        if (self.train.mixup or self.train.cutmix) and self.train.global_batch_size % (2 * self.train.grad_accum_steps):
            raise ValueError("train.mixup and train.cutmix pair images: the micro-batch must be even")
        return self


def run_config_model() -> type[RunConfig]:
    """Returns RunConfig with unions of the registered methods as its sections of methods, discriminated by ``method``."""
    linear = tuple(LINEAR_METHODS.get(name) for name in LINEAR_METHODS.names())
    return _run_config_model(tuple(get_method(name) for name in list_methods()), linear)


@lru_cache
def _run_config_model(methods: tuple[Any, ...], linear: tuple[Any, ...]) -> type[RunConfig]:
    """Returns one class per set of methods, so that equal configs compare equal."""
    sections: dict[str, Any] = {}
    for name, known in (("attention", methods), ("linear", linear)):
        union: Any = reduce(or_, known) if known else Annotated[LinearConfig, BeforeValidator(_refuse_unregistered)]
        if len(known) > 1:
            union = Annotated[union, Field(discriminator="method")]
        described = Field(default=None, description=RunConfig.model_fields[name].description)
        sections[name] = (union | None, described)
    return create_model("RunConfig", __base__=RunConfig, __module__=__name__, **sections)


def _refuse_unregistered(value: Any) -> Any:
    """Raises ConfigError for a linear section while no linear method is registered."""
    LINEAR_METHODS.get(str(value.get("method") if isinstance(value, dict) else value))
    return value


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a config file, for editors: the run's keys and ``base``."""
    schema = run_config_model().model_json_schema()
    schema["title"] = "vit_tucker run"
    schema["required"] = []  # a file with a base need not repeat what the base says
    schema["properties"]["base"] = {
        "description": "Config file(s) that this one starts from; relative to this file, or to the shipped configs.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    return schema
