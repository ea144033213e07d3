"""The model card."""

from pathlib import Path

from huggingface_hub import ModelCard

from conftest import PREVIEWS, PROMPT, Train


def test_the_card_has_the_base_models_license_and_no_path(train: Train, tmp_path: Path) -> None:
    """Not openrail++, which is no license of SD3; the folder of the model is named without its path."""
    output = train(PREVIEWS, "--hub_model_id=me/dog")
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "other" and card.data.instance_prompt == PROMPT
    assert [each["output"]["url"] for each in card.data.widget] == ["samples/step-000004-prompt-0-0.png"]
    assert "openrail" not in str(card) and str(tmp_path.parent) not in str(card)
