"""Pictures, by what they draw: texts, order, values, limits; and that nothing lies over anything else."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_influence_functions as ptif
import torch
from pytorch_influence_functions.show import plotting
from pytorch_influence_functions.show.axes import HARMFUL, HELPFUL
from pytorch_influence_functions.show.entries import entry
from torch.utils.data import TensorDataset

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SCORES = np.array([[0.3, -0.2, 0.1, -0.4, 0.0, 0.25], [-0.1, 0.5, -0.6, 0.2, 0.7, -0.3]])


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def made(inputs=None, test_inputs=None, meta=None, scores=SCORES):
    """Two tests, 4 and 1 of the test set, on six training samples of label 3, 4, ...."""
    tests, n = scores.shape
    entries = {
        str(k): entry(scores[k], label=k, index=(4, 1)[k % 2], seconds=0, residual=0.02 * (k + 1), top_k=n)
        for k in range(tests)
    }
    mean = scores.mean(0)
    result = ptif.InfluenceResult(entries, np.argsort(mean).tolist(), np.argsort(-mean).tolist())
    inputs = torch.rand(n, 1, 8, 8) if inputs is None else inputs
    test_inputs = torch.rand(5, 1, 8, 8) if test_inputs is None else test_inputs
    train = [(x, torch.tensor(3 + i)) for i, x in enumerate(inputs)]
    return result.about(meta or {}, train, list(zip(test_inputs, range(5), strict=True)))


def texts(axis):
    return axis.get_xlabel().split("\n")


def no_overlap(figure):
    """No two texts of a figure lie over each other, and none is cut off."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = []
    for axis in figure.axes:
        marks = [axis.xaxis.label, axis.yaxis.label, axis.title, axis._left_title]
        for one in (axis.xaxis, axis.yaxis):
            low, high = sorted(one.get_view_interval())
            marks += [tick.label1 for tick in one.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes += [(t.get_text(), t.get_window_extent(renderer)) for t in marks if t.get_text() and t.get_visible()]
    boxes = [(text, box) for text, box in boxes if box.width > 0]
    assert boxes
    whole = figure.bbox.padded(1)
    for place, (text, box) in enumerate(boxes):
        assert whole.contains(box.x0, box.y0), f"{text!r} is cut off"
        assert whole.contains(box.x1, box.y1), f"{text!r} is cut off"
        for other, that in boxes[place + 1 :]:
            assert not box.padded(-1).overlaps(that.padded(-1)), f"{text!r} lies over {other!r}"


def test_influences_of_images():
    result = made()
    axes = plotting.plot_influences(
        result, predictions={4: 7, 1: 8}, show=2, notes={5: "(is a 9)"}, classes=["zero", "one"])  # fmt: skip
    assert axes.shape == (2, 5)
    assert texts(axes[0, 0]) == ["test 4", "label zero", "predicted 7"]
    assert texts(axes[1, 0]) == ["test 1", "label one", "predicted 8"]
    assert texts(axes[0, 1]) == ["train 0", "label 3", "+0.3"]
    assert texts(axes[0, 2]) == ["train 5", "label 8", "(is a 9)", "+0.25"]
    assert texts(axes[0, 3]) == ["train 3", "label 6", "-0.4"]
    assert texts(axes[0, 4]) == ["train 1", "label 4", "-0.2"]
    assert [texts(axis)[-1] for axis in axes[1, 1:]] == ["+0.7", "+0.5", "-0.6", "-0.3"]
    assert [axis.get_title(loc="left") for axis in axes[0]] == [
        "test sample", "most helpful →", "", "most harmful →", ""]  # fmt: skip
    assert [axis.xaxis.label.get_color() for axis in axes[0, 1:]] == [HELPFUL] * 2 + [HARMFUL] * 2
    for axis, (x, _) in ((axes[0, 0], result.test_set[4]), (axes[0, 3], result.train_set[3])):
        drawn = np.asarray(axis.images[0].get_array())
        np.testing.assert_allclose(drawn[..., 0] / 255, x[0], atol=0.002)
    no_overlap(axes[0, 0].figure)


def test_the_colour_is_that_of_the_sign_not_of_the_place():
    axes = plotting.plot_influences(made(scores=np.array([[0.1, 0.2, 0.3, 0.4]])), show=2)
    assert [axis.xaxis.label.get_color() for axis in axes[0, 1:]] == [HELPFUL] * 4


def test_which_tests_and_data_sets(tmp_path):
    result = made()
    axes = plotting.plot_influences(result, 1, show=9, path=tmp_path / "new" / "one.png")
    assert axes.shape == (1, 7)  # no sample of six on both sides
    assert texts(axes[0, 0])[0] == "test 1"
    assert (tmp_path / "new" / "one.png").stat().st_size > 1000
    assert plotting.plot_influences(result, ["1", 0], show=1)[1, 0].get_xlabel().startswith("test 4")
    dark = TensorDataset(torch.zeros(6, 1, 8, 8), torch.zeros(6))
    _, best, _ = plotting.plot_influences(result, 0, dark, dark, show=1)[0]
    assert np.asarray(best.images[0].get_array()).max() == 0
    _, best, _ = plotting.plot_influences(result, 0, dark, dark, show=1, invert=True)[0]
    assert np.asarray(best.images[0].get_array()).min() == 255
    given = plt.subplots(1, 3)[1]
    assert plotting.plot_influences(result, 0, show=1, axes=given)[0, 2] is given[2]
    with pytest.raises(ValueError, match="axes: expected 2 x 3 of them"):
        plotting.plot_influences(result, show=1, axes=given)
    with pytest.raises(ValueError, match="test_set: expected the data set of the run, got None"):
        plotting.plot_influences(result.about({}), 0, dark)
    with pytest.raises(ValueError, match="test: expected at least one"):
        plotting.plot_influences(made(), [])
    with pytest.raises(KeyError, match="2 test samples"):
        plotting.plot_influences(made(), 2)


def cells(axis):
    (table,) = axis.tables
    rows = max(row for row, _ in table.get_celld()) + 1
    return [[table[row, column].get_text().get_text() for column in range(4)] for row in range(rows)]


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_influences_of_what_is_no_image(kind):
    words = ["one", "two $3 and $4", "three\nlines", "x" * 300, "four " * 60, "six"]
    inputs = words if kind == "text" else torch.arange(12.0).view(6, 2)
    tests = ["a", "b", "c", "d", "e"] if kind == "text" else torch.zeros(5, 2)
    axes = plotting.plot_influences(made(inputs, tests), show=2, predictions=[0, 7, 0, 0, 9])
    assert axes.shape == (2, 1)
    table = cells(axes[0, 0])
    assert table[0] == ["sample", "label", "influence", "what it is"]
    assert [row[0] for row in table[1:]] == ["test 4", "train 0", "train 5", "train 3", "train 1"]
    assert [row[1] for row in table[1:]] == ["0, predicted 9", "3", "8", "6", "4"]
    assert [row[2] for row in table[1:]] == ["", "+0.3", "+0.25", "-0.4", "-0.2"]
    if kind == "rows":
        assert [row[3] for row in table[1:]] == ["0, 0", "0, 1", "10, 11", "6, 7", "2, 3"]
    else:
        assert table[-1][3] == r"two \$3 and \$4"
        assert len(table[-2][3]) <= 80
    axes[0, 0].figure.canvas.draw()


def test_distribution():
    rng = np.random.default_rng(0)
    scores = rng.standard_t(2, size=(2, 500)) * 1e-3
    result = made(inputs=[0] * 500, scores=scores)
    axis = plotting.plot_distribution(result, 1)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == [f"{(scores[1] < 0).sum()} harmful", f"{(scores[1] > 0).sum()} helpful"]
    heights = {False: 0, True: 0}
    for bar in axis.patches:
        middle = bar.get_x() + bar.get_width() / 2
        harmful = mpl.colors.to_hex(bar.get_facecolor()).upper() == HARMFUL
        assert bar.get_height() == 0 or (middle < 0) == harmful
        heights[harmful] += bar.get_height()
    assert heights == {True: (scores[1] < 0).sum(), False: (scores[1] > 0).sum()}
    share = np.sort(np.abs(scores[1]))[-5:].sum() / np.abs(scores[1]).sum()
    assert axis.get_title() == f"test 1; the largest 5 of 500 have {share:.0%} of it"
    assert axis.get_yscale() == "log"
    no_overlap(axis.figure)
    assert "mean over the test samples" in plotting.plot_distribution(result).get_title()


def test_convergence():
    report = {
        "solver": "lissa", "curvature": "hessian", "damping": 0.25, "scale_asked": 25, "scale": 31.25,
        "eigenvalue_minibatch": 29.4, "groups": [{"steps": [[100], [120]]}, {"steps": [[80], [60]]}],
    }  # fmt: skip
    axis = plotting.plot_convergence(made(meta={"solver": report, "config": {"tolerance": 0.01}}))
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [120, 80])
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0.02, 0.04])
    assert axis.get_xlabel() == "steps of the solver"
    assert axis.lines[1].get_ydata()[0] == 0.01
    assert axis.get_legend().get_texts()[0].get_text() == "tolerance 0.01"
    said = axis.get_title(loc="left")
    for part in ("solver lissa", "hessian", "λ = 0.25", "scale asked 25, used 31.2", "largest eigenvalue 29.4"):
        assert part in said
    no_overlap(axis.figure)


def test_convergence_without_steps_or_report():
    report = {"solver": "auto", "chosen": "low rank plus EKFAC", "curvature": "ggn", "damping": 0.0445}
    axis = plotting.plot_convergence(made(meta={"solver": report, "config": {"tolerance": None}}))
    assert axis.get_xlabel() == "test sample"
    assert "solver auto (low rank plus EKFAC)" in axis.get_title(loc="left")
    assert len(axis.lines) == 1
    unknown = made()
    for one in unknown.influences.values():
        one["relative_residual"] = None
    assert plotting.plot_convergence(unknown).get_title(loc="left") == "what the solver did is not known"


def test_convergence_of_a_run(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    data = TensorDataset(torch.rand(12, 3), torch.arange(12) % 2)
    loader = torch.utils.data.DataLoader(data, 4)
    for solver, label in (("cg", "steps of the solver"), ("lissa", "steps of the solver"), ("ekfac", "test sample")):
        config = {"outdir": tmp_path, "progress": False, "solver": solver, "recursion_depth": 30}
        axis = plotting.plot_convergence(ptif.calc_img_wise(config, model, loader, loader))
        assert axis.get_xlabel() == label
        assert len(axis.lines[0].get_xdata()) == 12


def test_leave_one_out():
    x, y = np.array([-0.05, 0.0, 0.05, 0.1]), np.array([-0.06, 0.01, 0.05, 0.12])
    axis = plotting.plot_leave_one_out(SimpleNamespace(predicted=x, actual=y), title="logistic regression")
    slope = np.polyfit(x, y, 1)[0]
    expected = f"logistic regression\nPearson {np.corrcoef(x, y)[0, 1]:.3f}, slope {slope:.2f}, n = 4"
    assert axis.get_title() == expected
    assert axis.get_xlim() == axis.get_ylim()
    assert axis.get_xlim()[0] < -0.06 < 0.12 < axis.get_xlim()[1]
    np.testing.assert_allclose(axis.lines[1].get_xydata(), np.stack([x, y], 1))
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["equal", "one left-out training sample"]
    no_overlap(axis.figure)
    figure, given = plt.subplots(1, 4, figsize=(12, 3.4), layout="constrained")
    for one in given:  # as in the README's figure, where the numbers along the axis ran into each other
        assert plotting.plot_leave_one_out(x.tolist(), y.tolist(), axis=one) is one
    no_overlap(figure)
    assert plotting.plot_leave_one_out([0, 0], [1, 2]).get_title() == "n = 2"
    for wrong in ([1.0], [1, 2]), ([1], [1]):
        with pytest.raises(ValueError, match="actual: expected at least two changes"):
            plotting.plot_leave_one_out(*wrong)


def test_mislabel_curve():
    curve = ptif.mislabel_curve([3.0, 2, 1, 0], [True, False, True, False])
    axis = plotting.plot_mislabel_curve({"loss": curve, "mine": ([0, 1], [0, 1])}, share=0.5)
    np.testing.assert_allclose(axis.lines[0].get_ydata(), [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(axis.lines[0].get_xdata(), [0, 0.25, 0.5, 0.75, 1])
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["loss", "mine", "random order", "best possible"]
    assert axis.lines[3].get_xdata()[1] == 0.5
    looks = {(line.get_color(), line.get_linestyle()) for line in axis.lines}
    assert len(looks) == 4
    assert axis.lines[0].get_linestyle() != axis.lines[1].get_linestyle()  # told apart without colour
    assert axis.get_xlim() == (0, 1)
    no_overlap(axis.figure)
    assert plotting.plot_mislabel_curve(curve).lines[0].get_label() == "found"


def test_damping():
    axis = plotting.plot_damping([0.001, 0.01, 0.1], [np.inf, 0.4, 0.2], chosen=0.02, target=0.23)
    assert axis.get_xscale() == "log"
    np.testing.assert_array_equal(axis.lines[0].get_ydata(), [np.nan, 0.4, 0.2])
    assert axis.lines[1].get_xdata()[0] == 0.02
    assert axis.lines[2].get_ydata()[0] == 0.23
    assert [t.get_text() for t in axis.get_legend().get_texts()][1:] == ["chosen: λ = 0.02", "target: 0.23"]
    assert axis.get_ylim()[0] == 0
    assert axis.get_ylabel() == "error of first-order predictions"
    no_overlap(axis.figure)
    two = plotting.plot_damping([0.1, 1], {"a": [1, 2], "b": [2, 1]}, label="score")
    assert [line.get_label() for line in two.lines] == ["a", "b"]
    assert two.get_ylabel() == "score"


def test_without_matplotlib_each_says_which_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calls = [
        lambda: plotting.plot_influences(made()), lambda: plotting.plot_distribution(made()),
        lambda: plotting.plot_convergence(made()), lambda: plotting.plot_leave_one_out([1, 2], [1, 2]),
        lambda: plotting.plot_mislabel_curve(([0, 1], [0, 1])), lambda: plotting.plot_damping([1], [1]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ImportError, match=r"pytorch_influence_functions\[plot\]"):
            call()
    assert len(calls) == len(plotting.__all__)


def test_without_a_display():
    code = (
        "from pytorch_influence_functions.show import plotting as p; "
        "a = p.plot_damping([1, 2], [1, 2]); a.figure.canvas.draw(); print(a.get_xlabel())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND", "WAYLAND_DISPLAY")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "damping" in run.stdout
