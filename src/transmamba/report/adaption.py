"""The page of an adaptation: how good the student is beside its teacher, what it confuses, and how near layers came."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from transmamba.errors import InputError
from transmamba.report.figures import STYLE, TRANSMAMBA_COLOUR, WIDTH, loss_curves
from transmamba.report.html import Page
from transmamba.report.units import format_count

__all__ = ["AdaptionReport", "alignment_figure", "confusion_figure", "layers_over_time"]

MOST_LABELS = 24  # that an axis shows
MOST_CONFUSED = 10  # pairs of classes in the table


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptionReport:
    """Scores are (top-1, top-5, loss in nats an image). confusion: rows are true classes. cka: rows are the student's
    layers. layer_weights, layer_cosines: a list for every layer, an entry for every step; empty where the method has
    none.
    """

    name: str
    teacher: str
    student: str
    method: str
    source: str
    num_training_images: int
    num_parameters: int
    share_from_teacher: float
    classes: Sequence[str]
    student_scores: tuple[float, float, float]
    teacher_scores: tuple[float, float, float]
    num_images: int
    confusion: Sequence[Sequence[int]]
    cka: Sequence[Sequence[float]]
    steps: Sequence[int]
    losses: Sequence[float]
    layer_weights: Sequence[Sequence[float]]
    layer_cosines: Sequence[Sequence[float]]
    accuracy: Sequence[tuple[int, float]]
    skipped: Sequence[str] = ()

    def page(self) -> Page:
        """The page, ready to be written."""
        page = Page(f"{self.student} out of {self.teacher}", subtitle=f"{self.name}: {self.method}, on {self.source}")
        points = 100 * (self.student_scores[0] - self.teacher_scores[0])
        page.finding(
            f"The student names {100 * self.student_scores[0]:.1f} % of {self.num_images:,} images right, its teacher "
            f"{100 * self.teacher_scores[0]:.1f} %: {abs(points):.1f} points {'more' if points > 0 else 'less'}."
        )
        page.table(
            ("", "teacher", "student"),
            [
                [name, theirs, ours]
                for name, theirs, ours in (
                    ("top-1", *map(_percent, (self.teacher_scores[0], self.student_scores[0]))),
                    ("top-5", *map(_percent, (self.teacher_scores[1], self.student_scores[1]))),
                    ("loss, nats an image", f"{self.teacher_scores[2]:.3f}", f"{self.student_scores[2]:.3f}"),
                )
            ],
            caption=f"On {self.num_images:,} images for validation. One image is {_percent(1 / self.num_images)}.",
        )
        page.paragraph(
            f"{format_count(self.num_parameters)} parameters, {_percent(self.share_from_teacher)} of which began as "
            f"the teacher's; {self.num_training_images:,} images for training."
        )
        if self.skipped:
            page.paragraph(f"{len(self.skipped)} files could not be read and were skipped, {self.skipped[0]} first.")
        self._training(page)
        page.section("What is taken for what")
        page.figure(
            confusion_figure(self.confusion, self.classes), "Share of each class's images taken for each class."
        )
        rows = _most_confused(self.confusion, self.classes)
        if rows:
            page.table(("true class", "taken for", "images", "share"), rows, text_columns=2)
        page.section("How near layers are")
        page.figure(
            alignment_figure(self.cka),
            "Linear CKA of the mean token after each layer of the student and each block of the teacher, on images for "
            "validation; 1 where one is the other turned and scaled.",
        )
        return page

    def _training(self, page: Page) -> None:
        page.section("Training")
        if self.steps:
            curve = {self.student: list(zip(self.steps, self.losses, strict=True))}
            colours = {self.student: TRANSMAMBA_COLOUR}
            figure = loss_curves(curve, colours=colours, unit="the method's own", x_label="step")
            page.figure(figure, "Training loss.")
        if self.accuracy:
            page.table(
                ("step", "top-1"), [[f"{step:,}", _percent(share)] for step, share in self.accuracy], text_columns=0
            )
        for values, what in ((self.layer_weights, "weight"), (self.layer_cosines, "cosine")):
            if values:
                page.figure(
                    layers_over_time(self.steps, values, what),
                    f"The {what} of every layer in the feature loss, the mean over directions.",
                )


def confusion_figure(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """A matrix of shares: rows are true classes and add up to 1."""
    if len(confusion) != len(classes):
        raise InputError(f"the confusion matrix has {len(confusion)} rows and there are {len(classes)} classes.")
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    return _matrix(shares, "taken for", "true class", labels=(classes, classes))


def alignment_figure(cka: Sequence[Sequence[float]]) -> Figure:
    """A matrix of numbers between 0 and 1: rows are layers of the student, from the top."""
    if not cka or not cka[0]:
        raise InputError("there are no layers to compare; give a row for each layer of the student.")
    counted = [[str(number + 1) for number in range(count)] for count in (len(cka), len(cka[0]))]
    return _matrix(cka, "block of the teacher", "layer of the student", labels=(counted[0], counted[1]))


def layers_over_time(steps: Sequence[int], values: Sequence[Sequence[float]], what: str) -> Figure:
    """A line for every layer, from dark for the first to light for the last."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        axes = figure.add_subplot()
        colours = colormaps["viridis"]
        for layer, line in enumerate(values):
            colour = colours(0.9 * layer / max(1, len(values) - 1))
            label = f"layer {layer + 1}" if layer in (0, len(values) - 1) else None
            axes.plot(steps, line, color=colour, label=label, linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel(what)
        axes.legend()
    return figure


def _matrix(
    values: Sequence[Sequence[float]], x_label: str, y_label: str, *, labels: tuple[Sequence[str], Sequence[str]]
) -> Figure:
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, 0.85 * WIDTH), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        for axis, names in ((axes.yaxis, labels[0]), (axes.xaxis, labels[1])):
            every = -(-len(names) // MOST_LABELS)
            places = list(range(0, len(names), every))
            axis.set_ticks(places, [names[place] for place in places])
        if max(map(len, labels[1])) > 3:
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.colorbar(image, ax=axes)
    return figure


def _most_confused(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> list[list[str]]:
    pairs = [
        (count, true, taken)
        for true, row in enumerate(confusion)
        for taken, count in enumerate(row)
        if true != taken and count
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    return [
        [classes[true], classes[taken], f"{count:,}", _percent(count / sum(confusion[true]))]
        for count, true, taken in pairs[:MOST_CONFUSED]
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
