"""The labs' pictures, with matplotlib alone. All are legible in grey, and each has its caption under it.

A caption starts with the figure's number and ends with the number that the picture is about.
"""

import io
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image, display
from matplotlib.patches import Rectangle

STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
DASHES = ["-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1))]
MARKERS = ["o", "s", "^", "D", "v"]
GREYS = ["0.15", "0.6", "0.85", "0.4"]
HATCHES = ["", "//", "..", "xx"]


def new(width, height, columns=1, **options):
    """A figure of `width` x `height` inches -> figure, array of axes"""
    plt.rcParams.update(STYLE)
    fig, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)
    return fig, axes[0]


def finish(fig, caption, photo=False):
    """Writes the caption under the figure and shows it. photo: as JPEG, or a notebook would grow beyond 1 MB."""
    fig.draw_without_rendering()  # only then it is known where the picture ends
    bottom, (width, height) = fig.get_tightbbox().y0, fig.get_size_inches()
    text = textwrap.fill(caption.replace(" %", "\u00a0%"), int(14.5 * width))
    fig.text(0.01, (bottom - 0.15) / height, text, va="top", fontsize=9.5)
    file = io.BytesIO()
    options = dict(format="jpeg", pil_kwargs=dict(quality=85, subsampling=0)) if photo else dict(format="png")
    fig.savefig(file, dpi=90, bbox_inches="tight", pad_inches=0.05, **options)
    plt.close(fig)
    display(Image(file.getvalue(), alt=caption))


def film(rows, gap=3, pairs=False):
    """Rows of frames (T, H, W[, 3]) as one image, white between them -> image, x of each frame, y of each row"""
    T, (H, W) = max(len(row) for row in rows), rows[0].shape[1:3]
    y = [i * (H + gap) + (2 * gap * (i // 2) if pairs else 0) for i in range(len(rows))]
    x = [t * (W + gap) for t in range(T)]
    blank = 0 if rows[0].dtype == bool else 255
    image = np.full((y[-1] + H, x[-1] + W, *rows[0].shape[3:]), blank, rows[0].dtype)
    for top, row in zip(y, rows):
        for left, frame in zip(x, row):
            image[top : top + H, left : left + W] = frame
    return image, np.array(x) + W / 2, np.array(y) + H / 2


def strips(rows, caption, pairs=False, numbers=None, maps=None, masks=None, xlabel="frame", width=8.0):
    """Film strips. rows: {name: frames uint8 (T, H, W, 3)}, one strip per name; `pairs` moves each two together.

    numbers: what to write above the frames. maps: {name: (T, h, w)}, for example attention over patches: the lightness
    of a patch is its weight, divided by the largest of its frame. masks: {name: bool (T, H, W)}, drawn as an outline.
    """
    shown = dict(rows)
    for name, weights in (maps or {}).items():
        weights = np.asarray(weights) / np.max(weights, (1, 2), keepdims=True).clip(1e-9)
        H, W = rows[name].shape[1:3]
        large = weights.repeat(H // weights.shape[1], 1).repeat(W // weights.shape[2], 2)[..., None]
        grey = rows[name].mean(-1, keepdims=True) * np.ones(3)
        shown[name] = (255 * grey / grey.max() * (0.25 + 0.75 * large)).astype(np.uint8)
    image, x, y = film(list(shown.values()), pairs=pairs)
    fig, (ax,) = new(width, width * image.shape[0] / image.shape[1] + 0.6)
    ax.imshow(image)
    if masks:
        none = np.zeros(next(iter(rows.values())).shape[:3], bool)
        outline = film([masks.get(name, none) for name in rows], pairs=pairs)[0]
        for color, thick in (("black", 2.2), ("white", 1.0)):
            ax.contour(outline, [0.5], colors=color, linewidths=thick)
    ax.set_yticks(y, list(rows))
    ax.set_xticks(x, range(len(x)) if numbers is None else numbers)
    ax.xaxis.set_label_position("top")
    ax.set_xlabel(xlabel)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    finish(fig, caption, photo=True)


def patches(image, size, caption):
    """image uint8 (H, W, 3) beside its patches, numbered in the order of the tokens."""
    h, w = image.shape[0] // size, image.shape[1] // size
    fig, axes = new(5.6, 3.4, 2)
    cut = [image[i * size :][:size, j * size :][:, :size] for i in range(h) for j in range(w)]
    apart, x, y = film([np.stack(cut[i * w : (i + 1) * w]) for i in range(h)], gap=2)
    for ax, picture, title in zip(axes, (image, apart), ("one frame", f"its {h * w} patches, with their numbers")):
        ax.imshow(picture)
        ax.set_title(title)
        ax.axis("off")
    for number in range(h * w):
        place = x[number % w] - size / 2 + 1, y[number // w] - size / 2 + 1
        box = dict(facecolor="white", pad=1, lw=0)
        axes[1].text(*place, number + 1, va="top", fontsize=7, bbox=box)
    finish(fig, caption, photo=True)


def matrices(
    panels, caption, xlabel="", ylabel="", rows=None, columns=None, digits=None, blocks=0, size=None, grid=None
):
    """Heat maps, dark is much. panels: {title: values (n, m)}. digits: write the values, with so many decimals.

    blocks: frame the square blocks of this size along the diagonal. grid: thin lines after every so many entries.
    """
    width, height = size or (2.2 * len(panels), 2.9)
    fig, axes = new(width, height, len(panels))
    top = max(np.max(values) for values in panels.values())
    for ax, (title, values) in zip(axes, panels.items()):
        values = np.asarray(values)
        ax.imshow(values, cmap="Greys", vmin=0, vmax=top * 1.1)
        ax.set_title(title)
        if digits is not None:
            for (i, j), v in np.ndenumerate(values):
                if round(v, digits):
                    ax.text(
                        j, i, f"{v:.{digits}f}", ha="center", va="center", fontsize=8, color="w" if v > top / 2 else "k"
                    )
        for start in range(0, len(values) if blocks else 0, blocks or 1):
            ax.add_patch(Rectangle((start - 0.5, start - 0.5), blocks, blocks, fill=False, ec="black", lw=2.2))
        for place in range(grid or 0, len(values) if grid else 0, grid or 1):
            ax.axhline(place - 0.5, color="0.5", lw=0.8)
            ax.axvline(place - 0.5, color="0.5", lw=0.8)
        ax.set_yticks(range(len(values)) if rows else [], rows or [])
        ax.set_xticks(range(values.shape[1]) if columns else [], columns or [], rotation=90 if columns else 0)
        ax.set_xlabel(xlabel)
        ax.spines[:].set_visible(True)
    axes[0].set_ylabel(ylabel)
    finish(fig, caption)


def confusion(labels, predictions, names, order, caption):
    """The confusion matrix in percent of each row, classes in `order`, each two (a class and its mirror) framed."""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (np.asarray(labels), np.asarray(predictions)), 1)
    index = [names.index(name) for name in order]
    percent = 100 * counts[index][:, index] / counts[index].sum(1, keepdims=True).clip(1)
    matrices({"": percent}, caption, "predicted class", "true class", order, order, 0, blocks=2, size=(5.6, 5.6))


def bars(groups, caption, ylabel, lines=None, width=7.0, height=3.0, digits=0, top=None):
    """Bars with their values on top. groups: {name of the bars: {series: value}}, or {name: value} for one series.

    lines: {label: value}, drawn as dashed lines across.
    """
    groups = {name: value if isinstance(value, dict) else {"": value} for name, value in groups.items()}
    series = list(dict.fromkeys(label for group in groups.values() for label in group))
    fig, (ax,) = new(width, height)
    step = 0.8 / len(series)
    for k, label in enumerate(series):
        at = [i for i, group in enumerate(groups.values()) if group.get(label) is not None]
        values = [group[label] for group in groups.values() if group.get(label) is not None]
        places = np.array(at) + (k - (len(series) - 1) / 2) * step
        drawn = ax.bar(places, values, step * 0.92, label=label, color=GREYS[k], hatch=HATCHES[k], ec="black", lw=0.6)
        box = dict(facecolor="white", pad=0, lw=0) if lines else None  # no dashed line crosses a number
        ax.bar_label(drawn, [f"{v:.{digits}f}" for v in values], padding=1, fontsize=8, bbox=box)
    for k, (label, value) in enumerate((lines or {}).items()):
        ax.axhline(value, color="black", lw=1, ls=DASHES[k + 1], label=label, zorder=0)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.set_ylabel(ylabel)
    ax.set_ylim(0, top)
    if len(series) > 1 or lines:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    finish(fig, caption)


def lines(panels, caption, xlabel, ylabel, log=False, width=8.0, height=3.2, marks=None):
    """Curves. panels: {title: {label: (x, y)}}; every curve has its own dashes and marker. marks: x to mark, dotted."""
    fig, axes = new(width, height, len(panels), sharey=True)
    for ax, (title, curves) in zip(axes, panels.items()):
        for k, (label, (x, y)) in enumerate(curves.items()):
            shade, style = str(0.16 * (k % 4)), DASHES[k % len(DASHES)]
            ax.plot(x, y, label=label, color=shade, ls=style, marker=MARKERS[k % len(MARKERS)], ms=4)
        for x in marks or ():
            ax.axvline(x, color="0.7", lw=0.8, ls=":", zorder=0)
        if log:
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter("{x:.0f}")
            ax.set_xticks(sorted({float(x) for xs, _ in curves.values() for x in xs}))  # also where x is no power of 2
        ax.set_title(title)
        ax.set_xlabel(xlabel)
        ax.grid(color="0.92")
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    finish(fig, caption)


def scatters(panels, caption, ylabel, ylim=None, lines=None, width=9.0, height=2.6):
    """Points in panels with one scale of y. panels: {xlabel: {name: (x, y)}}; a name has one marker everywhere.

    The markers become smaller from name to name, so that points at the same place are all seen. lines: {label: y},
    drawn as dashed lines across.
    """
    fig, axes = new(width, height, len(panels), sharey=True)
    names = list(dict.fromkeys(name for points in panels.values() for name in points))
    for ax, (xlabel, points) in zip(axes, panels.items()):
        for name, (x, y) in points.items():
            k = names.index(name)
            marker, shade = MARKERS[k % len(MARKERS)], GREYS[k % len(GREYS)]
            ax.plot(x, y, marker, ms=max(11 - 1.4 * k, 5), color=shade, mec="black", label=name, clip_on=False)
        for k, (label, value) in enumerate((lines or {}).items()):
            ax.axhline(value, color="black", lw=1, ls=DASHES[k + 1], label=label, zorder=1)
        ax.set_xlim(0, 1.15 * max(x for x, _ in points.values()))
        ax.set_xlabel(xlabel)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
    axes[0].set_ylim(ylim)
    axes[0].set_ylabel(ylabel)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside upper center", ncols=len(handles))
    finish(fig, caption)


def sheets(panels, caption, width=8.0, height=2.4, label="frame t"):
    """Grids of tokens, one behind the other, as the frames of a clip. panels: {title: shades (T, h, w) from 0 to 1}

    Frame 1 is in front. A token with shade 0 is white, one with shade 1 is black.
    """
    fig, axes = new(width, height, len(panels))
    for ax, (title, shades) in zip(axes, panels.items()):
        T, h, w = np.shape(shades)
        for t in reversed(range(T)):
            left, up = 0.62 * t * w, 0.42 * t * h
            for i, j in np.ndindex(h, w):
                color, place = str(1 - 0.9 * float(shades[t][i][j])), (left + j, up + h - 1 - i)
                ax.add_patch(Rectangle(place, 1, 1, facecolor=color, ec="0.3", lw=0.8, zorder=T - t))
            ax.text(left + w + 0.1, up + 0.05, t + 1, fontsize=8, va="bottom", zorder=T + 1)
        ax.set_xlim(-0.1, (0.62 * (T - 1) + 1) * w + 0.6)
        ax.set_ylim(-0.1, (0.42 * (T - 1) + 1) * h + 0.1)
        ax.set_aspect("equal")
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    axes[0].set_xlabel(f"numbers: {label}", loc="left", fontsize=8)
    finish(fig, caption)


def over_time(frames, place, weights, caption, marked=None, size=16, width=8.0, ylabel="", digits=0):
    """One patch through a clip: a film strip with the patch framed, and below each frame a number for every row.

    frames: uint8 (T, H, W, 3). place: row and column of the patch. weights: {row: (T,)}, dark is much. marked: bool
    (T,), the frames that get a thick frame, for example those in which the shape stands on the patch.
    """
    image, x, _ = film([frames])
    table, (H, W) = np.array(list(weights.values())), frames.shape[1:3]
    fig, (ax,) = new(width, width * (image.shape[0] + 0.42 * H * len(table)) / image.shape[1] + 0.5)
    ax.imshow(image, extent=(0, image.shape[1], H, 0))
    for t, (centre, mark) in enumerate(zip(x, marked if marked is not None else [False] * len(x))):
        corner = centre - W / 2 + place[1] * size, place[0] * size
        for color, thick in (("black", 3.2), ("white", 1.4)):
            ax.add_patch(Rectangle(corner, size, size, fill=False, ec=color, lw=thick))
        for k, value in enumerate(table[:, t]):
            top = H * (1.08 + 0.42 * k)
            shade = value / table.max()
            ax.add_patch(Rectangle((centre - W / 2, top), W, 0.38 * H, facecolor=str(1 - 0.85 * shade), lw=0))
            text = dict(ha="center", va="center", fontsize=8, color="w" if shade > 0.55 else "k")
            ax.text(centre, top + 0.2 * H, f"{value:.{digits}f}", **text)
        if mark:
            box = (centre - W / 2 - 1, H * 1.06), W + 2, 0.42 * H * len(table)
            ax.add_patch(Rectangle(*box, fill=False, ec="black", lw=1.8))
    ax.set_ylim(H * (1.1 + 0.42 * len(table)), 0)
    ax.set_xlim(-2, image.shape[1] + 2)
    ax.set_xticks(x, range(1, len(x) + 1))
    ax.set_yticks([H * (1.27 + 0.42 * k) for k in range(len(table))], list(weights))
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("frame t")
    ax.set_ylabel(ylabel)
    ax.tick_params(length=0, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    finish(fig, caption, photo=True)


def matching(cosine, w, u, rows, columns, caption, width=7.2, height=5.0):
    """Cosines (n, m) with their maxima: a circle at the largest of a row, a square at the largest of a column.

    w (n,), u (m,): weights of the rows and of the columns, drawn as bars beside and below.
    """
    plt.rcParams.update(STYLE)
    ratios = dict(width_ratios=[4.5, 1], height_ratios=[4, 1])
    fig, ((ax, right), (below, corner)) = plt.subplots(
        2, 2, figsize=(width, height), layout="constrained", gridspec_kw=ratios
    )
    corner.axis("off")
    cosine, w, u = (np.asarray(values) for values in (cosine, w, u))
    ax.imshow(cosine, cmap="Greys", vmin=0, vmax=1.6 * cosine.max(), aspect="auto")
    for (i, j), value in np.ndenumerate(cosine):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
    for i, j in enumerate(cosine.argmax(1)):
        ax.plot(j, i, "o", ms=25, mfc="none", mec="black", mew=1.2)
    for j, i in enumerate(cosine.argmax(0)):
        ax.plot(j, i, "s", ms=29, mfc="none", mec="black", mew=1.8)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    ax.tick_params(length=0)
    bars = right.barh(range(len(rows)), w, color="0.6", ec="black", lw=0.6)
    right.bar_label(bars, [f"{value:.2f}" for value in w], padding=2, fontsize=8)
    right.set(ylim=ax.get_ylim(), yticks=[], xticks=[], xlim=(0, 1.4 * max(w)), title="weights w")
    bars = below.bar(range(len(columns)), u, color="0.6", ec="black", lw=0.6)
    below.bar_label(bars, [f"{value:.2f}" for value in u], padding=1, fontsize=8)
    below.set(xlim=ax.get_xlim(), xticks=[], yticks=[], ylim=(0, 1.4 * max(u)), ylabel="weights u")
    finish(fig, caption)
