"""Models into folders and onto the hub, so that they rebuild themselves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.models import push_to_hf_hub
from torch import nn

from vit_tucker.checkpoint.describe import describe
from vit_tucker.checkpoint.libraries import library, library_of
from vit_tucker.errors import CheckpointError
from vit_tucker.hosts import find
from vit_tucker.patching.record import patch_record
from vit_tucker.storage.digests import save_model


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Writes a model, patched or dense, as weights and ``config.json``: a folder from which ``vit_tucker.load`` rebuilds it.

    A timm model's is in timm's hub layout, which ``timm.create_model("local-dir:" + folder, pretrained=True)`` reads too, for a
    patched model once vit_tucker is imported (but timm reads no dense model of ``features_only``). A dense language model's is in
    transformers' layout; that of a patched one is refused by transformers, which would leave its attention random.

    config.json holds the SHA-256 of both, and dtype and shape of each tensor: ``load`` refuses what has changed since.

    Args:
        model: of timm or transformers, maybe patched; also inside torch.compile or DDP.
        folder: made if it is not there; a model that is there is replaced.
        label_names: of the classes, in their order; those that the model has (timm's label_names) if None.
        data: how its images are prepared, if not as in pretrained_cfg: mean, std, interpolation, crop_pct, crop_mode.
        model_args: arguments of ``timm.create_model`` that the model was made with, where timm has not recorded them.
        tokenizer: of transformers, written beside the model; the other options are for timm models.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model can't be rebuilt from what it records, or an option is of another library; nothing was written.
        OSError: the folder can't be written to.
    """
    bare = unwrapped(model)
    own = library_of(bare)
    config = own.describe(bare, label_names=label_names, data=data, model_args=model_args, tokenizer=tokenizer)
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder")
    save_model(folder, own.weights_name(config), own.state(bare), own.header(config), config)
    own.write_beside(bare, folder, tokenizer)
    return folder


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside torch.compile, DDP and PEFT."""
    inner = getattr(model, "_orig_mod", None)
    if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        inner = model.module
    if inner is None:
        inner = find.inner(model)
    return model if inner is model else unwrapped(inner)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    label_names: Sequence[str] | None = None,
    data: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
    model_card: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Uploads a model, patched or dense, to the Hugging Face hub, by timm's own function; safetensors only.

    ``vit_tucker.load(repo_id)`` rebuilds it, and so does ``timm.create_model("hf-hub:" + repo_id, pretrained=True)``, a patched
    one once vit_tucker is imported.

    Args:
        model, label_names, data, model_args: see ``save``.
        repo_id: "owner/name"; made if it is not there.
        model_card: entries of timm's model card in place of ours: description, usage, license, tags, details, citation.
        options: of ``timm.models.push_to_hf_hub``: token, private, revision, create_pr, commit_message.

    Returns:
        What timm returns: the address of the commit.

    Raises:
        CheckpointError: see ``save``; nothing was uploaded.
    """
    bare = unwrapped(model)
    if library_of(bare) is not library("timm"):
        raise CheckpointError(
            f"push_to_hub() is for models of timm: write {type(bare).__name__} by vit_tucker.save(model, folder), and upload "
            "that: huggingface_hub.upload_folder(repo_id=..., folder_path=folder)"
        )
    config = describe(bare, label_names=label_names, data=data, model_args=model_args)
    given = {k: v for k, v in config.items() if k != "model_args"}
    card = {**describe_card(bare, repo_id), **(model_card or {})}
    return push_to_hf_hub(
        bare,
        repo_id,
        model_config=given,
        model_args=dict(config["model_args"]),
        model_card=card,
        safe_serialization=True,
        **options,
    )


def describe_card(model: nn.Module, repo_id: str) -> dict[str, Any]:
    """Returns the entries of the model card: what the model is, and how to load it."""
    record = patch_record(model)
    if record is None:
        create = f'timm.create_model("hf-hub:{repo_id}", pretrained=True)'
        return {"usage": f"```python\nimport timm\n\nmodel = {create}\n```"}
    report, host = record.report, record.identity.architecture
    usage = f"""```python
import vit_tucker

model = vit_tucker.load("hf-hub:{repo_id}")  # or, once it is imported: timm.create_model("hf-hub:{repo_id}", pretrained=True)
```"""
    details = {
        "Host": host,
        "Attention": f"{record.config.method}, {len(report.layers)} layers",
        "Attention parameters": f"{report.params_after:,} (of {report.params_before:,})",
    }
    description = f"`{host}` with its attention replaced by vit_tucker ({record.config.method})."
    tags = ["image-classification", "timm", "vit_tucker"]
    return {"description": description, "details": details, "usage": usage, "tags": tags}
