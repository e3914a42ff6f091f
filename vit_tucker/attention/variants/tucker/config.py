"""Tucker Attention as a method: its options, what they allow, and what they cost.

    parameters per layer: 2 (H r1 + r1 r2 r3 + d r2 + d r3), minus d r3 with shared_kv
Source: Klein et al., Tucker Attention, arXiv 2603.30033, Def 2.1; Table 1 for the counts.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from vit_tucker.attention.attend import attend_flops
from vit_tucker.attention.base import AttentionConfig, ParameterCount
from vit_tucker.attention.host import CALL_FEATURES, HostSpec, count_extras
from vit_tucker.attention.options import Rank, RankRule
from vit_tucker.attention.registry import register_method
from vit_tucker.attention.variants.tucker.layer import TuckerAttention
from vit_tucker.attention.variants.tucker.ranks import (
    even_rank,
    full_ranks,
    has_out_bias,
    refuse_ranks,
    tensor_macs,
    tensor_weights,
)
from vit_tucker.errors import PatchError
from vit_tucker.show import methods
from vit_tucker.show.methods import MethodDisplay
from vit_tucker.tensor.allocation import Ranks

PositiveRanks = tuple[Rank, Rank, Rank]


@register_method("tucker")
class TuckerConfig(AttentionConfig):
    """Tucker Attention. Ranks in the paper's order [head, query/output, key/value]."""

    carries: ClassVar[frozenset[str]] = CALL_FEATURES | {"rope"}
    latent_rope: ClassVar[bool] = True
    whole_kernels: ClassVar[bool] = True

    display: ClassVar[MethodDisplay] = methods.TUCKER

    method: Literal["tucker"] = "tucker"

    ranks: Annotated[
        Annotated[PositiveRanks, Tag("triple")] | Annotated[RankRule, Tag("rule")],
        Discriminator(lambda given: "rule" if isinstance(given, dict | RankRule) else "triple"),
    ] = Field(
        description="Ranks [head, query, key] of the pre-softmax tensor; or a rule by which those of both tensors are chosen: "
        "{budget: 0.15}, {flops: 0.2} or {energy: 0.95}."
    )
    post_ranks: PositiveRanks | None = Field(
        default=None, description="Ranks [head, output, value] of the post-softmax tensor; null: the same as ranks."
    )
    conversion: Literal["hosvd", "hooi"] = Field(
        default="hosvd",
        description="From pretrained heads without calibration: HOSVD (the paper's), or HOOI, which refines it.",
    )
    shared_kv: bool = Field(default=False, description="One latent basis for keys and values (U3 of both tensors).")
    query_bias: bool = Field(
        default=True, description="Keep the host's query bias, exactly; false drops it: the paper's form has none."
    )

    @property
    def rank_rule(self) -> RankRule | None:
        """Returns the rule by which the ranks are yet to be chosen; None where they are given."""
        return self.ranks if isinstance(self.ranks, RankRule) else None

    @property
    def pre(self) -> Ranks:
        """Returns the ranks of the pre-softmax tensor; raises PatchError while they are still to be chosen."""
        if isinstance(self.ranks, RankRule):
            raise PatchError(f"ranks {self.ranks}: they are chosen when a model is patched")
        return self.ranks

    @property
    def post(self) -> Ranks:
        """Returns the ranks of the post-softmax tensor."""
        return self.post_ranks or self.pre

    def rank_options(self) -> dict[str, Any]:
        """Returns the ranks of both tensors."""
        return {"ranks": self.pre, "post_ranks": self.post}

    def with_ranks(self, pre: Ranks, post: Ranks | None = None) -> "TuckerConfig":
        """Returns the config with other ranks; ``post`` None: those of ``pre``."""
        return self.model_copy(update={"ranks": pre, "post_ranks": None if post == pre else post})

    def check(self, spec: HostSpec) -> None:
        """Raises PatchError for ranks that such a host can't have, and for options that exclude each other."""
        if self.rank_rule is not None:
            if self.post_ranks is not None:
                raise PatchError(
                    f"post_ranks={list(self.post_ranks)}: ranks {self.rank_rule} choose those of both tensors"
                )
            for name in ("shared_kv", "query_bias"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise PatchError(
                        f"ranks {self.rank_rule} don't support {name}={getattr(self, name)}; give the ranks"
                    )
            return
        refuse_ranks(spec, self.pre, self.post, self.shared_kv, self.query_bias)
        if spec.rope is not None and self.conversion == "hooi":
            raise PatchError("conversion='hooi' does not support hosts with RoPE; use 'hosvd'")
        if self.calibration is not None and self.conversion == "hooi":
            raise PatchError("conversion='hooi' uses the weights alone; leave it out with calibration")
        if self.shared_kv and self.conversion == "hooi":
            raise PatchError("conversion='hooi' does not support shared_kv; use 'hosvd'")

    @classmethod
    def full_rank(cls, spec: HostSpec) -> "TuckerConfig":
        """Returns the full ranks of both tensors."""
        pre, post = full_ranks(spec)
        return cls(ranks=pre, post_ranks=post)

    @classmethod
    def example(cls, spec: HostSpec) -> "TuckerConfig":
        """Returns ranks of an eighth of the width, the head rank below the number of heads."""
        rank = max(1, spec.embed_dim // 8) if spec.rope is None else even_rank(spec.embed_dim // 8)
        return cls(ranks=(max(1, 2 * spec.num_heads // 3), rank, rank))

    def build(self, spec: HostSpec, **factory: Any) -> TuckerAttention:
        """Returns the layer with its own random initialisation."""
        return TuckerAttention(
            spec,
            self.pre,
            self.post,
            shared_kv=self.shared_kv,
            conversion=self.conversion,
            query_bias=self.query_bias,
            **factory,
        )

    def count_parameters(self, spec: HostSpec) -> ParameterCount:
        """Counts H r1 + r1 r2 r3 + C r2 + C r3 for each tensor (Table 1); shared_kv saves the second key/value basis."""
        heads, width = spec.num_heads, spec.embed_dim
        weights = tensor_weights(*self.pre, heads, width, width) + tensor_weights(
            *self.post, heads, spec.out_dim, width
        )
        if self.shared_kv:
            weights -= width * self.post[2]
        query_bias = self.pre[1] * (spec.qkv_bias and self.query_bias)
        biases = query_bias + self.pre[2] * spec.latent_key_bias + spec.out_dim * has_out_bias(spec)
        return ParameterCount(weights, biases + count_extras(spec))

    def count_flops(self, spec: HostSpec, num_tokens: int) -> int:
        """Counts all products, also folding the head factors into the cores, which a batch does once.

        Args:
            spec: the host.
            num_tokens: N.
        """
        heads, width = spec.num_heads, spec.embed_dim
        macs = tensor_macs(*self.pre, heads, width, width, num_tokens)
        macs += tensor_macs(*self.post, heads, spec.out_dim, width, num_tokens)
        if self.shared_kv:
            macs -= num_tokens * width * self.post[2]
        return 2 * macs + attend_flops(heads, num_tokens, self.pre[2], self.post[2])
