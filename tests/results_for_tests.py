"""Results with made-up numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlip_cli.evaluate.results import SweepResult, ZeroshotResult
from mlip_cli.evaluate.retrieval_results import RetrievalResult

INTERVAL = (0.3101, 0.3838)


def scores(*names: str) -> dict[str, Any]:
    """34.4 (31.0-38.4) by each name."""
    return {key: value for name in names for key, value in ((name, 0.3437), (f"{name}_interval", INTERVAL))}


def recalls(*at: int) -> dict[str, Any]:
    """Recall at each k, of 383 candidates."""
    chances = {f"r{k}_chance": 0.0131 for k in at}
    return {"n": 383, "num_candidates": 383, **scores(*(f"r{k}" for k in at)), **chances}


def zeroshot_result(
    *, dataset: str = "digits", rate: float = 0.0, features: bool = False, **more: Any
) -> ZeroshotResult:
    """A result; `features` adds those of a frequency branch."""
    own = {"per_class": [], **scores("acc1", "acc5", "mean_per_class_recall")}
    own |= {key: more[key] for key in ("names", "pictures", "per_class") if key in more}
    value = {
        "protocol": 1,
        "dataset": dataset,
        "data_fingerprint": "f",
        "checkpoint": "step_0000240",
        "checkpoint_sha256": "",
        "merge_rate": rate,
        "batch_size": 64,
        "device": "cpu",
        "step": 240,
        "true_merge_rate": rate,
        "merge_method": None,
        "tokens": [16],
        "image_size": 32,
        "device_type": "cpu",
        "measured_at": str(rate),
        "n": 50_000,
        "num_classes": 10,
        "num_classes_seen": 10,
        "chance": 0.1,
        "majority_share": 0.1,
        "right": {},
        "predicted": "",
        "images_per_s": 12345.6,
        "timed_batches": 3,
        **own,
    }
    branch = {"frequency": own, "spatial_plus_frequency": own} if features else {}
    return ZeroshotResult.from_json({"kind": "zeroshot", **value, **branch, **more})


def retrieval_result(**more: Any) -> RetrievalResult:
    """A result on two pictures with ten captions each."""
    shared: dict[str, Any] = {
        **dict.fromkeys(("protocol", "batch_size", "step", "image_size", "true_merge_rate", "merge_rate"), 1),
        **dict.fromkeys(
            ("dataset", "data_fingerprint", "checkpoint", "checkpoint_sha256", "device", "device_type"), ""
        ),
        "kind": "retrieval",
        "merge_method": None,
        "tokens": [],
        "n": 2,
        "num_texts": 20,
        "right": {},
        "median_rank": {"image_to_text": 1, "text_to_image": 2},
        **dict.fromkeys(("image_to_text", "text_to_image"), recalls(1, 5, 10)),
        "picture_of_text": " ".join("0" * 10 + "1" * 10),
    }
    return RetrievalResult.from_json(shared | more)


def sweep_result(intervals: Mapping[str | None, tuple[float, float]], *, tokens: Sequence[int] = (4,)) -> SweepResult:
    """A sweep of one rate by each method, with the intervals of the speed-ups, on two data sets."""
    test = {"difference": 0.0, "won": 1234, "lost": 1187, "p": 0.0000123}
    ways = ("image_to_text", "text_to_image")
    settings = [{"method": method, "rate": 0.5, "true_rate": 0.516} for method in intervals]
    timed = {
        "tokens_per_block": tokens,
        "gflops": 17.58,
        "speedup": 1.52,
        "expected_speedup": 1.47,
        "images_per_s": 12345.6,
        "measured_over_expected": 1.0,
        "seconds": [1.0],
        "peak_memory": {"gib": 1.0, "measured": "tensors on the GPU"},
    }
    classified = {
        **scores("acc1", "mean_per_class_recall", "acc5"),
        "per_class": [],
        "names": recalls(1, 5),
        "agreement": 0.98,
        "paired": {"acc1": test},
        "num_classes_seen": 9,
    }
    retrieved = {**{way: recalls(1, 5, 10) for way in ways}, "paired": {f"{way}_r5": test for way in ways}}
    shared = {"fingerprint": "f", "n": 383}
    classes = {"num_classes": 9, "chance": 0.111, "majority_share": 0.2}
    datasets = [
        {
            "dataset": "openmoji",
            "task": "zeroshot",
            **shared,
            **classes,
            "points": [own | classified for own in settings],
        },
        {
            "dataset": "validation",
            "task": "retrieval",
            **shared,
            "num_texts": 2312,
            "points": [own | retrieved for own in settings],
        },
    ]
    return SweepResult.from_json(
        {
            "kind": "merge_sweep",
            "step": 8,
            "run": "a",
            "checkpoint": "step_0000008",
            "image_size": 32,
            "device": "cuda",
            "device_name": "NVIDIA H200",
            "threads": 8,
            "torch": "2.15.0+cu132",
            "batch_size": 64,
            "rounds": 3,
            "points": [
                own | timed | {"speedup_interval": interval}
                for own, interval in zip(settings, intervals.values(), strict=True)
            ],
            "datasets": datasets,
        }
    )
