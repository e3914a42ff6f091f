"""The model of a run, built from its config: host, teacher, patch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vit_tucker.attention.options import Calibration, MethodConfig
from vit_tucker.checkpoint.describe import set_image_options
from vit_tucker.checkpoint.host_model import count_parameters, create_teacher, load_host
from vit_tucker.checkpoint.load_report import LoadReport
from vit_tucker.config.load import config_from
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.classes import stored_classes
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.image_files import ImageOptions
from vit_tucker.data.samples import calibration_images
from vit_tucker.data.splits import inferred_classes
from vit_tucker.data.transforms import resolve_data
from vit_tucker.errors import ConfigError, DataError
from vit_tucker.hosts.images import input_shape
from vit_tucker.hosts.structure import structure_copy
from vit_tucker.patching.patch import patch
from vit_tucker.patching.report import PatchReport
from vit_tucker.run.built import BuiltModel, all_parameters, patch_all, patched_entries
from vit_tucker.storage.checkpoints import list_checkpoints
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.task import ImageTask


def classes_and_channels(config: RunConfig, stored: Sequence[str] | None = None) -> tuple[int, int]:
    """Returns the numbers of classes and channels: the model section's, else the data set's (3 channels for timm's weights).

    The class map of a run that has begun is ``stored``.

    Raises:
        ConfigError: neither names the number of classes. DataError: the data set, which would, is missing or malformed.
    """
    info = dataset_info(config.data.dataset)
    if config.model.num_classes == 0:
        raise ConfigError("model.num_classes: 0, so there is nothing to train on images with classes; leave it out")
    num_classes = config.model.num_classes or (None if config.data.class_map else info.num_classes)
    if num_classes is None and stored:
        num_classes = len(stored)
    if num_classes is None:
        try:
            num_classes = inferred_classes(config.data) or info.num_classes
        except DataError as error:
            raise DataError(f"{error}; the number of classes comes from there, or from model.num_classes") from None
    if num_classes is None:
        raise ConfigError(f"model.num_classes: needed, the data set '{config.data.dataset}' does not name its classes")
    return num_classes, config.model.in_chans or (3 if config.model.pretrained else info.in_chans)


def build_model(config: RunConfig, run_dir: RunDir, device: torch.device, training: bool = True) -> BuiltModel:
    """Creates the host, starts it from its weights, patches it; and the teacher where the run distils.

    A run that has weights of its own to go on from is only built: what it started from need not be there any more. Best weights
    alone are some to evaluate, but none to go on from: such a run was killed before its first checkpoint.

    Args:
        config: validated.
        run_dir: its folder, which may hold the same run.
        device: where the model is patched and trained.
        training: False: it is evaluated only, so that no teacher is needed.

    Raises:
        VitTuckerError: see ``create_host`` and ``patch``.
    """
    num_classes, in_chans = classes_and_channels(config, stored_classes(run_dir.path_if_begun))
    started = bool(list_checkpoints(run_dir.checkpoints)) or (run_dir.best.is_file() and not training)
    host = config.model.untrained() if started else config.model
    model, report = load_host(host, num_classes, in_chans)
    loads = [] if report is None else [report]
    dense_sizes = count_parameters(model)
    info, size = dataset_info(config.data.dataset), input_shape(model, config.model.img_size)
    stored = run_dir.read_data_config() if started else None
    data = resolve_data(config.data, info, model, config.model.is_trained, size, stored)
    teacher = None
    if (distill := config.train.distill) is not None and training:
        dense = None if started else (model, report)
        kept = run_dir.teacher if run_dir.begun else None
        teacher, taught = create_teacher(config.model, distill, kept, dense, num_classes, in_chans)
        teacher.to(device)
        loads += [taught] if taught not in (None, report) else []
    structure = structure_copy(model)
    model.to(device)
    reports = patch_all(model, config, run_dir, started, training, lambda m: patch_model(model, m, config, data))
    task = ImageTask(data["input_size"], data["mean"], data["std"], config.model.name)
    set_image_options(model, ImageOptions.of(config.data).plain())
    return BuiltModel(
        model,
        num_classes,
        data,
        all_parameters(model, dense_sizes),
        *patched_entries(model, config, run_dir, started, reports),
        host=structure,
        task=task,
        teacher=teacher,
        loads=tuple(loads),
    )


def patch_model(model: nn.Module, method: MethodConfig, config: RunConfig, data: dict[str, Any]) -> PatchReport:
    """Patches the host in place, calibrated on training images if so configured.

    Args:
        model: dense, on its device.
        method: what to patch in; of a run with weights of its own, without conversion.
        config: of the run, for its images.
        data: timm's data config.

    Raises:
        PatchError: see ``patch``. DataError: the images are missing.
    """
    images = None
    if (options := method.fitted_to) is not None:
        images = calibration_images(config.data, data, options.images, options.batch_size, options.seed)
    return patch(model, method, calibration=images, keep_originals=False, img_size=config.model.img_size)


def analysed_model(
    name: str, checkpoint: str | None, random: bool, dataset: str | None, options: Calibration, overrides: Sequence[str]
) -> tuple[nn.Module, Iterator[Tensor] | None, LoadReport | None]:
    """Creates a dense model without its head, and training images for it.

    Args:
        name: timm model name.
        checkpoint: weights, see ``ModelConfig.checkpoint``; timm's pretrained ones if None.
        random: neither, but timm's initialisation.
        dataset: data set of the images; none if None.
        options: how many images, and which.
        overrides: ``key.sub=value`` strings of the model and data sections.

    Returns:
        The model in eval mode; batches of images or None; what was loaded into the model, None for timm's initialisation.

    Raises:
        VitTuckerError: unknown name, weights that are missing or don't fit, bad overrides, missing data.
    """
    given: dict[str, Any] = {"model": {"name": name, "pretrained": checkpoint is None and not random}}
    if checkpoint is not None:
        given["model"]["checkpoint"] = checkpoint
    if dataset is not None:
        given["data"] = {"dataset": dataset}
    config = config_from(given, overrides)
    info = dataset_info(config.data.dataset)
    channels = config.model.in_chans or (3 if config.model.pretrained or dataset is None else info.in_chans)
    model, report = load_host(config.model, 0, channels)
    model.eval()
    if dataset is None:
        return model, None, report
    size = input_shape(model, config.model.img_size)
    data = resolve_data(config.data, info, model, config.model.is_trained, size)
    return model, calibration_images(config.data, data, options.images, options.batch_size, options.seed), report
