"""Every law for every method."""

import pytest
from laws import ADAPTER_LAWS, MODEL_LAWS
from method_table import METHODS


def marked(law):
    """The law as a parameter, with the features of PEFT that it shows."""
    features = getattr(law, "features", ())
    return pytest.param(law, marks=[pytest.mark.peft_feature(name) for name in features], id=law.__name__)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("law", [marked(law) for law in ADAPTER_LAWS + MODEL_LAWS])
def test_law(law, method, request):
    if law.__name__ in method.exceptions:
        request.applymarker(pytest.mark.xfail(strict=True, reason=method.exceptions[law.__name__]))
    law(method)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_exceptions_name_laws(method):
    assert method.exceptions.keys() <= {law.__name__ for law in ADAPTER_LAWS + MODEL_LAWS}
