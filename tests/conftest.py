"""What holds for every test: a generated case may take as long as a busy machine makes it take."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("no-deadline", settings.default, deadline=None)  # derandomised on a CI
settings.load_profile("no-deadline")
