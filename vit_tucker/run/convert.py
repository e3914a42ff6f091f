"""Reports what a patch would do to a dense model, and stores a patched model as a folder that rebuilds itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vit_tucker.attention.base import AttentionConfig
from vit_tucker.attention.options import Calibration, MethodConfig
from vit_tucker.checkpoint.describe import set_image_options
from vit_tucker.checkpoint.host_model import load_host
from vit_tucker.checkpoint.save import save
from vit_tucker.config.load import config_from, load_config
from vit_tucker.config.method_string import read_method
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.image_files import ImageOptions
from vit_tucker.data.transforms import resolve_data
from vit_tucker.errors import CheckpointError, ConfigError
from vit_tucker.hosts.images import input_shape
from vit_tucker.patching.patch import plan as plan_patch
from vit_tucker.patching.report import PatchReport
from vit_tucker.run.model import classes_and_channels, patch_model
from vit_tucker.storage.paths import refuse_unwritable
from vit_tucker.training.lock import RunLock


@dataclass(frozen=True)
class Converted:
    """A conversion, planned or done.

    Attributes:
        reports: layer by layer, one per slot: attention, Linear layers.
        notes: about the dense model's weights, for the user.
        trained: the dense model had trained weights.
    """

    reports: Sequence[PatchReport]
    notes: Sequence[str]
    trained: bool


def plan(
    model: str | None,
    method: str | AttentionConfig | None,
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
) -> Converted:
    """Reports what a patch would do to a timm model, layer by layer; nothing is trained or written.

    Args:
        model: timm model name; None with ``cfg``.
        method: a config, or as ``read_method`` reads it; the config file's own if None.
        cfg: config that names model and method, as for ``load_config``.
        overrides: ``key.sub=value`` strings.
        device: where weights are converted.

    Raises:
        VitTuckerError: unknown names, weights that are missing, or a method that does not fit the model.
    """
    config, methods = read_target("plan", model, method, cfg, overrides)
    host, notes = dense_model(config)
    host.to(device)
    reports = [plan_patch(host, method, img_size=config.model.img_size) for method in methods]
    return Converted(reports, notes, config.model.is_trained)


def convert(
    model: str | None,
    method: str | AttentionConfig | None,
    out: Path,
    cfg: str | None = None,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    images: int = 256,
    device: torch.device | str = "cpu",
) -> Converted:
    """Converts a timm model, its attention and what ``linear`` names, and saves it in timm's hub layout, see ``vit_tucker.save``.

    Args:
        model, method, cfg, overrides: see ``plan``.
        out: folder to write.
        data: calibrate the conversion on training images of this data set.
        images: how many of them, unless the method's own ``calibration`` says.
        device: where the model runs and is converted.

    Raises:
        VitTuckerError: see ``plan``; or ``out`` can't be written, is in use, or the images are missing.
    """
    if data is not None:
        overrides = [*overrides, f"data.dataset={data}"]
    config, methods = read_target("convert", model, method, cfg, overrides)
    refuse_unwritable("--out", out, folder=True)
    lock = RunLock(out, "--out")
    lock.refuse_held()
    if data is not None:
        dataset_info(data)
        methods = [calibrated(chosen, images) for chosen in methods]
    host, notes = dense_model(config)
    host.to(device).eval()
    section, trained, size = config.data, config.model.is_trained, input_shape(host, config.model.img_size)
    resolved = resolve_data(section, dataset_info(section.dataset), host, trained, size)
    reports = [patch_model(host, chosen, config, resolved) for chosen in methods]
    set_image_options(host, ImageOptions.of(section).plain())
    lock.take()
    try:
        save(host.cpu(), out, data=resolved)
    finally:
        lock.release()
    return Converted(reports, notes, trained)


def read_target(
    command: str, model: str | None, method: str | AttentionConfig | None, cfg: str | None, overrides: Sequence[str]
) -> tuple[RunConfig, list[MethodConfig]]:
    """Returns the config, and the methods that ``plan`` and ``convert`` patch in, attention's first.

    Args:
        command: for messages.
        model, method, cfg, overrides: see ``plan``.

    Raises:
        ConfigError: no model or no method is named, or see ``load_config``.
    """
    if cfg is None and model is None:
        raise ConfigError(f"{command} needs one of MODEL and --cfg")
    config = config_from({"model": {"name": model}}, overrides) if cfg is None else load_config(cfg, overrides)
    attention = read_method(method) if isinstance(method, str) else method or config.attention
    methods: list[MethodConfig] = [chosen for chosen in (attention, config.linear) if chosen is not None]
    if not methods and cfg is None:
        raise ConfigError(f'{command} {model}: name a method, e.g. --method "tucker ranks=[8,16,16]"')
    if not methods:
        raise ConfigError(f"{cfg}: attention: the config patches nothing; name a method by --method")
    return config, methods


def calibrated(method: MethodConfig, images: int) -> MethodConfig:
    """Returns a method of attention with a calibration, its own or one of so many images; other methods as they are."""
    if not isinstance(method, AttentionConfig):
        return method
    return method.model_copy(update={"calibration": method.calibration or Calibration(images=images)})


def dense_model(config: RunConfig) -> tuple[nn.Module, list[str]]:
    """Creates the dense model of a config, with its weights.

    Args:
        config: validated; its name may be None, where it comes from a model alone.

    Returns:
        The model, with the classes of its data set where it has a config file, else those of its weights, or timm's; and lines
        for the user about its weights.

    Raises:
        CheckpointError: its weights are not there.
    """
    sizes = () if config.name is None else classes_and_channels(config)
    start = config.model.checkpoint
    if start is not None and not Path(start).expanduser().exists():
        raise CheckpointError(
            f"model.checkpoint: {start}: no such file or run folder; name where it is now by model.checkpoint=PATH, or go "
            "without its weights by model.checkpoint=null"
        )
    model, report = load_host(config.model, *sizes)
    return model, [] if report is None else [str(report)]
