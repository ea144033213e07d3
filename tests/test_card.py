"""The model card: what it says, and that the code in it and in the README runs as it stands."""

import re
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from PIL import Image
from torch import Tensor

import train_dreambooth_sd3_lora_miniature as trainer
from conftest import PREVIEWS, PROMPT, ROOT, Train, compute

TOY = ROOT / "tests" / "toy"
ROBOT = "a photo of sks robot"
README = (ROOT / "README.md").read_text()


def python_code(text: str) -> str:
    """The one block of Python in a page."""
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def run(code: str) -> dict:
    """Execute Python code, with warnings as errors; the variables that it leaves."""
    variables: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*script_method. is deprecated", DeprecationWarning)  # torch's own
        exec(code, variables)
    return variables


@pytest.fixture
def read_by_transformer(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The prompt embeddings that pipelines give to their transformer; without a GPU, nothing is offloaded."""
    seen, forward = [], SD3Transformer2DModel.forward

    def record(self: SD3Transformer2DModel, *args: object, **kwargs: object) -> object:
        seen.append(kwargs["encoder_hidden_states"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", record)
    monkeypatch.setattr(StableDiffusion3Pipeline, "enable_model_cpu_offload", lambda self: None)
    return seen


def embeddings_of(path: Path, row: int) -> Tensor:
    """A row of a Parquet file's prompt embeddings, (L, D)."""
    return torch.from_numpy(pq.read_table(path)["prompt_embeds"].combine_chunks().to_numpy_ndarray()[row])


def toy_run(train: Train, folder: Path, *flags: str) -> Path:
    """A LoRA of the toy, trained for one step on embeddings that are computed with these flags."""
    path = compute(TOY / "model", TOY / "robot", folder / "toy.parquet", "--prompt", ROBOT, *flags)
    return train(
        pretrained_model_name_or_path=TOY / "model",
        instance_data_dir=TOY / "robot",
        data_df_path=path,
        instance_prompt=ROBOT,
        max_train_steps=1,
    )


def test_the_card_has_the_base_models_license_and_no_path(train: Train, tmp_path: Path) -> None:
    """Not openrail++, which is no license of SD3; the folder of the model is named without its path."""
    output = train(PREVIEWS, "--hub_model_id=me/dog")
    card = ModelCard.load(output / "README.md")
    assert card.data.license == "other" and card.data.instance_prompt == PROMPT
    assert [each["output"]["url"] for each in card.data.widget] == ["samples/step-000004-prompt-0-0.png"]
    assert "openrail" not in str(card) and str(tmp_path.parent) not in str(card)
    assert "template:sd-lora" in card.data.tags


def test_a_card_of_a_local_base_reads_well(train: Train, tiny35: Path) -> None:
    """The folder's name alone, such as "model", says nothing."""
    text = (train(pretrained_model_name_or_path=tiny35, max_train_steps=1) / "README.md").read_text()
    assert f"teaches a local copy of Stable Diffusion 3.5 (`{tiny35.name}`) what **{PROMPT}** looks like." in text


@pytest.mark.parametrize("flags", [["--t5_precision=exact"], ["--t5_precision=none"]])
def test_the_cards_code_gives_the_model_what_it_was_trained_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_by_transformer: list[Tensor], flags: list[str]
) -> None:
    """As many T5 tokens, or zeros for a run without T5, where the pipeline's own are 256."""
    output = toy_run(train, tmp_path, "--max_sequence_length=16", *flags)
    code = python_code((output / "README.md").read_text())
    monkeypatch.chdir(tmp_path)
    read_by_transformer.clear()
    image = run(code.replace("FOLDER OR REPOSITORY OF THE BASE MODEL", str(TOY / "model")))["image"]
    assert image.size == (64, 64)
    expected = embeddings_of(tmp_path / "toy.parquet", 0)
    for embeds in read_by_transformer:
        assert torch.allclose(embeds[-1], expected.float(), atol=0.01)  # the first is that of the negative prompt


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_the_cards_code_loads_the_base_in_the_dtype_of_the_run(train: Train, precision: str) -> None:
    """Not always in fp16."""
    output = train(f"--mixed_precision={precision}", max_train_steps=1)
    assert f" dtype={trainer.WEIGHT_DTYPES[precision]}," in (output / "README.md").read_text()


def test_the_readmes_code_runs(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_by_transformer: list[Tensor]
) -> None:
    """From stored embeddings, and with the text encoders, whose call is in the sentence below the block."""
    toy_run(train, tmp_path, "--t5_precision=exact").rename(tmp_path / "sd3-dreambooth-lora")
    (tmp_path / "toy.parquet").rename(tmp_path / "new.parquet")
    monkeypatch.chdir(tmp_path)
    code = python_code(README).replace("stabilityai/stable-diffusion-3-medium-diffusers", str(TOY / "model"))
    code = code.replace('"cuda"', '"cpu"').replace("float16", "float32")  # fp16 takes 50 s on some CPUs
    drawn_from_file = "pipeline(prompt_embeds=embeds[:1], "
    assert drawn_from_file in code
    run(code.replace(drawn_from_file, f"{drawn_from_file}num_inference_steps=1, height=64, width=64, "))
    assert Image.open("dog.png").size == (64, 64)
    expected = embeddings_of(tmp_path / "new.parquet", 0)
    assert torch.equal(read_by_transformer[-1][-1], expected.float())

    [call] = re.findall(r'leave out `\*\*encoders` and call\s+`(pipeline\(".*?\))`', README)
    loading = code[: code.index("negative =")].replace(", **encoders", "")
    run(f"{loading}\n{call[:-1]}, num_inference_steps=1, height=64, width=64)")
    assert read_by_transformer[-1][-1].shape == expected.shape
