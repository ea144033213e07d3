"""The command lines: the reference's still works, mistakes are told together, and each script stands alone."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import compute_embeddings as embed
import pytest
import train_dreambooth_sd3_lora_miniature as trainer
from conftest import ROOT

REQUIRED = ["--pretrained_model_name_or_path=m", "--instance_data_dir=d", "--data_df_path=e", "--instance_prompt=p"]
REFERENCE_FLAGS = """
pretrained_model_name_or_path revision variant instance_data_dir data_df_path cache_dir instance_prompt
max_sequence_length validation_prompt num_validation_images validation_epochs rank output_dir seed resolution
center_crop random_flip train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers weighting_scheme logit_mean logit_std mode_scale
optimizer use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm push_to_hub hub_token
hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision local_rank
""".split()


def test_bare_compute_embeddings_has_the_references_defaults() -> None:
    """Without flags it does the reference's job: its model, prompt, folder, length and file."""
    args = embed.parse_args([])
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-3-medium-diffusers"
    assert (args.prompt, args.max_sequence_length) == ("a photo of sks dog", 77)
    assert (args.local_data_dir, args.output_path) == (Path("dog"), Path("sample_embeddings.parquet"))


def test_the_trainer_has_every_flag_of_the_reference() -> None:
    """Each of the reference's flags is still there under its name."""
    args = trainer.parse_args(REQUIRED)
    assert [name for name in REFERENCE_FLAGS if not hasattr(args, name)] == []


def test_seed_zero_is_kept() -> None:
    """The reference's `if args.seed` took --seed 0 for none."""
    assert trainer.parse_args([*REQUIRED, "--seed=0"]).seed == 0


def test_all_mistakes_of_a_command_line_are_told_in_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    """Five mistakes, one message, exit code 2."""
    wrong = ["--resolution=100", "--rank=0", "--learning_rate=nan", "--lora_dropout=1", "--lora_blocks=a"]
    with pytest.raises(SystemExit) as exit_info:
        trainer.parse_args([*REQUIRED, *wrong])
    message = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert all(flag.split("=")[0] in message.split("error:")[1] for flag in wrong)


@pytest.mark.parametrize("flag", ["--max_train_step=3", "--unknown=1", "--lr_scheduler=x", "--mixed_precision=fp8"])
def test_abbreviated_unknown_and_invalid_flags_are_refused(flag: str) -> None:
    """Exit code 2 for what argparse itself finds."""
    with pytest.raises(SystemExit) as exit_info:
        trainer.parse_args([*REQUIRED, flag])
    assert exit_info.value.code == 2


def test_a_token_on_the_command_line_is_refused_with_wandb(capsys: pytest.CaptureFixture[str]) -> None:
    """As in the reference; the message does not repeat the token."""
    with pytest.raises(SystemExit):
        trainer.parse_args([*REQUIRED, "--hub_token=hf_secret", "--report_to=wandb"])
    message = capsys.readouterr().err
    assert "hf auth login" in message and "hf_secret" not in message


@pytest.mark.parametrize("length", ["0", "513"])
def test_t5_takes_1_to_512_tokens(length: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Other lengths end with exit code 2 and the range."""
    with pytest.raises(SystemExit) as exit_info:
        embed.parse_args(["--max_sequence_length", length])
    assert exit_info.value.code == 2 and "1 to 512" in capsys.readouterr().err


SHARED = ["find_images", "passed_over_note", "unreadable_images", "hash_image", "load_part", "peak_memory"]


@pytest.mark.parametrize("name", SHARED)
def test_what_both_scripts_need_stands_in_both_word_for_word(name: str) -> None:
    """Neither script imports the other, so the few shared functions are copies that may not drift apart."""
    assert inspect.getsource(getattr(embed, name)) == inspect.getsource(getattr(trainer, name))
    assert embed.IMAGE_SUFFIXES == trainer.IMAGE_SUFFIXES and embed.METADATA == trainer.METADATA


@pytest.mark.parametrize("name", ["compute_embeddings.py", "train_dreambooth_sd3_lora_miniature.py"])
def test_each_script_works_alone(name: str, tmp_path: Path) -> None:
    """Copied out of the repository, it still starts, and says nothing but its help."""
    shutil.copy(ROOT / name, tmp_path)
    result = subprocess.run([sys.executable, name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage:" in result.stdout and result.stderr == ""
