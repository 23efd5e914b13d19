"""Every law for every method."""

import pytest
from laws import ADAPTER_LAWS, MODEL_LAWS
from method_table import METHODS


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
@pytest.mark.parametrize("law", ADAPTER_LAWS + MODEL_LAWS, ids=lambda law: law.__name__)
def test_law(law, method):
    law(method)
