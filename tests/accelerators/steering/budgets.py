"""Budgets that hypothesis draws: any of the four limits, each from far too little to more than enough."""

from __future__ import annotations

from hypothesis import strategies as st

limits = st.fixed_dictionaries(
    {},
    optional={
        "particle_steps": st.integers(1, 300),
        "denoiser_rows": st.integers(1, 600),
        "decodes": st.integers(1, 80),
        "verifier_rows": st.integers(1, 160),
    },
)
