"""Fixtures of the loader's tests."""

import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


@pytest.fixture
def impatient(monkeypatch):
    """Seconds between looks at the workers: 5, fixed when torch is imported."""
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.5,))
