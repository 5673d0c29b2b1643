"""Numbers in the text of the pages that look measured and are not: by page and by what they are, with words around."""

from __future__ import annotations

_SETTINGS = "how an experiment is made"
_CONSTANTS = "constants of the package, or defaults of an option"
_HELD = "held by a test"

OTHER_NUMBERS: dict[str, dict[str, list[str]]] = {
    "docs/checking-a-model.md": {
        "constants of curveball_fused/guard.py": [
            "a relative 3e-8 in float64, 7e-4 in float32, 0.06 in float16, 0.18 in bfloat16; on a GPU 6e-3 where",
            "and 0.03 where matrix products may",
        ],
        f"{_HELD}: tests/debug/": ["A formula that is 1 % off"],
    },
    "docs/data-parallel.md": {_CONSTANTS: ["buckets of 25 MiB"]},
    "docs/evidence-accuracy.md": {
        _SETTINGS: [
            "sin(10 x) / 10 x at",
            "sin 30x,",
            "u_t - 0.1 u_xx",
            "rates of 0.01, 0.003 and 0.001,",
            "algorithm 3.16, which begins at 1e-3 of",
            "more than 500 MB:",
        ]
    },
    "docs/evidence-contest.md": {
        _SETTINGS: [
            "did not reach within 1.5,",
            "rates of 1e-4 to 0.03 and 1e-3 to 1, 1 - β₁ of 0.02 to 0.5, 1 - β₂ of 1e-3 to 0.2, 1 - momentum of 0.005 "
            "to 0.3, weight decays of 1e-3 to 1 and 1e-7 to 1e-3)",
            "those that take 1.45 times the budget's time",
            "taken 40 times in a run",
            "AdamW's 0.001",
        ]
    },
    "docs/evidence-networks.md": {_SETTINGS: ["SGD with momentum 0.9", "*Dropout*: 0.3"]},
    "docs/evidence-robustness.md": {
        _SETTINGS: ["or normal with 0.02, times 0.5, 1 or 2", "set to 0.01 to 100 times its default"]
    },
    "docs/evidence.md": {
        _SETTINGS: [
            "a Newton step below 1e-10 of",
            "drawn from U[-0.5, 0]",
            "fall evenly from 1 to 1e-5.",
            "is below 1e-4 before its step",
            "rates 0.1, 0.05, 0.01, ..., 5e-5; momentum 0.9, 0.95, 0.99; Adam's β₁ 0.9, 0.99 and β₂ 0.99, 0.999.",
            "It begins at 0.1.",
        ]
    },
    "docs/install.md": {
        "versions": [
            "| 13.x | 2.11 and later: +cu130, +cu132 | `cu130` | 8.x, 9.0, 10.x, 12.x;",
            "| 12.8 | 2.11: +cu128 | `cu128` | 8.x, 9.0, 10.x, 12.x;",
            "| 12.6 | 2.11 and later: +cu126 | `cu126` | 8.x, 9.0;",
        ]
    },
    "docs/method.md": {
        "counted: five float32 numbers": ["20 bytes a parameter"],
        f"{_HELD}: tests/optimizer/test_oracle.py": ["to 1e-9"],
    },
    "docs/monitoring.md": {_CONSTANTS: ["ten or more, and 5 %", "below 0.1 in all groups, or below 0.5 with ρ"]},
    "docs/options.md": {
        _CONSTANTS: ["| 0 | 0.5 |", "| 0.999 | 0.99 |"],
        "settings of AdamW": ["what AdamW calls 0.1 at a rate of 0.001", "A 0.01 that was copied from AdamW"],
    },
    "docs/performance.md": {
        _SETTINGS: [
            "Adam at rates of 0.03, 0.01, 0.003 and 0.001 and SGD with momentum at 0.1 and 0.03",
            "brings Adam from a rate of 0.03.",
        ]
    },
}
