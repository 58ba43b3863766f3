"""The scheduler looks more often than it would."""

import pytest

from efficient_attn.sweeps import scheduler


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.02)
