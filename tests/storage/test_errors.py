import pickle

import pytest

import dagflow_storage
from dagflow_storage import DagflowError, PermanentError, TransientError
from dagflow_storage import errors as errors_module


def every_subclass(base: type[DagflowError]) -> list[type[DagflowError]]:
    return [base, *(found for sub in base.__subclasses__() for found in every_subclass(sub))]


@pytest.mark.parametrize("error_type", every_subclass(DagflowError))
def test_every_error_survives_pickling(error_type: type[DagflowError]) -> None:
    back = pickle.loads(pickle.dumps(error_type("what was wanted and found")))
    assert type(back) is error_type
    assert str(back) == "what was wanted and found"
    assert str(pickle.loads(pickle.dumps(error_type()))) == ""


@pytest.mark.parametrize("error_type", every_subclass(DagflowError)[1:])
def test_every_error_says_retry_or_stop(error_type: type[DagflowError]) -> None:
    assert issubclass(error_type, TransientError) != issubclass(error_type, PermanentError)


def test_the_docstring_draws_every_error() -> None:
    assert errors_module.__doc__ is not None
    for error_type in every_subclass(DagflowError):
        if error_type.__module__ == errors_module.__name__:
            assert error_type.__name__ in errors_module.__doc__


def test_all_names_are_there_and_sorted_by_kind() -> None:
    for name in dagflow_storage.__all__:
        assert hasattr(dagflow_storage, name)
    assert len(set(dagflow_storage.__all__)) == len(dagflow_storage.__all__)
