"""What figures show of which family, and where; how they look is for eyes."""

import numpy as np
import pytest

from llm.scaling import figures
from llm.scaling.laws import fit_law
from llm.scaling.panels import group, panels
from tests.llm.scaling.test_scaling_report import whole_study


def test_variants_of_a_kind_share_a_panel_and_single_families_another() -> None:
    assert group(["a_x", "a_y", "b", "c"]) == [("variants of a", ["a_x", "a_y"]), ("others", ["b", "c"])]
    assert group(["b"]) == [("", ["b"])] and group([]) == []
    many = group([f"a_{i}" for i in range(9)])
    assert [len(members) for _, members in many] == [7, 2]  # no colour twice in a panel


def test_sixteen_panels_share_their_axes_in_four_columns_but_for_those_apart() -> None:
    import matplotlib.pyplot as plt

    figure, axes = panels(plt, 16, own={0, 15})
    assert len({round(axis.get_position().x0, 3) for axis in axes}) == 4
    axes[1].set_ylim(1, 2)
    axes[1].set_xlim(3, 4)
    assert all(axis.get_ylim() == (1, 2) for axis in axes[1:15]) and all(axis.get_xlim() == (3, 4) for axis in axes)
    assert axes[0].get_ylim() != (1, 2) != axes[15].get_ylim()
    plt.close(figure)


def test_an_extrapolated_minimum_is_an_open_marker_at_the_nearest_measured_size() -> None:
    import matplotlib.pyplot as plt

    rows = [r for r in whole_study() if r.point.family == "arm" and (r.point.budget < 2e15 or r.point.size != "xl")]
    law = fit_law(rows, "arm", "nll_ar", method="converged", draws=4, seed=0)
    assert law.isoflop.parabolas[2].flaw == "extrapolated"
    isoflop = figures.isoflop(plt, [law])
    markers = {line.get_marker(): line for line in isoflop.axes[0].lines if line.get_marker() in ("*", "<", ">")}
    assert set(markers) == {"*", ">"} and markers[">"].get_fillstyle() == "none"
    assert markers[">"].get_xdata() == pytest.approx([4e6])
    size = figures.size(plt, [law], "arm")
    open_ones = [line for line in size.axes[0].lines if line.get_fillstyle() == "none"]
    assert [float(np.asarray(line.get_ydata())[0]) for line in open_ones] == [4e6]
    plt.close("all")


def test_a_family_of_one_size_has_points_and_no_curves() -> None:
    import matplotlib.pyplot as plt

    rows = [r for r in whole_study() if r.point.size == "s" and r.point.family == "prime"]
    law = fit_law(rows, "prime", "nelbo_token", method="converged", draws=4, seed=0)
    frontier = figures.frontier(plt, [law], "prime")
    assert [line.get_marker() for line in frontier.axes[0].lines if len(line.get_xdata())] == ["x"] * 3
    assert figures.size(plt, [law], "prime") is None
    plt.close("all")
