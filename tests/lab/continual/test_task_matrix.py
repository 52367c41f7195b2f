"""Scores of a task sequence, by hand."""

import math

import numpy as np
import pytest

from ipca.lab.continual import TaskMatrix

NAN = math.nan
R = [[0.9, 0.2, 0.3], [0.95, 0.8, 0.4], [0.6, 0.7, 0.85]]


def test_three_tasks_by_hand():
    matrix = TaskMatrix(R, initial=[0.5, 0.1, 0.1])
    assert matrix.acc == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert matrix.bwt == pytest.approx(((0.6 - 0.9) + (0.7 - 0.8)) / 2)
    assert matrix.forgetting == pytest.approx(((0.95 - 0.6) + (0.8 - 0.7)) / 2)  # the best, not the first
    assert matrix.fwt == pytest.approx(((0.2 - 0.1) + (0.4 - 0.1)) / 2)
    assert isinstance(matrix.acc, float)


def test_scores_from_before_a_task_was_trained_do_not_count_as_its_best():
    assert TaskMatrix([[0.9, 0.99], [0.9, 0.5]]).forgetting == 0
    assert TaskMatrix([[0.9, 0.0, 0], [0.9, 0.5, 0], [0.9, 0.7, 0.5]]).forgetting == pytest.approx(-0.1)


def test_scores_above_the_diagonal_may_be_missing():
    matrix = TaskMatrix([[0.9, NAN, NAN], [0.95, 0.8, NAN], [0.6, 0.7, 0.85]], initial=[0.5, 0.1, 0.1])
    whole = TaskMatrix(R)
    assert (matrix.acc, matrix.bwt, matrix.forgetting) == (whole.acc, whole.bwt, whole.forgetting)
    assert math.isnan(matrix.fwt)


def test_of_one_task_only_the_accuracy_is_defined():
    matrix = TaskMatrix([[0.75]], initial=[0.5])
    assert matrix.acc == 0.75
    assert all(map(math.isnan, (matrix.bwt, matrix.forgetting, matrix.fwt)))


def test_forward_transfer_needs_scores_from_before_training():
    with pytest.raises(ValueError, match="forward transfer needs the scores before any training; pass initial"):
        _ = TaskMatrix(R).fwt


def test_the_matrix_keeps_its_own_scores():
    scores = np.array(R)
    matrix = TaskMatrix(scores)
    scores[:] = 0
    assert matrix.R[2, 2] == 0.85


@pytest.mark.parametrize("options", [{}, {"initial": [1 / 3, 0.1, 0.1], "names": ["digits, even", "a", 'the "b"']}])
def test_a_table_reads_back_to_the_bit(tmp_path, options):
    matrix = TaskMatrix([[0.1 + 0.2, NAN, NAN], [2 / 3, 0.8, NAN], [0.6, 0.7, 1e-17]], **options)
    matrix.to_csv(tmp_path / "r.csv")
    again = TaskMatrix.from_csv(tmp_path / "r.csv")
    assert again.names == matrix.names
    np.testing.assert_array_equal(again.R, matrix.R)
    np.testing.assert_array_equal(again.initial is None, matrix.initial is None)
    assert again.initial is None or (again.initial == matrix.initial).all()


def test_the_file_is_a_plain_table(tmp_path):
    TaskMatrix([[0.5, NAN], [0.25, 1]], initial=[0, 0.125], names=["a", "b"]).to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text() == "after,a,b\n(before),0.0,0.125\na,0.5,\nb,0.25,1.0\n"


def test_the_printed_table():
    shown = str(TaskMatrix([[0.5, NAN], [0.25, 1]], initial=[0, 0.125], names=["a", "letters"]))
    assert shown.splitlines() == [
        "after           a  letters",
        "(before)    0.000    0.125",
        "a           0.500        –",
        "letters     0.250    1.000",
        "ACC 0.625   BWT -0.250   FM 0.250   FWT –",
    ]
    assert "FWT" not in str(TaskMatrix(R))
    assert str(TaskMatrix([[0.5]], names=[7])).splitlines()[1] == "7           0.500"


@pytest.mark.parametrize(
    ("scores", "options", "words"),
    [
        ([[1, 2, 3], [1, 2, 3]], {}, r"R must be \(T, T\), .* got \(2, 3\)"),
        ([], {}, r"got \(0,\)"),
        ([[1], [1, 2]], {}, r"R must be \(T, T\), numbers in rows of one length"),
        ([[0.9, 0.1], [NAN, 0.8]], {}, r"R\[1, 0\] is nan; scores on already trained tasks must be finite"),
        ([[0.9, 0.1], [0.5, math.inf]], {}, r"R\[1, 1\] is inf"),
        (R, {"initial": [0.1, 0.2]}, "initial must hold 3 finite scores"),
        (R, {"initial": [0.1, 0.2, NAN]}, "initial must hold 3 finite scores"),
        (R, {"names": ["a", "b"]}, "names must be 3 distinct names, .* got a, b"),
        (R, {"names": ["a", "b", "a"]}, "names must be 3 distinct names"),
        (R, {"names": ["a", "b", "after"]}, "other than 'after'"),
    ],
)
def test_what_is_no_matrix_of_scores_is_refused(scores, options, words):
    with pytest.raises(ValueError, match=words):
        TaskMatrix(scores, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a header 'after, task, …'"),
        ("task,a\na,0.5\n", "got the header task, a and 1 rows"),
        ("after,a,b\na,0.5,\n", "got the header after, a, b and 1 rows"),
        ("after,a\na,high\n", "could not convert string to float: 'high'"),
        ("after,a\na,\n", r"R\[0, 0\] is nan"),
        ("after,a,b\nb,0.5,0.6\na,0.5,\n", "the rows must be those after a, b, in the order .* got b, a"),
        ("after,a\na,0.5\n\n", "the rows must be those after a, .* got a, "),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "other.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        TaskMatrix.from_csv(path)
    assert str(path) in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is not a folder"):
        TaskMatrix(R).to_csv(tmp_path / "file" / "r.csv")
