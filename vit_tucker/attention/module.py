"""The module base of all attention layers."""

import copy
from abc import abstractmethod
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from vit_tucker.attention import call as calls
from vit_tucker.attention.attend import attend
from vit_tucker.attention.backends import AUTO
from vit_tucker.attention.call import Call, PositionBias, read_call
from vit_tucker.attention.contraction import is_plain
from vit_tucker.attention.convertible import ConvertibleModule
from vit_tucker.attention.effective import is_adapter
from vit_tucker.attention.host import HostSpec
from vit_tucker.attention.linear import renewed
from vit_tucker.attention.options import refuse_rank_options
from vit_tucker.errors import PatchError


class AttentionModule(ConvertibleModule):
    """Base of all attention layers: timm's call contracts and the attributes that timm's tools look for.

    ``backend`` names what computes the attention, see ``vit_tucker.attention.backends``; ``fused_attn`` = False (timm's switch)
    computes it by plain products whatever the backend, with the maps passing through ``attn_drop`` for hooks to see. Methods that
    a layer does not implement raise PatchError.
    """

    position_bias: PositionBias | None

    def __init__(self, spec: HostSpec) -> None:
        super().__init__()
        self.spec = replace(spec, extras={})
        self.extras = tuple(name for name in spec.extras if name != "position_bias")
        self.position_bias = copy.deepcopy(spec.extras.get("position_bias", {}).get("position_bias"))  # type: ignore[assignment]
        self.num_heads = spec.num_heads
        self.head_dim = spec.head_dim
        self.attn_dim = spec.attn_dim
        self.fused_attn = spec.fused_attn
        self.backend = AUTO
        self.attn_drop = nn.Dropout(spec.attn_drop)
        self.proj_drop = nn.Dropout(spec.proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Returns the layer's output (B, N, O) for tokens (B, N, C), both in the host's own layout.

        Args:
            x: (B, N, C) tokens in the host's layout.
            attn_mask: boolean (True: attend) or added to the scores, broadcasts to (B, H, N, N).
            is_causal: attend to earlier tokens and the token itself; takes precedence over the mask.
            rope: (N', 2 D) or (B, N', 2 D) table of sines and cosines, see ``vit_tucker.attention.rope``.
            mask: (W, N, N), additive, of each window (Swin).
            shared_rel_pos, shared_rel_pos_bias: (..., N, N) additive bias from the model (ViTs with relative positions, BEiT).

        Raises:
            PatchError: a table for a layer whose host had no RoPE.
        """
        if rope is not None and self.spec.rope is None:
            raise PatchError(
                f"{type(self).__name__} got a table of rotations, but the layer that it replaced had no RoPE"
            )
        call = read_call(self.spec.layout, self.position_bias, x, attn_mask, is_causal, rope,
                         mask=mask, shared_rel_pos=shared_rel_pos, shared_rel_pos_bias=shared_rel_pos_bias)  # fmt: skip
        return calls.from_sequences(self.proj_drop(self.run(call)), x, self.spec.layout)

    def run(self, call: Call) -> Tensor:
        """Computes the output (B, N, O) of a ``call``, whose arguments are in one form, dropout of the output apart."""
        return self.readout(self.mix(call.x, call.attn_mask, call.is_causal, call.rope))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Computes softmax(QK^T)V with the layer's scale, dropout and backend; arguments as of ``fused_attention``."""
        return attend(q, k, v, scale=self.scale, attn_drop=self.attn_drop, fused=self.fused_attn,
                      attn_mask=attn_mask, is_causal=is_causal, backend=self.heads_backend)  # fmt: skip

    @property
    def scale(self) -> float:
        """Returns the softmax scale, made of an integer: torch.compile(dynamic=True) treats a module's floats as open numbers."""
        return self.spec.scale

    @property
    def heads_backend(self) -> str:
        """Returns the backend for queries, keys and values of heads."""
        return self.backend

    @property
    def rel_pos(self) -> PositionBias | None:
        """Returns the position bias under the name by which timm's models look for it."""
        return self.position_bias

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Resizes the position bias, if any, to ``window_size`` tokens; timm's ``set_input_size`` calls it by this name."""
        if self.position_bias is not None:
            self.position_bias.set_window_size(window_size)

    @property
    def latent_width(self) -> int | None:
        """Returns the width of the one key that rotates for all heads (latent RoPE); None without one."""
        return None

    def factors(self) -> dict[str, Tensor]:
        """Returns the live weights by role, shared ones as the same object: those of the layer's own Linears, by their names."""
        return {name: part.weight for name, part in self.named_children() if isinstance(part, nn.Linear)}

    def rank_options(self) -> dict[str, Any]:
        """Returns the options of the method that ``resize`` can change, as the layer's parameters have them now."""
        return {}

    def resize(self, **options: Any) -> dict[Tensor, Tensor]:
        """Changes the layer's ranks in place.

        Growth leaves the layer's function as it is; truncation keeps what a HOSVD of the layer's own tensors keeps.

        Args:
            **options: those of ``rank_options`` that change.

        Returns:
            New parameters by the old ones that they replace, which optimizers still have; a parameter of the same shape stays.

        Raises:
            PatchError: the method has no such option, or the ranks are impossible; nothing has changed.
        """
        current, name = self.rank_options(), type(self).__name__
        refuse_rank_options(name, options, current)
        if not is_plain(*(part for part in self.children() if isinstance(part, nn.Linear) or is_adapter(part))):
            raise PatchError(
                f"{name} can't be resized with adapters, hooks or parametrizations on its Linears: merge them"
            )
        return renewed(self, partial(self._resize, **current | options))

    def _resize(self, **options: Any) -> None:
        """Changes the ranks; called under no_grad, only of methods with ``rank_options``."""

    @property
    def kv_width(self) -> int | None:
        """Returns the numbers per token in a KV cache: of keys and values, or of their latents; None if unknown."""
        return None

    @abstractmethod
    def init_weights(self) -> None:
        """Resets the layer to the method's own random initialisation. timm's init functions call it by this name."""

    def reset_parameters(self) -> None:
        """Calls ``init_weights``, by the name that timm's EVA, BEiT and Swin, and torch after to_empty, call."""
        self.init_weights()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Copies integer buffers: averages of weights (timm's ModelEmaV2) are written into a state dict, and would round them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self._buffers.items():
            if buffer is not None and not buffer.is_floating_point() and prefix + name in destination:
                destination[prefix + name] = buffer.clone()

    def hand_place_to(self, new: "AttentionModule") -> None:
        """Gives another layer what callers expect of this one, in whose place it is to stand; nothing where timm calls it.

        Args:
            new: the same attention in another form; changed in place.
        """

    def project(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Forms what meets in the attention, rotated: what a cache holds of tokens are their keys and values.

        Queries are (B, H, N, Dk), keys (B, G, N, Dk) and values (B, G, N, Dv), where G divides H.

        Args:
            x: (B, N, C) tokens.
            rope: (N', 2 D) or (B, N', 2 D) table of the call.
        """
        raise PatchError(f"{type(self).__name__} has no project(), which calibration and caches need")

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns what ``readout`` reads, (B, N, F).

        Args:
            x: (B, N, C) tokens.
            y: (B, H, N, Dv) heads' outputs.
        """
        return y.transpose(1, 2).flatten(2)

    def mix(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """Returns all heads' outputs (B, N, F) of tokens (B, N, C), before the linear read-out; arguments as of ``forward``."""
        return self.combine(x, self.attend(*self.project(x, rope), attn_mask, is_causal))

    def readout(self, mixed: Tensor) -> Tensor:
        """Computes what follows ``mix``, dropout apart: a linear map of ``mixed`` (B, N, F), which gives (B, N, O)."""
        raise PatchError(f"{type(self).__name__} has no readout(), which calibration needs: leave it out")
