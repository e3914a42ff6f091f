"""A stored model for the analysis of its attention's ranks, and training images for it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor, nn

from vit_tucker.attention.options import Calibration
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.samples import calibration_images
from vit_tucker.data.transforms import resolve_data
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.images import input_shape
from vit_tucker.inference.evaluate import evaluation_sections, with_image_options
from vit_tucker.inference.predict import open_model


def is_stored(name: str) -> bool:
    """Returns whether a name means a run folder, a saved folder or OWNER/NAME of the hub, not one of timm's."""
    return Path(name).expanduser().exists() or ("/" in name and ":" not in name)


def stored_model(
    where: str | Path, dataset: str | None, options: Calibration, overrides: Sequence[str]
) -> tuple[nn.Module, Iterator[Tensor] | None]:
    """Opens a stored model, dense or patched, and training images for it.

    Args:
        where: run folder, checkpoint, saved folder or OWNER/NAME of the hub, see ``open_model``.
        dataset: data set of the images; none if None.
        options: how many images, and which.
        overrides: ``data.key=value`` strings.

    Returns:
        The model in eval mode; batches of images or None.

    Raises:
        VitTuckerError: nothing is stored there, bad overrides, missing data.
    """
    if dataset is None and overrides:
        raise ConfigError(f"{overrides[0]}: there are no data without --data")
    model = open_model(where)
    if dataset is None:
        return model, None
    section = with_image_options(evaluation_sections(where, dataset, overrides)[0], model, overrides)
    data = resolve_data(section, dataset_info(dataset), model, True, input_shape(model))
    return model, calibration_images(section, data, options.images, options.batch_size, options.seed)
