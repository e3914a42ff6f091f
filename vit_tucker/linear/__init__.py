"""Methods that replace ``nn.Linear``: their base, and the low-rank one; plug-ins register others."""

from vit_tucker.linear import low_rank as low_rank
