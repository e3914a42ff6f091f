"""cacheshrink's ``convert_to_mla``, as its users call it, on a model at hand."""

import contextlib
import importlib
import io
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lm_baselines.moments import decoder_layers, dense_entries
from vit_tucker.errors import ConfigError

VERSION = "0.1.5"


def cacheshrink(model: nn.Module, tokenizer: Any, blocks: Tensor, entries: int, method: str = "separate") -> nn.Module:
    """Returns a model converted by ``cacheshrink.convert_to_mla(folder, compression_ratio)``; the given one is unchanged.

    The package takes a folder and texts: the model is written to one, and the calibration tokens are decoded to texts of their
    blocks. Its "separate" (the default) reduces the outputs of each key and value projection by PCA to a latent each; "xkv",
    which its "auto" picks for grouped heads, shares the bases among four layers. Both cache the latents before RoPE, and expand
    all cached tokens at each step. Its calibration reads the input of the whole layer, before the norm that attention's input
    has passed; that is left as it is.

    Args:
        model: dense, with its config.
        tokenizer: of the model.
        blocks: calibration tokens, (blocks, N).
        entries: cached per token and layer; their ratio to the dense ones is the package's ``compression_ratio``.
        method: its ``compression_method``.

    Raises:
        ConfigError: the package isn't there.
    """
    convert = imported().convert_to_mla
    texts = tokenizer.batch_decode(blocks)
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        converted, _ = convert(
            folder,
            compression_ratio=dense_entries(model) / entries,
            compression_method=method,
            calibration_texts=texts,
            max_calibration_length=blocks.shape[1],
            device="cpu",
            verbose=False,
        )
    latent = converted.mla_config.computed_d_latent
    for layer in decoder_layers(converted):
        layer.self_attn.cache_entries = 2 * latent
    return converted.eval()


def imported() -> Any:
    """Returns the package cacheshrink.

    Raises:
        ConfigError: it isn't there, or it needs something that isn't.
    """
    try:
        with quiet():
            return importlib.import_module("cacheshrink")
    except ImportError as error:
        raise ConfigError(f"{error}: pip install cacheshrink=={VERSION}") from None


@contextlib.contextmanager
def quiet() -> Any:
    """Silences what the package prints and warns of."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def rename_cache(model: nn.Module) -> Sequence[Any]:
    """Gives its layers the cache under the name that they know, and returns the handles of the hooks that do it.

    From version 5.24 on transformers calls it ``cache``, which the package's layers swallow: each step then sees one token.

    Args:
        model: converted by ``cacheshrink``.
    """

    def rename(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if "cache" in kwargs:
            kwargs = {**kwargs, "past_key_values": kwargs["cache"]}
            del kwargs["cache"]
        return args, kwargs

    return [layer.self_attn.register_forward_pre_hook(rename, with_kwargs=True) for layer in decoder_layers(model)]
