"""Rows about speed: images/s of recipes as written and compiled, beside OpenCLIP's model, loss and optimiser."""

import os
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from benchmarks.bench_text import caption_lengths
from gpu.rows import Found, Scale
from gpu.trainings import EAGER, recipe_of, stepper_of, steps_of, web_batch

from mlip_cli.devices import autocast, pick_device, synchronize
from mlip_cli.files import GIB
from mlip_cli.model.blocks import Compiled
from mlip_cli.profiling.timing import Timing, measure_interleaved, peak_memory
from mlip_cli.train.micro_batches import largest_that_fits
from mlip_cli.train.step import Stepper

PEER = "OpenCLIP ViT-B-16"
MLIP, CLIP, CLIP_AS_WRITTEN = "cc12m", "baselines/clip", "baselines/clip, as written"
RECIPES: dict[str, tuple[str, ...]] = {
    MLIP: (MLIP,),
    CLIP: (CLIP,),
    "cc12m without merging": (MLIP, "model.merging=null"),
    "baselines/clip_tome": ("baselines/clip_tome",),
    "cc12m without stem and its losses": (
        MLIP,
        "model.frequency=null",
        "losses.frequency_global=null",
        "losses.frequency_words=null",
        "model.merging.method=tome",
    ),
    "baselines/clip, ViT-B/32": (CLIP, "model.vision.timm=vit_base_patch32_clip_224"),
}
"""Name -> shipped recipe and its changes, in the order of their worth."""
COMPILE_S = 45
"""About so long compiling one model takes."""
AT_LEAST_AS_WRITTEN, AT_LEAST_COMPILED = 1.1, 1.5


@dataclass
class Contestant:
    """A training of a few steps, for one batch size after the other."""

    at_size: Callable[[int], Callable[[], None]]
    """Batch size -> takes the steps."""
    stepper: Stepper | None = None
    run: Callable[[], None] = lambda: None
    """At the size that fits."""


def ours(name: str, scale: Scale, device: torch.device) -> Contestant:
    """A recipe of ours."""
    source, *changes = RECIPES[name]
    recipe = recipe_of(source, scale, EAGER, *changes)
    stepper = stepper_of(recipe, device)

    def at_size(size: int) -> Callable[[], None]:
        return steps_of(stepper, web_batch(recipe, device, batch_size=size), steps=scale.steps)

    return Contestant(at_size, stepper)


def peer(scale: Scale, device: torch.device) -> Contestant:
    """OpenCLIP's model with random weights, its loss, and fused AdamW with the settings of its trainer.

    As there, pictures are normalised in main memory and captions are padded to 77 tokens. Unlike there, both lie in
    pinned memory.
    """
    config = deepcopy(open_clip.get_model_config("ViT-B-16"))
    for section, changes in scale.peer.items():
        config[section] |= changes
    model = open_clip.CLIP(**config).to(device).train()
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2]
    others = [p for name, p in model.named_parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, fused=True)
    loss_of, side = open_clip.ClipLoss(), config["vision_cfg"]["image_size"]

    def at_size(size: int) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(size, 3, side, side, generator=generator)
        texts = torch.randint(1, config["text_cfg"]["vocab_size"] - 2, (size, 77), generator=generator)
        for row, length in zip(texts, caption_lengths(size), strict=True):
            row[length - 1], row[length:] = config["text_cfg"]["vocab_size"] - 1, 0
        if device.type == "cuda":
            images, texts = images.pin_memory(), texts.pin_memory()

        def run() -> None:
            for _ in range(scale.steps):
                on_device = [x.to(device, non_blocking=True) for x in (images, texts)]
                optimizer.zero_grad()
                with autocast(device, torch.bfloat16):
                    loss = loss_of(*model(*on_device))
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    model.logit_scale.clamp_(0, 4.6052)

        return run

    return Contestant(at_size)


def size_for_all(contestants: dict[str, Contestant], scale: Scale) -> int:
    """The batch size at which each of them runs; all are ready for it then, and warm."""

    def attempt(size: int) -> None:
        for own in contestants.values():
            own.run = lambda: None  # its batch of the size before may go
            own.run = own.at_size(size)
            own.run()

    return largest_that_fits(scale.batch_size, attempt)


def beyond_rest_gib(run: Callable[[], None], device: torch.device) -> float:
    """Peak of a step beyond what lies on the device already: weights and moments of all that are compared."""
    before = torch.cuda.memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    return peak_memory(run, device=device).gib - before


def raced(contestants: dict[str, Contestant], size: int, scale: Scale) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How often as fast as the first one each of them is, by name, and the lines of a table. They run in turn."""
    device = scale.device
    timings: dict[str, Timing] = measure_interleaved(
        {name: own.run for name, own in contestants.items()}, scale.rounds, device=device
    )
    lines = [
        {
            "what": name,
            "images/s": round(size * scale.steps / timing.median_s),
            "x first": round(timing.speedup, 3),
            "95 %": " to ".join(f"{end:.3f}" for end in timing.speedup_interval),
            "step GiB": round(beyond_rest_gib(contestants[name].run, device), 2),
        }
        for name, timing in timings.items()
    ]
    return {name: own.speedup for name, own in timings.items()}, lines


def as_written(scale: Scale) -> Found:
    """All recipes without compiling."""
    device = pick_device(scale.device_type)
    contestants = {PEER: peer(scale, device), **{name: ours(name, scale, device) for name in RECIPES}}
    size = size_for_all(contestants, scale)
    speedups, lines = raced(contestants, size, scale)
    return Found(
        f"batch {size}: CLIP {speedups[CLIP]:.2f}x OpenCLIP, MLIP {speedups[MLIP]:.2f}x",
        speeds={
            f"plain CLIP trains {AT_LEAST_AS_WRITTEN:g} times as fast as OpenCLIP or faster": speedups[CLIP]
            >= AT_LEAST_AS_WRITTEN,
            "MLIP at rate 0.5 trains faster than plain CLIP": speedups[MLIP] > speedups[CLIP],
        },
        figures={"batch_size": size, "x_open_clip": speedups},
        lines=lines,
    )


def compiled(scale: Scale) -> Found:
    """Recipes with compiled blocks, from a cache that is empty at first; those for which no time is left are named."""
    with TemporaryDirectory(prefix="mlip-gpu-") as cache, patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": cache}):
        return compiled_anew(scale)


def compiled_anew(scale: Scale) -> Found:
    """The row itself."""
    device = pick_device(scale.device_type)
    contestants = {CLIP_AS_WRITTEN: ours(CLIP, scale, device), PEER: peer(scale, device)}
    size, seconds, failures = size_for_all(contestants, scale), {}, {}
    for name in RECIPES:
        if seconds and (sum(seconds.values()) > scale.compile_s or scale.seconds_left < 2 * COMPILE_S):
            break
        contestant = ours(name, scale, device)
        assert contestant.stepper is not None
        model = contestant.stepper.training.plain
        blocks = Compiled(fixed=model.picture_blocks(), varying=model.text.blocks, backend=scale.compiler)
        contestant.run = contestant.at_size(size)
        start = time.perf_counter()
        contestant.run()
        synchronize(device)
        seconds[name] = round(time.perf_counter() - start, 1)
        contestants[name] = contestant
        if blocks.failure is not None:
            failures[name] = blocks.failure
    speedups, lines = raced(contestants, size, scale)
    lines = [line | {"compile s": seconds.get(line["what"])} for line in lines]
    ratio = speedups[MLIP]
    is_quick = ratio >= AT_LEAST_COMPILED
    return Found(
        f"batch {size}: MLIP {ratio:.2f}x plain CLIP as written, {ratio / speedups[PEER]:.2f}x OpenCLIP",
        statements={"all blocks were compiled": not failures},
        speeds={
            f"compiled MLIP at rate 0.5 trains {AT_LEAST_COMPILED:g} times as fast as plain CLIP as written": is_quick
        },
        figures={
            "batch_size": size,
            "x_clip_as_written": speedups,
            "x_open_clip": {name: own / speedups[PEER] for name, own in speedups.items()},
            "x_clip_compiled": {name: own / speedups[CLIP] for name, own in speedups.items() if CLIP in speedups},
            "compile_s": seconds,
            "failures": failures,
            "left_out": [name for name in RECIPES if name not in seconds],
        },
        lines=lines,
    )
