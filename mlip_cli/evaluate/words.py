"""Numbers and names as tables and pages write them; no torch."""

READINGS = {"feature": "feature", "tokens": "tokens", "frequency_tokens": "frequency tokens"}
"""How pointing reads a picture's patches: projected like the image feature, or by a token head of either domain."""


def percent(share: float | None) -> str | None:
    """0.316 -> 31.6"""
    return None if share is None else f"{100 * share:.1f}"


def per_second(tflops: float) -> str:
    """Teraflops a second: 0.0512 -> 51.2 GFLOP/s, 512.3 -> 512 TFLOP/s"""
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s"
