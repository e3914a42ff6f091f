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


def head_maps(figure):
    """Images of the heads: those with a scale that is not a colour bar's."""
    return [
        image
        for image in figure.axes[0].images
        if image.get_array().shape[:2] == (4, 4) or image.get_array().shape == (2, 2)
    ]


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
    figure = draw_heads(IMAGE, panels, "photo", {"blocks.0.attn": 0.123})
    assert len(head_maps(figure)) == 2 * 2 * 3
    assert {"blocks.0\nTV 0.12", "blocks.1", "dense: 7 (99%)", "tucker"} <= set(texts(figure))
    for head in range(3):
        (one, scale), (other, same) = (row_of("blocks.1.attn", panels, number)[head] for number in (0, 1))
        assert isinstance(scale, Normalize)
        assert scale.vmax == same.vmax == max(top(one), top(other))
    assert row_of("blocks.1.attn", panels, 0)[0][1].vmax != row_of("blocks.1.attn", panels, 0)[1][1].vmax


def test_layers_of_different_heads_and_models_that_lack_some():
    wide = panel(layers=("a.attn",), heads=4)
    panels = [Panel("x", None, "", {**panel().heads, **wide.heads}), panel("y", 1)]
    assert len(head_maps(draw_heads(IMAGE, panels, "photo"))) == (3 + 3 + 4) + (3 + 3)


def test_cells_show_what_they_should():
    values = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    figure = draw_heads(IMAGE, [Panel("", None, "", {"a.attn": values})], "")
    shown = pixels(figure)
    (cell,) = head_maps(figure)
    left, right, bottom, top_edge = cell.get_extent()
    yellow, dark = (253, 231, 36), (68, 1, 84)  # the ends of viridis

    def at(x, y):
        column, row = left + x * (right - left), shown.shape[0] / figure.dpi - bottom - y * (top_edge - bottom)
        return tuple(shown[round(row * figure.dpi), round(column * figure.dpi)])

    assert at(0.75, 0.75) == yellow
    assert [at(0.25, 0.75), at(0.25, 0.25), at(0.75, 0.3)] == [dark] * 3


def test_the_input_and_a_colour_bar_stand_beside_the_heads_which_have_numbers():
    panels = [panel(layers=("a.attn",)), panel("tucker", 1, layers=("a.attn",))]
    figure = draw_heads(IMAGE, panels, "photo")
    picture, bar, *_ = figure.axes[0].images
    assert (picture.get_array() == IMAGE).all()
    assert np.allclose(bar.get_array(), np.linspace(0, 1, 256))
    maps = head_maps(figure)
    assert bar.get_cmap().name == maps[0].get_cmap().name
    assert max(picture.get_extent()[1], bar.get_extent()[1]) < min(one.get_extent()[0] for one in maps)
    written = texts(figure)
    assert [written.count(str(head)) for head in range(3)] == [
        2 + 1,
        2,
        2,
    ]  # of both models; 0 is an end of the bar too
    ends = [f"{one.norm.vmax:.1f}" for one in maps]
    assert [text for text in written if "." in text and text[0].isdigit()] == ends
    assert ends[:3] == ends[3:]


def test_the_same_bytes_for_the_same_data(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_png(draw_heads(IMAGE, [panel(seed=seed)], "photo"), tmp_path / f"{name}.png")
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert one == same
    assert one != other


def test_labels_of_rows():
    assert row_label("blocks.3.attn", None) == "blocks.3"
    assert row_label("stages.0.token_mixer", {"stages.0.token_mixer": 0.5}) == "stages.0.token_mixer\nTV 0.50"
