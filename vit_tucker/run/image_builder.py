"""Builds the parts of a run on images with labels, see ``vit_tucker.run.builders``."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vit_tucker.analysis.costs import HostFactory
from vit_tucker.analysis.flops import count_cost, known_flops
from vit_tucker.attention.base import AttentionConfig
from vit_tucker.config.schema import RunConfig
from vit_tucker.data.classes import padded, stored_classes
from vit_tucker.data.datasets import dataset_info
from vit_tucker.data.loaders import Loaders, build_loaders
from vit_tucker.data.transforms import describe_data
from vit_tucker.errors import ConfigError
from vit_tucker.hosts.images import input_shape
from vit_tucker.patching.patch import plan
from vit_tucker.run.built import BuiltModel
from vit_tucker.run.check_images import check_images
from vit_tucker.run.model import build_model, classes_and_channels
from vit_tucker.storage.run_dir import RunDir
from vit_tucker.training.coordination import Coordinator


class ImageBuilder:
    """Builds runs of timm's models on images with labels; methods as of ``Builder``."""

    def check(self, config: RunConfig, run_dir: RunDir, coordinator: Coordinator, with_train: bool) -> list[str]:
        """Opens every image once, see ``check_images``.

        Args:
            config, run_dir, coordinator, with_train: see ``Builder.check``.
        """
        return check_images(config, run_dir, coordinator, with_train)

    def model(self, config: RunConfig, run_dir: RunDir, device: torch.device, training: bool) -> BuiltModel:
        """Returns timm's model of the run, patched.

        Args:
            config, run_dir, device, training: see ``Builder.model``.

        Raises:
            ConfigError: the recipe has steps of an epoch. Others: see ``build_model``.
        """
        if config.train.steps_per_epoch is not None:
            raise ConfigError(
                "train.steps_per_epoch: is for data.dataset=tokens; an epoch of images is a pass over them"
            )
        return build_model(config, run_dir, device, training)

    def loaders(
        self, config: RunConfig, run_dir: RunDir, accelerator: Accelerator, built: BuiltModel, with_train: bool
    ) -> Loaders:
        """Returns the loaders of images, see ``build_loaders``.

        Args:
            config, run_dir, accelerator, built, with_train: see ``Builder.loaders``.
        """
        return build_loaders(
            config.data,
            config.train,
            built.data,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
            pin_memory=accelerator.device.type == "cuda",
            with_train=with_train,
            device=accelerator.device,
            classes=stored_classes(run_dir.path_if_begun),
            num_classes=built.num_classes,
        )

    def cost(self, built: BuiltModel, model: nn.Module) -> dict[str, Any]:
        """Returns the operations per image of a ``model`` that was ``built``."""
        return count_cost(model, built.host, built.data["input_size"])

    def host(self, config: RunConfig) -> tuple[str, Callable[[], nn.Module]]:
        """Returns what is the same for runs of one host, and a function that makes its structure, without weights."""
        factory = HostFactory(config.model, *classes_and_channels(config))
        return repr(vars(factory)), factory.structure

    def operations(
        self, config: RunConfig, host: nn.Module, method: AttentionConfig | None, dense: int | None
    ) -> int | None:
        """Returns the operations of a forward pass of one image.

        Args:
            config, host, method, dense: see ``Builder.operations``.
        """
        size = config.model.img_size
        if method is None:
            return known_flops(host, input_shape(host, size))
        report = plan(host, method, img_size=size)
        return None if dense is None else dense - (report.flops_before or 0) + (report.flops_after or 0)

    def samples(self, config: RunConfig) -> int | None:
        """Returns the images of an epoch; None where they are not known before the data are read."""
        return config.data.num_samples or dataset_info(config.data.dataset).num_train

    def described(self, built: BuiltModel, loaders: Loaders) -> dict[str, Any]:
        """Returns names of the classes that ``loaders`` have, and how images are prepared for what was ``built``."""
        names = loaders.label_names and padded(loaders.label_names, built.num_classes)
        return {"label_names": names if names and len(names) == built.num_classes else None, "data": built.data}

    def expect(self, config: RunConfig, built: BuiltModel, steps: int) -> list[str]:
        """Returns no lines: hours depend on the images.

        Args:
            config, built, steps: see ``Builder.expect``.
        """
        return []

    def describe(self, config: RunConfig, built: BuiltModel, results: dict[str, Any]) -> tuple[str, str]:
        """Returns size and normalisation of the images, and their numbers.

        Args:
            config, built, results: see ``Builder.describe``.
        """
        info, weights = dataset_info(config.data.dataset), built.loads[0].normalisation if built.loads else None
        images = f"{results['num_train']} training and {results['data']['num_eval'] or 'streamed'} evaluation images"
        return (
            describe_data(config.data, info, built.data, weights),
            f"{config.data.dataset}: {images}; {config.train.epochs} epochs, global batch {config.train.global_batch_size}",
        )
