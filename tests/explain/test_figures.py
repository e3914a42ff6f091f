"""Pictures of attention: their sizes, scales and colours, and the same bytes for the same data."""

import numpy as np
import pytest
import torch
from matplotlib.colors import Normalize

from vit_tucker.explain.figures import Panel, draw_heads, draw_rollout, pixels, row_label, row_of, save_png, top

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def panel(title="dense: 7 (99%)", seed=0, rollout=True, layers=("blocks.0.attn", "blocks.1.attn"), heads=3):
    generator = torch.Generator().manual_seed(seed)
    maps = {name: torch.rand(heads, 4, 4, generator=generator) for name in layers}
    return Panel(title, torch.rand(4, 4, generator=generator) if rollout else None, "no rollout: because", maps)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def test_rollouts_beside_the_image_on_one_scale():
    panels = [panel(), panel("tucker: 1 (60%)", 1)]
    figure = draw_rollout(IMAGE, panels, "photo")
    pictures = [axis.images for axis in figure.axes if axis.images]
    assert [len(images) for images in pictures] == [1, 2, 2]
    scales = [images[1].norm for images in pictures[1:]]
    assert scales[0].vmax == scales[1].vmax == pytest.approx(max(top(p.rollout) for p in panels))
    assert {"photo", "dense: 7 (99%)", "tucker: 1 (60%)"} <= set(texts(figure))
    for images, shown in zip(pictures[1:], panels, strict=True):
        assert np.allclose(images[1].get_array(), shown.rollout)


def test_a_rollout_that_is_not_defined_is_a_sentence():
    figure = draw_rollout(IMAGE, [panel(rollout=False), panel()], "photo")
    assert "no rollout: because" in texts(figure)
    pixels(figure)
    boxes = [axis.get_window_extent() for axis in figure.axes[:3]]
    assert {(round(box.width), round(box.height)) for box in boxes} == {
        (round(boxes[0].width),) * 2
    }  # as large as the image
    alone = draw_rollout(IMAGE, [panel(rollout=False)], "photo")
    assert len(alone.axes) == 2  # no colour bar


def test_heads_by_layers_with_the_same_scale_for_both_models():
    panels = [panel(), panel("tucker", 1)]
    figure = draw_heads(panels, "photo", {"blocks.0.attn": 0.123})
    assert len(figure.axes[0].images) == 2 * 2 * 3
    assert {"blocks.0\nTV 0.12", "blocks.1", "dense: 7 (99%)", "tucker"} <= set(texts(figure))
    for head in range(3):
        (one, scale), (other, same) = (row_of("blocks.1.attn", panels, number)[head] for number in (0, 1))
        assert isinstance(scale, Normalize)
        assert scale.vmax == same.vmax == max(top(one), top(other))
    assert row_of("blocks.1.attn", panels, 0)[0][1].vmax != row_of("blocks.1.attn", panels, 0)[1][1].vmax


def test_layers_of_different_heads_and_models_that_lack_some():
    wide = panel(layers=("a.attn",), heads=4)
    panels = [Panel("x", None, "", {**panel().heads, **wide.heads}), panel("y", 1)]
    assert len(draw_heads(panels, "photo").axes[0].images) == (3 + 3 + 4) + (3 + 3)


def test_cells_show_what_they_should():
    values = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    shown = pixels(draw_heads([Panel("", None, "", {"a.attn": values})], ""))
    yellow = (shown == (253, 231, 36)).all(-1)  # the upper end of viridis
    dark = (shown == (68, 1, 84)).all(-1)
    assert dark.sum() == pytest.approx(3 * yellow.sum(), rel=0.05)
    (above, right), (below, left) = (np.argwhere(colour).mean(0) for colour in (yellow, dark))
    assert above < below
    assert right > left


def test_the_same_bytes_for_the_same_data(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_png(draw_heads([panel(seed=seed)], "photo"), tmp_path / f"{name}.png")
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_labels_of_rows():
    assert row_label("blocks.3.attn", None) == "blocks.3"
    assert row_label("stages.0.token_mixer", {"stages.0.token_mixer": 0.5}) == "stages.0.token_mixer\nTV 0.50"
