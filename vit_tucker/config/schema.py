"""The YAML schema of a run, as frozen pydantic models. Reading, merging and error lines are in load.py and source.py.

Names are timm's wherever timm has one. Every field's description ends up in the JSON schema, and so in the user's editor.
"""

from functools import lru_cache, reduce
from operator import or_
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, InstanceOf, create_model, model_validator

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.registry import get_method, list_methods
from vit_tucker.config.data_section import DataConfig, FolderName, PathText
from vit_tucker.config.train_section import TrainConfig
from vit_tucker.linear.base import LINEAR_METHODS, LinearConfig
from vit_tucker.validation.checked import MAX_INTEGER, Checked

MAX_WIDTH = 2**16
MAX_CLASSES = 10_000_000
"""Far beyond what anyone trains with: a number above is a slip, and would end in hours of waiting or in no memory."""
Size = Annotated[int, Field(ge=1, le=2**14)]


class ModelConfig(Checked):
    """The timm model; keys that are null are not passed to timm, so that the model's own defaults apply."""

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
        default=None, description="The method that replaces linear layers outside of attention; null keeps them."
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
