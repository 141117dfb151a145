"""The towers, the frequency branch and token merging. A model holds architecture only: no ranks, logging or files.

    model = build_model(load_recipe("recipes/openmoji.yaml").recipe)  # mlip_cli.model.clip, mlip_cli.recipe.load
    model.image_features(images, model.merge_plan(0.5))  # images (B, 3, H, W): uint8 pixels or normalised floats
    model.encode_text(token_ids)  # (B, L), from mlip_cli.data.tokenizer.Tokenizer

`mlip_cli.runs.loading` loads a trained model.
"""
