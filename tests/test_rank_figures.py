from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_locality.plotting.ranks import cut_figure, plot_profile, profile_figure, spectra_figure, tree_figure
from lightning_locality.plotting.style import COLOURS, COLUMN, save_figure
from lightning_locality.tensors.mode_tree import ModeTree, Node


def profile(strength: list[float], change: float | None = 0.5, patch: int = 8, half: float = 16.0) -> SimpleNamespace:
    values = torch.tensor(strength)
    number = len(values)
    share = values / values.sum()
    return SimpleNamespace(
        distance=patch * torch.arange(1.0, number + 1),
        strength=values,
        low=0.5 * values,
        high=2 * values,
        cumulative=share.cumsum(0),
        uniform=torch.arange(1.0, number + 1) / number,
        gradient_change=torch.full((number,), np.nan if change is None else change),
        r50=half,
    )


def drawn(axes: Axes) -> list[list[list[float]]]:
    return [np.asarray(line.get_xydata()).tolist() for line in axes.lines]


def marked(axes: Axes) -> list[list[list[float]]]:
    return [np.asarray(line.get_xydata()).tolist() for line in axes.lines if line.get_gid() == "profile"]


def axes_of_one() -> Axes:
    axes: Axes = Figure().subplots()
    return axes


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    """Texts whose boxes overlap once the figure is laid out; slanted ones, whose boxes are too large, apart."""
    figure.draw_without_rendering()
    hidden = {text for axes in figure.axes for text in unseen_ticks(axes)}
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible() and t not in hidden]
    boxes = [(t.get_text(), t.get_window_extent().padded(-0.5)) for t in texts if t.get_rotation() in (0.0, 90.0)]
    assert len(boxes) > 5
    return [(a, b) for k, (a, first) in enumerate(boxes) for b, second in boxes[:k] if first.overlaps(second)]


def unseen_ticks(axes: Axes) -> list[Text]:
    """Labels that are made but not drawn: beyond the axis, or of axes that are off."""
    found = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        found += [tick.label1 for tick in ticks if not axes.axison or not low <= tick.get_loc() <= high]
    return found


def test_profile_holds_the_numbers_and_their_band() -> None:
    axes = axes_of_one()
    plot_profile(axes, profile([0.4, 0.2]), label="a")
    assert marked(axes) == [[[8.0, 0.4], [16.0, 0.2]]]
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).extents.tolist() == pytest.approx([8.0, 0.1, 16.0, 0.8])
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 0.8
    assert axes.get_legend_handles_labels()[1] == ["a"]


def test_scale_is_logarithmic_over_decades_of_all_that_is_drawn() -> None:
    axes = axes_of_one()
    plot_profile(axes, profile([0.4, 0.2]))
    plot_profile(axes, profile([0.4, 0.01]))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == pytest.approx((0.005, 0.8))
    assert [line.get_color() for line in axes.lines if line.get_gid()] == [COLOURS[0], COLOURS[1]]


def test_no_interaction_is_a_triangle_at_the_foot() -> None:
    axes = axes_of_one()
    plot_profile(axes, profile([0.4, 0.01, 1e-27, 0.0]))
    strengths, feet = axes.lines
    assert np.isnan(strengths.get_ydata()).tolist() == [False, False, True, True]
    assert feet.get_xydata().tolist() == [[24.0, 0.0], [32.0, 0.0]]
    assert feet.get_marker() == "v"
    foot = feet.get_transform().transform((24.0, 0.0))[1]
    assert foot == pytest.approx(axes.get_window_extent().y0)
    none = axes_of_one()
    plot_profile(none, profile([0.0, 0.0]))
    assert none.lines[1].get_xydata().tolist() == [[8.0, 0.0], [16.0, 0.0]]
    assert none.get_ylim() == (0.0, 1.0)


def test_profile_figure_has_mass_and_gradients() -> None:
    figure = profile_figure({"a": profile([0.3, 0.1], half=8.0), "b": profile([0.1, 0.3])})
    strength, mass, change = figure.axes
    assert marked(strength) == [[[8.0, 0.3], [16.0, 0.1]], [[8.0, 0.1], [16.0, 0.3]]]
    first, half, second, _, uniform = drawn(mass)
    np.testing.assert_allclose(first, [[0, 0], [8, 0.75], [16, 1]])
    np.testing.assert_allclose(second, [[0, 0], [8, 0.25], [16, 1]])
    assert half == [[8.0, 0.0], [8.0, 0.5]]
    assert mass.lines[1].get_markevery() == [1]
    # both have the same patches, and so one reference
    assert uniform == [[0.0, 0.0], [8.0, 0.5], [16.0, 1.0]]
    assert drawn(change) == [[[8.0, 0.5], [16.0, 0.5]]] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert figure.get_figwidth() == pytest.approx(2 * COLUMN)


def test_profile_figure_leaves_out_what_is_not_known() -> None:
    additive = profile([0.0, 0.0], change=None, half=np.nan)
    figure = profile_figure({"a": additive})
    assert len(figure.axes) == 2
    assert len(figure.axes[1].lines) == 1  # the reference alone
    assert not figure.legends


def fall(nodes: tuple[Node, ...] | list[Node], *values: float) -> dict[Node, torch.Tensor]:
    return {node: torch.tensor(values) * (2.0 + len(node)) for node in nodes}


class WithTolerance(dict[Node, torch.Tensor]):
    tolerance: ClassVar = {(0,): 1e-3, (1,): 1e-3}


def test_spectra_of_few_nodes_have_a_panel_each() -> None:
    figure = spectra_figure({"a": WithTolerance(fall([(0,), (1,)], 1.0, 0.5, 1e-4)), "b": fall([(0,)], 1.0, 0.25)})
    first, second = figure.axes
    np.testing.assert_allclose(drawn(first)[0], [[1, 1], [2, 0.5], [3, 1e-4]])
    np.testing.assert_allclose(first.lines[1].get_ydata(), 1e-3)
    np.testing.assert_allclose(drawn(first)[2], [[1, 1], [2, 0.25]])
    assert len(second.lines) == 2
    assert [axes.get_title() for axes in figure.axes] == ["node 0", "node 1"]
    assert first.get_yscale() == second.get_yscale() == "log"
    assert first.get_ylim() == pytest.approx((4e-5, 2.5))
    assert figure.get_figwidth() == pytest.approx(COLUMN)


def test_spectra_of_many_nodes_are_median_and_range_of_a_level() -> None:
    tree = ModeTree.perfect(16)
    second = {node: 0.1 * (1 + k) for k, node in enumerate(tree.leaves)}
    spectra = {node: torch.tensor([2.0, 2 * second.get(node, 0.3), 0.0]) for node in tree.nodes[:-1]}
    figure = spectra_figure({"a": spectra})
    leaves, pairs, fours, eights = figure.axes
    assert [axes.get_title() for axes in figure.axes[:2]] == ["1 mode (16 nodes)", "2 modes (8 nodes)"]
    (median,) = leaves.lines
    assert median.get_ydata()[:2] == pytest.approx([1.0, 0.85])
    (band,) = leaves.collections
    xs = band.get_paths()[0].vertices
    assert sorted(set(np.round(xs[xs[:, 0] == 2, 1], 12).tolist())) == pytest.approx([0.1, 1.6])
    assert not fours.collections
    assert len(fours.lines) == 4
    assert len(eights.lines) == 2
    assert pairs.lines[0].get_ydata()[1] == pytest.approx(0.3)


def test_spectra_of_thousands_of_nodes() -> None:
    perfect = spectra_figure({"a": fall(ModeTree.perfect(4096).nodes[:-1], 1.0, 0.5)})
    assert len([axes for axes in perfect.axes if axes.axison]) == 12
    chain = spectra_figure({"a": fall([tuple(range(k)) for k in range(1, 200)], 1.0, 0.5)})
    titles = [axes.get_title() for axes in chain.axes]
    assert titles[:3] == ["1 mode", "2–3 modes (2 nodes)", "4–7 modes (4 nodes)"]
    assert titles[-1] == "128–199 modes (72 nodes)"


def circles(axes: Axes) -> list[tuple[float, float, str | tuple[float, ...]]]:
    points = [line for line in axes.lines if line.get_marker() == "o"]
    return [(*np.asarray(line.get_xydata())[0].tolist(), line.get_color()) for line in points]


def test_tree_has_its_ranks_in_colour_and_number() -> None:
    tree = ModeTree([[0, 1], [2, 3]])
    figure = tree_figure(tree, {"a": {(0,): 2, (1,): 2, (2,): 1, (3,): 1, (0, 1): 4, (2, 3): 1}})
    axes = figure.axes[0]
    shown = {(x, y): colour for x, y, colour in circles(axes)}
    assert set(shown) == {(0, 0), (1, 0), (2, 0), (3, 0), (0.5, 1), (2.5, 1), (1.5, 2)}
    viridis = mpl.colormaps["viridis"]
    assert shown[0.5, 1] == pytest.approx(viridis(1.0))
    assert shown[0, 0] == pytest.approx(viridis(1 / 3))
    assert shown[2.5, 1] == pytest.approx(viridis(0.0))
    assert to_rgba(shown[1.5, 2]) == to_rgba("black")
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "2", (1, 0): "2", (2, 0): "1", (3, 0): "1", (0.5, 1): "4", (2.5, 1): "1"}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2", "3"]


def test_leaves_stand_in_the_order_of_the_walk() -> None:
    tree = ModeTree([[0, 2], [1, 3]])
    axes = tree_figure(tree, {"a": {(0, 2): 1}}).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "2", "1", "3"]


@pytest.mark.parametrize("order", [2, 5, 16, 40, 64])
def test_nodes_never_touch(order: int) -> None:
    tree = ModeTree.perfect(order)
    figure = tree_figure(tree, {name: dict.fromkeys(tree.nodes[:-1], 7) for name in ("a", "b")})
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        lines = [line for line in axes.lines if line.get_marker() == "o"]
        centres = axes.transData.transform(np.concatenate([line.get_xydata() for line in lines]))
        radii = np.array([line.get_markersize() for line in lines]) / 2 * figure.dpi / 72
        gaps = np.linalg.norm(centres[:, None] - centres, axis=-1) - radii[:, None] - radii
        assert gaps[~np.eye(len(lines), dtype=bool)].min() > 0


def test_tree_of_thousands_is_a_box_per_number_of_modes() -> None:
    tree = ModeTree.perfect(128)
    ranks = {node: 1 + k % 3 for k, node in enumerate(tree.leaves)} | dict.fromkeys(tree.interior[:-1], 5)
    (axes,) = tree_figure(tree, {"a": ranks}).axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4", "8", "16", "32", "64"]
    # of every number of modes: the box, two whiskers and their ends, the median
    boxes = [[list(line.get_ydata()) for line in axes.lines[6 * k : 6 * k + 6]] for k in range(7)]
    assert boxes[0] == [[1, 1, 3, 3, 1], [1, 1], [3, 3], [1, 1], [3, 3], [2, 2]]
    assert {value for own in boxes[1:] for ends in own for value in ends} == {5}


def cut(share: float, error: float = 0.1, ratio: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(share=share, standard_error=error, participation_ratio=ratio)


def test_cuts_have_two_standard_errors() -> None:
    (axes,) = cut_figure({"a": {"left": cut(0.5), "checkerboard_4": cut(0.25, 0.05)}}).axes
    (bars,) = axes.containers
    assert bars.lines[0].get_xydata().tolist() == [[0.0, 0.5], [1.0, 0.25]]
    ends = [segment.tolist() for segment in bars.lines[2][0].get_segments()]
    np.testing.assert_allclose(ends, [[[0, 0.3], [0, 0.7]], [[1, 0.15], [1, 0.35]]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["left", "checkerboard 4"]
    assert axes.get_ylim()[0] == 0


def test_cuts_of_several_networks_stand_beside_each_other() -> None:
    figure = cut_figure({"a": {"left": cut(0.5, ratio=3.0)}, "b": {"left": cut(-0.01), "top": cut(0.2)}})
    shares, ratios = figure.axes
    first, second = (container.lines[0].get_xdata() for container in shares.containers)
    assert first[0] < 0 < second[0] == -first[0] < second[1] - 0.9
    assert shares.get_ylim()[0] < -0.2
    assert np.isnan(ratios.lines[1].get_ydata()).all()
    assert ratios.lines[0].get_ydata().tolist() == [3.0]


LABELS = ("without the term", "with the term, weight 3", "far__regularised__far_field_rule-seed_everything=0")


def figures() -> dict[str, Figure]:
    tree, large = ModeTree.perfect(16), ModeTree.perfect(256)
    names = ["left", "top", "quadrants", *(f"checkerboard {2**k}" for k in range(4, -1, -1))]
    return {
        "profile": profile_figure({label: profile([0.3, 0.1, 0.001, 1e-4]) for label in LABELS}),
        "spectra": spectra_figure({label: fall(tree.nodes[:-1], 1.0, 0.1, 1e-9) for label in LABELS}),
        "few": spectra_figure({label: fall([(0,), (1,)], 1.0, 0.1) for label in LABELS}),
        "tree": tree_figure(tree, {label: dict.fromkeys(tree.nodes[:-1], 12) for label in LABELS}),
        "strips": tree_figure(large, {label: dict.fromkeys(large.nodes[:-1], 12) for label in LABELS}),
        "cuts": cut_figure({label: {name: cut(0.1, ratio=2.0) for name in names} for label in LABELS}),
    }


def test_no_text_lies_on_another_nor_beyond_the_edge(tmp_path: Path) -> None:
    for name, figure in figures().items():
        assert overlapping(figure) == [], name
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width, name
    save_figure(figure, tmp_path / "a")
    assert (tmp_path / "a.pdf").stat().st_size > 1000
