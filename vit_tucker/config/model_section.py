"""The model section of a run's config: the timm model and where its weights come from."""

from typing import Annotated, Any

from pydantic import Field

from vit_tucker.config.data_section import PathText
from vit_tucker.validation.checked import Checked

LANGUAGE_MODEL = "hf:"
"""What names of transformers' language models begin with."""
MAX_WIDTH = 2**16
MAX_CLASSES = 10_000_000
"""Far beyond what anyone trains with: a number above is a slip, and would end in hours of waiting or in no memory."""
Size = Annotated[int, Field(ge=1, le=2**14)]


class ModelConfig(Checked):
    """The timm model; keys that are null are not passed to timm, so that the model's own defaults apply."""

    name: str = Field(
        description="timm model name; also hf-hub:owner/name and local-dir:path. hf: and a folder, hub name or architecture "
        "(hf:llama): a causal language model of transformers."
    )
    pretrained: bool = Field(default=False, description="Load timm's, or transformers', pretrained weights.")
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
    model_kwargs: dict[str, Any] = Field(
        default={},
        description="Any other argument of timm.create_model; of transformers' models, entries of their config.",
    )

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
