"""`python -m curveball_fused`: what was built, what was chosen, and why."""

from .backends import build_info

for key, value in build_info().items():
    print(f"{key:>24}: {value}")
