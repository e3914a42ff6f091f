"""Tucker Attention as Triton kernels, forward and backward.

    z = sum_i softmax(scale P T_i K^T + mask) V S_i^T

Source: Klein et al., Tucker Attention, arXiv 2603.30033, Eqs 2-6 and, for RoPE, Def 3.1; see ``attention.variants.tucker``.
The online softmax and its recomputation from the log-sum-exp are those of FlashAttention-2 (arXiv 2307.08691).

Compiled for sm_80, sm_86 and sm_90 and run through Triton's interpreter; not yet run on a GPU, so there are no times.
Triton 3.2 and later; 3.3 for compute capability 9.0 and above.
"""

from vit_tucker.attention.triton_tucker.op import available, tucker_attention, unsupported

__all__ = ["available", "tucker_attention", "unsupported"]
