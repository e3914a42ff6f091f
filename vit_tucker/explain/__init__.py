"""Shows what attention looks at: maps of all heads, rollout, and how far a patched model's maps agree with its dense host's."""

from vit_tucker.explain.agreement import HeadAgreement, compare_attention, total_variation
from vit_tucker.explain.capture import Recording, attention_maps, record_attention
from vit_tucker.explain.explanation import Explanation, explain_image
from vit_tucker.explain.flow import Flow
from vit_tucker.explain.gradient import class_relevance
from vit_tucker.explain.grid import TokenGrid
from vit_tucker.explain.rollout import attention_rollout

__all__ = [
    "Explanation",
    "Flow",
    "HeadAgreement",
    "Recording",
    "TokenGrid",
    "attention_maps",
    "attention_rollout",
    "class_relevance",
    "compare_attention",
    "explain_image",
    "record_attention",
    "total_variation",
]
