"""The names of classes in a configuration of transformers."""

import warnings
from types import SimpleNamespace

import pytest

from ipca.io.labels import class_names, name_classes

NAMES = {
    "named": ({1: "b", 0: "a"}, ("a", "b")),
    "made up": ({0: "LABEL_0", 1: "LABEL_1"}, ()),
    "made up, in another order": ({0: "LABEL_1", 1: "LABEL_0"}, ("LABEL_1", "LABEL_0")),
    "with a gap": ({0: "a", 2: "b"}, ()),
    "numbers": ({0: 5, 1: 6}, ("5", "6")),
    "a list": (["a", "b"], ()),
    "nothing": (None, ()),
}


@pytest.mark.parametrize(("known", "right"), NAMES.values(), ids=NAMES)
def test_the_names_are_read_where_there_are_any(known, right):
    assert class_names(SimpleNamespace(id2label=known)) == right
    assert class_names(None) == class_names({}) == ()


GIVEN = {
    "none": ({0: "LABEL_0", 1: "LABEL_1"}, ("b", "a"), {0: "b", 1: "a"}, 0),
    "the same": ({0: "b", 1: "a"}, ("b", "a"), {0: "b", 1: "a"}, 0),
    "in other case": ({0: "B", 1: "A"}, ("b", "a"), {0: "b", 1: "a"}, 0),
    "in another order": ({0: "a", 1: "b"}, ("b", "a"), {0: "b", 1: "a"}, 1),
    "others": ({0: "x", 1: "y"}, ("b", "a"), {0: "b", 1: "a"}, 1),
    "of another number": ({0: "x"}, ("b", "a"), {0: "x"}, 0),
    "nothing to give": ({0: "x"}, (), {0: "x"}, 0),
}


@pytest.mark.parametrize(("here", "labels", "right", "warned"), GIVEN.values(), ids=GIVEN)
def test_names_are_given_to_a_model(here, labels, right, warned):
    model = SimpleNamespace(config=SimpleNamespace(id2label=here))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        name_classes(model, labels, stacklevel=1)
        name_classes(SimpleNamespace(), labels, stacklevel=1)
    assert model.config.id2label == right
    assert [str(each.message).startswith("model.config.id2label had ") for each in seen] == [True] * warned
    assert all(each.filename == __file__ for each in seen)
