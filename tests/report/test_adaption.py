"""The page of an adaptation says what was measured, and its figures show it."""

from dataclasses import replace

import pytest

from transmamba.errors import InputError
from transmamba.report import AdaptionReport, alignment_figure, confusion_figure, layers_over_time

REPORT = AdaptionReport(
    name="adapt",
    teacher="deit",
    student="vim_tiny",
    method="adaption",
    source="pictures",
    num_training_images=1234,
    num_parameters=7_000_000,
    share_from_teacher=0.5,
    classes=("cat", "dog", "<owl>"),
    student_scores=(0.625, 1.0, 0.9),
    teacher_scores=(0.7, 1.0, 0.8),
    num_images=8,
    confusion=((2, 1, 0), (0, 2, 0), (0, 2, 1)),
    cka=((0.1, 0.2), (0.3, 0.4), (0.5, 0.6)),
    steps=(1, 2),
    losses=(3.0, 2.0),
    layer_weights=((1.0, 1.1), (1.0, 0.9)),
    layer_cosines=((0.1, 0.2), (0.2, 0.3)),
    accuracy=((2, 0.625),),
)


def text_of(report: AdaptionReport) -> str:
    return report.page().render().replace("&nbsp;", " ")


def test_the_page_says_what_was_measured() -> None:
    text = text_of(REPORT)
    assert "The student names 62.5 % of 8 images right, its teacher 70.0 %: 7.5 points less." in text
    assert "7 M parameters, 50.0 % of which began as the teacher&#x27;s; 1,234 images for training." in text
    assert "<td>&lt;owl&gt;</td><td>dog</td>" in text  # two of three owls are taken for dogs: first in the table
    assert text.index("&lt;owl&gt;</td><td>dog") < text.index("cat</td><td>dog")
    assert text.count("<figure>") == 5
    assert "skipped" not in text


def test_what_is_absent_is_left_out() -> None:
    bare = replace(
        REPORT,
        layer_weights=(),
        layer_cosines=(),
        accuracy=(),
        steps=(),
        losses=(),
        confusion=((3, 0, 0), (0, 3, 0), (0, 0, 2)),
    )
    text = text_of(bare)
    assert text.count("<figure>") == 2
    assert "true class" not in text
    assert "2 files could not be read and were skipped, a.png first" in text_of(
        replace(REPORT, skipped=("a.png", "b.png"))
    )


def test_a_matrix_shows_shares_of_each_true_class() -> None:
    axes = confusion_figure(REPORT.confusion, REPORT.classes).axes[0]
    (image,) = axes.images
    assert image.get_array()[2].tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "<owl>"]
    empty = confusion_figure(((0, 0), (0, 1)), ("a", "b")).axes[0].images[0].get_array()
    assert empty[0].tolist() == [0, 0]  # a class without images


def test_many_classes_are_named_sparsely() -> None:
    classes = [f"class {number}" for number in range(100)]
    axes = confusion_figure([[0] * 100] * 100, classes).axes[0]
    assert 10 < len(axes.get_xticklabels()) <= 24


def test_layers_are_rows_and_lines() -> None:
    image = alignment_figure(REPORT.cka).axes[0].images[0]
    assert image.get_array().shape == (3, 2)
    lines = layers_over_time((1, 2), REPORT.layer_weights, "weight").axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 1.1], [1.0, 0.9]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="2 rows and there are 3 classes"):
        confusion_figure(REPORT.confusion[:2], REPORT.classes)
    with pytest.raises(InputError, match="no layers to compare"):
        alignment_figure(())
