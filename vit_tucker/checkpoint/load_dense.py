"""Dense weights, of a file or a state dict, into a patched model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vit_tucker.checkpoint.describe import creation_arguments
from vit_tucker.checkpoint.entry import forget_source
from vit_tucker.checkpoint.host_weights import create_loaded, open_weights, weights_of_state
from vit_tucker.errors import CheckpointError
from vit_tucker.patching.patch import patch
from vit_tucker.patching.record import host_name, patch_records


def load_dense(
    model: nn.Module,
    weights: str | Path | Mapping[str, Tensor],
    *,
    calibration: Iterable[Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> None:
    """Loads weights of the dense host into a patched model, by the conversion of its patch.

    Args:
        model: patched; what the patch left alone is loaded as it is. A classifier of another number of classes stays as it is.
        weights: of the dense model in any form that timm reads: a state dict, a file (safetensors, .pth with tensors only), a
            run folder or a saved folder. timm adapts other names and image sizes.
        calibration: images, see ``vit_tucker.patch``; without them the conversion is by weights alone.
        model_args: see ``save``.

    Raises:
        CheckpointError: the model is not patched, or the weights are not those of its host; nothing has changed.
    """
    records = patch_records(model)
    if not records:
        raise CheckpointError("load_dense: the model is not patched; timm.models.load_checkpoint loads dense weights")
    host = dense_host(model, weights, model_args)
    for record in records.values():
        config = record.config.model_copy(update={"init": "pretrained"})
        looks = "calibration" in type(config).model_fields
        if calibration is None and looks:
            config = config.model_copy(update={"calibration": None})
        patch(host, config, calibration=calibration if looks else None, keep_originals=False)
    own, converted = model.state_dict(), host.state_dict()
    fitting = {key: value for key, value in converted.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict({**own, **fitting})


def dense_host(
    model: nn.Module, weights: str | Path | Mapping[str, Tensor], model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Makes the dense host of a patched model, with weights of its own and their number of classes.

    Args:
        model: patched, or dense itself.
        weights, model_args: see ``load_dense``.

    Returns:
        A new model in eval mode, on the CPU.

    Raises:
        CheckpointError: the weights can't be read, or are not those of the host.
    """
    architecture = host_name(model)
    if architecture is None:
        raise CheckpointError("the model does not name its timm model (pretrained_cfg['architecture'])")
    arguments = {**creation_arguments(model, architecture), **(model_args or {})}
    what = "load_dense"
    if isinstance(weights, Mapping):
        if not weights:
            raise CheckpointError(f"{what}: the state dict is empty")
        opened = weights_of_state(weights, architecture)
    else:
        opened = open_weights(Path(weights).expanduser(), architecture, what)
    arguments["num_classes"] = opened.num_classes  # as the weights have it, so that all of them are loaded
    try:
        host, _ = create_loaded(architecture, opened, what=what, **arguments)
    except TypeError as error:
        raise CheckpointError(f"{what}: {architecture} does not accept these arguments: {error}") from None
    forget_source(host)
    return host.eval()
