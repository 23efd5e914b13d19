"""Every law for every method."""

import pytest
from laws import ADAPTER_LAWS, MODEL_LAWS
from method_table import METHODS


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("law", ADAPTER_LAWS + MODEL_LAWS, ids=lambda law: law.__name__)
def test_law(law, method, request):
    if law.__name__ in method.exceptions:
        request.applymarker(pytest.mark.xfail(strict=True, reason=method.exceptions[law.__name__]))
    law(method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_exceptions_name_laws(method):
    assert method.exceptions.keys() <= {law.__name__ for law in ADAPTER_LAWS + MODEL_LAWS}
