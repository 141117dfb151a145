"""How many kernels a forward pass starts on a GPU, on tensors without storage: small batches wait for the starts."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_cuda_for_tests import CUDA, autocast_rules_of_cuda, move_without_storage
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.load import load_recipe
from mlip_cli.train.noise import noise_batch
from mlip_cli.types import Batch

RECIPES = Path(__file__).parent.parent / "recipes"
NO_KERNEL = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split", "split_with_sizes"),
    *("squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "device", "promote_types"),
}
"""Views, storage, and questions about a tensor."""


class Kernels(TorchDispatchMode):
    """Counts operations that start a kernel, each as one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class FusedAttention(TorchFunctionMode):
    """Takes the kernels that CUDA takes: without a device torch would write attention out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in args[:3])
        mask = kwargs.get("attn_mask")
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, kwargs.get("is_causal", False))[0]
        mask = mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]


def kernels_of_a_forward_pass(model: CLIP, batch: Batch) -> Counter[str]:
    set_fused_attention(model, True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        move_without_storage(model)
        images, token_ids = (
            torch.empty(given.shape, dtype=given.dtype, device=CUDA) for given in (batch.images, batch.token_ids)
        )
        word_ids = torch.empty(90, dtype=torch.int64, device=CUDA)
        on_gpu = Batch(images, token_ids, batch.keys, word_ids=word_ids)
        with autocast_rules_of_cuda(), FusedAttention(), Kernels() as kernels:
            model(on_gpu, model.training_plan)
    return kernels.found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("cc12m.yaml", 850), ("baselines/clip.yaml", 530)])
def test_a_forward_pass_starts_few_kernels(name: str, most: int) -> None:
    """Of both, 190 and more are casts of weights to bf16, one kernel each in autocast."""
    recipe = load_recipe(str(RECIPES / name)).recipe
    batch = noise_batch(recipe, batch_size=2, num_tokens=77, device=torch.device("cpu"))
    found = kernels_of_a_forward_pass(build_model(recipe).train(), batch)
    assert found["_scaled_dot_product_flash_attention"] >= 12  # of the text tower
    assert found.total() <= most, found.most_common(12)
