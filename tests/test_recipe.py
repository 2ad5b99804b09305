"""What a request comes to before any model is opened."""

import pytest

from edgesd.errors import RequestError
from edgesd.recipe import make_recipe


@pytest.mark.parametrize(
    ("profile", "precision", "prune"),
    [(None, None, None), ("quality", None, None), ("balanced", "int8", None), ("small", "int8", 0.25)],
)
def test_a_profile_sets_precision_and_pruning_together(profile, precision, prune):
    made = make_recipe(target="openvino", profile=profile)
    assert (made.precision, made.prune) == (precision, prune)


def test_single_fields_win_over_the_profile():
    made = make_recipe(target="openvino", profile="small", prune=0.4, precision="w8")
    assert (made.precision, made.prune) == ("w8", 0.4)


def test_a_profile_that_is_none_is_told_with_those_there_are():
    with pytest.raises(RequestError, match=r"profile = 'tiny'.*'quality', 'balanced' or 'small'"):
        make_recipe(target="openvino", profile="tiny")
