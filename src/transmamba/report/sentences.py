"""The page of an adapted sentence encoder: how it finds captions beside its teacher, and how near its layers came."""

from collections.abc import Sequence
from dataclasses import dataclass

from transmamba.report.adaption import alignment_figure, layers_over_time
from transmamba.report.figures import TRANSMAMBA_COLOUR, loss_curves
from transmamba.report.html import Page
from transmamba.report.units import format_count

__all__ = ["SentenceReport"]

Scores = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SentenceReport:
    """scores: (teacher's, student's), each recall at 1, 5 and 10 and the mean rank; None where there were no captions.

    cosine: between embeddings of both on texts for validation. cka: rows are the student's layers. layer_weights,
    layer_cosines: a list for every layer, an entry for every step. distances: (step, 1 - cosine) while it was trained.
    """

    name: str
    teacher: str
    student: str
    source: str
    num_training_texts: int
    num_parameters: int
    share_from_teacher: float
    cosine: float | None
    scores: tuple[Scores, Scores] | None
    num_photos: int
    cka: Sequence[Sequence[float]]
    steps: Sequence[int]
    losses: Sequence[float]
    layer_weights: Sequence[Sequence[float]]
    layer_cosines: Sequence[Sequence[float]]
    distances: Sequence[tuple[int, float]]

    def page(self) -> Page:
        """The page, ready to be written."""
        page = Page(f"{self.student} out of {self.teacher}", subtitle=f"{self.name}, on {self.source}")
        if self.cosine is not None:
            page.finding(f"The student's embeddings have a mean cosine of {self.cosine:.3f} with its teacher's.")
        if self.scores is not None:
            names = ("recall at 1", "recall at 5", "recall at 10", "mean rank")
            rows = [
                [name, *(f"{score[at]:.2f}" if at == 3 else _percent(score[at]) for score in self.scores)]
                for at, name in enumerate(names)
            ]
            page.table(
                ("", "teacher", "student"),
                rows,
                caption=f"Another caption of the same photo, found among {self.num_photos:,}; the mean over all pairs "
                "of caption numbers.",
            )
        page.paragraph(
            f"{format_count(self.num_parameters)} parameters, {_percent(self.share_from_teacher)} of which began as "
            f"the teacher's; {self.num_training_texts:,} texts for training."
        )
        page.section("Training")
        if self.steps:
            curve = {self.student: list(zip(self.steps, self.losses, strict=True))}
            colours = {self.student: TRANSMAMBA_COLOUR}
            page.figure(loss_curves(curve, colours=colours, unit="of the loss", x_label="step"), "Training loss.")
        if self.distances:
            page.table(
                ("step", "1 - cosine"),
                [[f"{step:,}", f"{value:.4f}"] for step, value in self.distances],
                text_columns=0,
            )
        for values, what in ((self.layer_weights, "weight"), (self.layer_cosines, "cosine")):
            if values:
                page.figure(
                    layers_over_time(self.steps, values, what), f"The {what} of every layer, the mean over directions."
                )
        page.section("How near layers are")
        page.figure(
            alignment_figure(self.cka),
            "Linear CKA of the mean token after each layer of the student and each block of the teacher, on texts for "
            "validation; 1 where one is the other turned and scaled.",
        )
        return page


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
