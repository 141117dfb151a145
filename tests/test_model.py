"""The towers against timm and open_clip, the frequency branch against direct convolution."""

from functools import partial

import open_clip
import pytest
import timm
import torch
from models_for_tests import small_batch, small_model, small_recipe
from reference_for_tests import block_dct
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from mlip_cli.errors import UsageError
from mlip_cli.model import clip, merge_pass
from mlip_cli.model.frequency import local_kernel
from mlip_cli.model.merging import frequency_guidance, patch_dct
from mlip_cli.model.text import TextTower, end_of_text, pool_text, word_mask
from mlip_cli.model.vision import ImageTower, ObservedBlock
from mlip_cli.recipe.config import Text, Vision
from mlip_cli.recipe.merge_plan import MergePlan


@pytest.mark.parametrize("training", [False, True])
def test_without_branch_and_at_rate_0_the_tower_is_timm_bit_for_bit(training: bool) -> None:
    model = small_model(small_recipe(mlip=False), dtype=torch.float32)
    torch.manual_seed(1)
    plain = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    plain.load_state_dict(model.vision.trunk.state_dict())
    model.train(training), plain.train(training)
    images = torch.randn(4, 3, 32, 32)
    tower = model.vision(images, model.merge_plan(0.0))
    assert torch.equal(tower.pooled, plain(images))
    assert torch.equal(tower.tokens, plain.forward_features(images)[:, 1:])
    assert torch.equal(model.encode_image(images, model.plan), model.image_projection(plain(images)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("vit_tiny_patch16_224", ObservedBlock),
        ("deit_tiny_distilled_patch16_224", ObservedBlock),
        ("vit_tiny_r_s16_p8_224", ObservedBlock),
        ("vit_small_patch16_18x2_224", None),
    ],
)
def test_named_timm_towers_merge_and_equal_timm_at_rate_0(name: str, block: type | None) -> None:
    size = 64
    if name == "vit_small_patch16_18x2_224":
        size = 32
    torch.manual_seed(0)
    tower = ImageTower(Vision(timm=name), image_size=size).eval()
    plain = timm.create_model(name, pretrained=False, num_classes=0, img_size=size).eval()
    plain.load_state_dict(tower.trunk.state_dict())
    if block is not None:
        assert all(type(b) is block for b in tower.trunk.blocks)
    images = torch.randn(2, 3, size, size)
    recipe = small_recipe(mlip=False, data={"image_size": size}, model={"vision": {"timm": name}})
    with torch.no_grad():
        model = small_model(recipe, dtype=torch.float32).eval()
        at_zero = tower(images, model.merge_plan(0.0))
        assert torch.equal(at_zero.pooled, plain.forward_head(plain.forward_features(images), pre_logits=True))
        merged = model.vision(images, model.merge_plan(0.5))
    assert merged.tokens.shape[1] == model.merge_plan(0.5).tokens[-1] < model.vision.num_patches
    assert (merged.sizes.sum(1) == model.vision.num_patches).all()


@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
def test_pooling_after_a_merge_counts_every_patch_once(pool: str) -> None:
    """Identical patches merge into tokens that stand for several; a size-weighted pool cannot tell."""
    torch.manual_seed(0)
    tower = ImageTower(Vision(patch_size=8, width=32, depth=3, num_heads=2), image_size=32).double()
    tower.trunk = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0, global_pool=pool,
        class_token=False, pos_embed="none", block_fn=ObservedBlock,
    ).double()  # fmt: skip
    tower.num_prefix = 0
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    other = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    images = torch.cat([torch.cat([image] * 4, 3)] * 3 + [torch.cat([other] * 4, 3)], 2)
    tower_of_16 = partial(MergePlan.resolve, depth=3, num_patches=16, method="tome")
    plan = tower_of_16(rate=0.5, at=(2,))
    whole = tower(images, tower_of_16(rate=0.0, at=None))
    merged = tower(images, plan)
    assert merged.tokens.shape[1] == 8
    torch.testing.assert_close(merged.pooled, whole.pooled, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [None, "vit_tiny_patch16_224"], ids=["sizes", "name"])
def test_mean_pooling_is_the_mean_of_the_normalised_patch_tokens_by_size(name: str | None) -> None:
    if name is None:
        vision = Vision(patch_size=8, width=32, depth=4, num_heads=2, pool="mean")
    else:
        vision = Vision(timm=name, pool="mean")
    size = 32 if name is None else 64
    torch.manual_seed(0)
    tower = ImageTower(vision, image_size=size).double().eval()
    assert (tower.trunk.cls_token is None) is (name is None)  # weights for a tower by name come with one
    plan = partial(MergePlan.resolve, depth=tower.depth, num_patches=tower.num_patches, at=(2, 3), method="guided")
    for rate in (0.0, 0.5):
        output = tower(torch.randn(2, 3, size, size).double(), plan(rate=rate))
        assert output.tokens.shape[1] == plan(rate=rate).tokens[-1]
        mean = (output.tokens * output.sizes[..., None]).sum(1) / tower.num_patches
        torch.testing.assert_close(output.pooled, mean, rtol=1e-12, atol=1e-12)
        assert output.tokens.mean(-1).abs().max() < 1e-9  # behind the last norm, whose bias starts at 0


@pytest.mark.slow
def test_towers_that_cannot_be_used_are_refused_by_name() -> None:
    with pytest.raises(UsageError) as caught:
        ImageTower(Vision(timm="beit_base_patch16_224"), image_size=224)
    with pytest.raises(UsageError, match=r"augreg_in21k names trained weights, which mlip does not download; write vi"):
        ImageTower(Vision(timm="vit_tiny_patch16_224.augreg_in21k"), image_size=224)
    assert str(caught.value) == (
        "model.vision.timm: beit_base_patch16_224 is a Beit; use a VisionTransformer or its distilled form, "
        "such as vit_base_patch16_224"
    )
    with pytest.raises(
        UsageError, match="timm has no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_224"
    ):
        ImageTower(Vision(timm="vit_smal_patch16_224"), image_size=224)
    with pytest.raises(
        UsageError, match=r"data\.image_size: 100 is not a multiple of the patch size 16 of vit_tiny_patch16_224"
    ):
        ImageTower(Vision(timm="vit_tiny_patch16_224"), image_size=100)


def test_the_text_tower_equals_open_clips() -> None:
    torch.manual_seed(0)
    theirs = open_clip.transformer.TextTransformer(context_length=77, width=32, heads=2, layers=3, output_dim=16).eval()
    nn.init.normal_(theirs.positional_embedding, std=0.01)
    ours = TextTower(Text(width=32, depth=3, num_heads=2, context_length=77)).eval()
    ours.token_embedding = theirs.token_embedding
    ours.positional_embedding = theirs.positional_embedding
    ours.norm.load_state_dict(theirs.ln_final.state_dict())
    for mine, block in zip(ours.blocks, theirs.transformer.resblocks, strict=True):
        names = {"norm1": block.ln_1, "norm2": block.ln_2, "mlp.fc1": block.mlp.c_fc, "mlp.fc2": block.mlp.c_proj}
        names["attn.proj"] = block.attn.out_proj
        state = {f"{name}.{k}": v for name, module in names.items() for k, v in module.state_dict().items()}
        state |= {"attn.qkv.weight": block.attn.in_proj_weight, "attn.qkv.bias": block.attn.in_proj_bias}
        mine.load_state_dict(state)
    ids = open_clip.get_tokenizer("ViT-B-32")(["a dog", "red balloon with a long string", "!!! wow !"])
    with torch.no_grad():
        expected = nn.functional.normalize(theirs(ids), dim=-1)
        for length in (77, 16):
            cut = ids[:, :length]
            found = nn.functional.normalize(pool_text(ours(cut), cut) @ theirs.text_projection, dim=-1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_true_text_length_equals_full_padding() -> None:
    model = small_model()
    short = small_batch(length=8).token_ids
    full = nn.functional.pad(short, (0, 8))
    torch.testing.assert_close(model.encode_text(short), model.encode_text(full), rtol=1e-12, atol=1e-12)
    assert torch.equal(end_of_text(short), end_of_text(full))


def test_word_mask_keeps_first_real_words_and_knows_padding_by_place() -> None:
    ids = torch.tensor([[49406, 5, 0, 5, 7, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0, 0, 0]])
    assert word_mask(ids).int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [0] * 8]


def test_initial_kernels_are_local_around_the_seam() -> None:
    kernel = local_kernel(8, 8, 2000)
    assert kernel.shape == (8, 8, 2000)
    energy = kernel.square().sum(-1)
    assert energy[0, 0] > 0.3 * energy.sum()
    assert energy[4, 4] < 1e-5 * energy.sum()
    torch.testing.assert_close(energy[1, 0], energy[7, 0], rtol=0.2, atol=0)


@pytest.mark.parametrize("kind", ["tokens", "dct", None])
def test_the_branch_runs_under_bf16_autocast_and_reads_its_input(kind: str | None) -> None:
    chosen = {"input": kind} if kind else {}
    recipe = small_recipe(model={"frequency": {"placement": "branch", "width": 32, "depth": 1, **chosen}})
    model, images = small_model(recipe, dtype=torch.float32).eval(), small_batch(2).images

    def features() -> torch.Tensor:
        found = model.image_features(images, model.merge_plan(0.0)).frequency
        assert found is not None
        return found

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert features().isfinite().all()
        before = features()
        model.vision.trunk.pos_embed.add_(torch.randn_like(model.vision.trunk.pos_embed))  # pixels stay, tokens do not
        assert torch.equal(features(), before) == (kind != "tokens")


@pytest.mark.parametrize("guidance", ["mixed", "frequency"])
def test_the_branch_and_guidance_share_one_spectrum(guidance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance from it is that of the grey picture, and so is every feature, whoever asks for it."""
    recipe = small_recipe(model={"merging": {"rate": 0.5, "at": [2, 3], "guidance": guidance}})
    model, images = small_model(recipe).eval(), small_batch().images
    grey = block_dct(model.normalize(images).mean(1, keepdim=True), 8)
    torch.testing.assert_close(block_dct(model.normalize(images), 8).mean(2, keepdim=True), grey, rtol=0, atol=1e-6)
    made: list[int] = []
    for module in (clip, merge_pass):
        monkeypatch.setattr(module, "patch_dct", lambda *given: made.append(0) or patch_dct(*given))
    with torch.no_grad():
        features = model.image_features(images, model.plan)
        assert len(made) == 1
        assert torch.equal(model.encode_image(images, model.plan), features.spatial)
        [first, _] = model.merge_stages(images, model.plan)
        torch.testing.assert_close(first.frequency, frequency_guidance(grey), rtol=0, atol=1e-6)
        made.clear()
        model.encode_image(images, model.merge_plan(0.0))
        assert made == []


def test_heads_exist_only_where_a_loss_trains_them() -> None:
    plain = small_model(small_recipe(mlip=False))
    assert plain.frequency is None
    assert list(plain.token_projections) == []
    assert list(plain.log_scales) == ["spatial_global"]
    for recipe in (small_recipe(), small_recipe(mlip=False)):
        model = small_model(recipe)
        encoded = model(small_batch(), model.training_plan)
        outputs = [v for v in vars(encoded).values() if torch.is_tensor(v) and v.requires_grad]
        (sum(v.sum() for v in outputs) + sum(v.sum() for v in encoded.scales.values())).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_pixels_are_normalised_inside_and_floats_taken_as_normalised() -> None:
    model, images = small_model(), small_batch().images
    data = small_recipe().data
    mean, std = (torch.tensor(numbers).double()[:, None, None] for numbers in (data.pixel_mean, data.pixel_std))
    floats = (images / 255.0 - mean) / std
    torch.testing.assert_close(
        model.encode_image(images, model.plan), model.encode_image(floats, model.plan), rtol=1e-5, atol=1e-5
    )


def test_a_sigmoid_loss_has_its_own_starting_values() -> None:
    recipe = small_recipe(mlip=False, losses={"spatial_global": {"kind": "sigmoid"}})
    encoded = (model := small_model(recipe))(small_batch(), model.training_plan)
    assert encoded.scales["spatial_global"].item() == pytest.approx(10)
    assert encoded.biases["spatial_global"].exp().item() == pytest.approx(1 / 7)


def test_plain_blocks_without_keys_merge_by_their_tokens() -> None:
    model = small_model(small_recipe(mlip=False))
    model.vision.trunk.blocks = nn.Sequential(*[Block(32, 2, qkv_bias=True).double() for _ in range(4)])
    encoded = model(small_batch(), model.merge_plan(0.5))
    assert (encoded.token_sizes.sum(1) == 16).all()


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text_dropout_follows_attention_and_mlp_and_each_activation_is_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    config = Text(width=32, depth=2, num_heads=2, context_length=8, activation=activation, dropout=0.5)
    tower = TextTower(config).train()
    ids = torch.arange(16).view(2, 8)

    def mlp(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = block.mlp.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if activation == "quick_gelu" else nn.functional.gelu(x)
        return block.mlp.fc2(x)

    torch.manual_seed(1)
    found = tower(ids)
    torch.manual_seed(1)
    x = tower.token_embedding(ids) + tower.positional_embedding
    for block in tower.blocks:
        block.attn.eval()
        x = x + nn.functional.dropout(block.attn(block.norm1(x), is_causal=True), 0.5)
        x = x + nn.functional.dropout(mlp(block, block.norm2(x)), 0.5)
    torch.testing.assert_close(found, tower.norm(x))
    assert not torch.allclose(found, tower.eval()(ids))
    plain = TextTower(Text(width=32, depth=2, num_heads=2, context_length=8, vocab_size=100))
    assert tower.state_dict().keys() == plain.state_dict().keys()


def test_without_dropout_training_draws_no_random_numbers_in_the_text_tower() -> None:
    tower = TextTower(Text(width=32, depth=2, num_heads=2, context_length=8, vocab_size=100))
    state, ids = torch.get_rng_state(), torch.arange(16).view(2, 8)
    assert torch.equal(tower.train()(ids), tower.eval()(ids))
    assert torch.equal(torch.get_rng_state(), state)
